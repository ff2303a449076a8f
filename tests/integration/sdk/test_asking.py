"""The SDK on a running system: what is asked, and what comes back."""

import asyncio
import logging
import threading
from collections.abc import Iterable

import pytest

from llmboost import FormattedPrompt, LLMBoost, LLMBoostError, keys
from llmboost.entries import ChoiceDelta, Delta
from llmboost.jobs import GenerationJob, Prompt
from tests.integration.api_pod import MODEL, WORDS, ScriptedWorker, Step, ends, fails, says
from tests.integration.sdk.reading import CHAT, STORY, held, read_all


def test_text_comes_as_it_is_generated(llm: LLMBoost, worker: ScriptedWorker) -> None:
    """A streaming caller has the first word while the second is not written yet."""
    go_on = threading.Event()

    def script(job: GenerationJob) -> Iterable[Step]:
        first, *rest = says(WORDS)
        yield first
        yield held(go_on)
        yield from rest
        yield ends()

    worker.script = script
    assert llm.issues_inputs("Tell me") == [0]
    (output,) = llm.get_output(timeout=20)
    assert output == {
        "id": 0,
        "val": WORDS[0],
        "finished": False,
        "index": 0,
        "finish_reason": None,
        "error": None,
    }
    go_on.set()
    texts, reasons = "", []
    finished = False
    while not finished:
        for output in llm.get_output(timeout=20):
            texts += output["val"]
            reasons.append(output["finish_reason"])
            finished = output["finished"]
    assert texts == "".join(WORDS[1:])
    assert "stop" in reasons


def test_without_streaming_answers_come_whole(worker: ScriptedWorker, redis_url: str) -> None:
    """One output per input, with all of its text."""
    with LLMBoost(MODEL, redis_url=redis_url) as llm:
        llm.issues_inputs(["a", "b", "c"])
        outputs = []
        while len(outputs) < 3:
            outputs += llm.get_output(timeout=20)
        assert sorted(output["id"] for output in outputs) == [0, 1, 2]
        assert all(output["val"] == STORY for output in outputs)
        assert all(output["finished"] and output["finish_reason"] == "stop" for output in outputs)


def test_an_output_says_which_input_it_belongs_to(llm: LLMBoost, worker: ScriptedWorker) -> None:
    """Many inputs in flight, of every form, with ids and without: each gets its own answer."""

    def script(job: GenerationJob) -> Iterable[Step]:
        asked = job.prompt.text or job.prompt.messages[0]["content"]  # type: ignore[index]
        yield from says(["You ", "said ", asked])
        yield ends(3)

    worker.script = script
    inputs = [
        "zero",
        {"id": "x", "prompt": "one"},
        [{"role": "user", "content": "two"}],
        {"messages": [{"role": "user", "content": "three"}]},
        *(f"number {n}" for n in range(50)),
    ]
    ids = llm.issue_inputs(inputs)
    assert ids == [0, "x", 1, 2, *range(3, 53)]
    texts = read_all(llm, len(inputs))
    expected = ["zero", "one", "two", "three", *(f"number {n}" for n in range(50))]
    assert [texts[each] for each in ids] == [f"You said {what}" for what in expected]


def test_parameters_reach_the_worker(worker: ScriptedWorker, redis_url: str) -> None:
    """Defaults of the constructor, overrides of an input; the queue is that of the model behind an alias."""
    with LLMBoost(MODEL, redis_url=redis_url, max_tokens=7, temperature=0, stop=["x"]) as llm:
        llm.issues_inputs(["a", {"prompt": "b", "max_tokens": 9, "seed": 5}])
        read_all(llm, 2)
    one, other = sorted(worker.jobs, key=lambda job: job.prompt.text or "")
    assert (one.sampling.max_tokens, one.sampling.temperature, one.sampling.stop) == (7, 0.0, ("x",))
    assert (other.sampling.max_tokens, other.sampling.seed, other.sampling.stop) == (9, 5, ("x",))


@pytest.mark.parametrize("streaming", [True, False])
def test_several_answers_to_one_input(worker: ScriptedWorker, redis_url: str, streaming: bool) -> None:
    """Each has its index, and only the last output of all is finished."""
    with LLMBoost(MODEL, redis_url=redis_url, streaming=streaming, n=3) as llm:
        llm.issues_inputs("a")
        texts = ["", "", ""]
        finished = False
        while not finished:
            for output in llm.get_output(timeout=20):
                assert not finished
                texts[output["index"]] += output["val"]
                finished = output["finished"]
        assert texts == [STORY] * 3


def test_the_models_own_template_formats_a_chat(llm: LLMBoost, worker: ScriptedWorker) -> None:
    """The worker renders it, and what it rendered comes back to it as it is, special tokens included."""

    def script(job: GenerationJob) -> Iterable[Step]:
        if job.echo:
            assert job.sampling.max_tokens == 0
            assert job.prompt == Prompt(messages=CHAT)
            yield Delta([ChoiceDelta(0, 0, [], "<s>Tell me a story.", None)], 5)
            yield Delta([ChoiceDelta(0, 0, [], "", "length")])
        else:
            assert job.prompt == Prompt(text="<s>Tell me a story.", add_special_tokens=False)
            yield from says(WORDS)
        yield ends()

    worker.script = script
    prompt = llm.apply_format(CHAT)
    assert prompt == "<s>Tell me a story."
    assert isinstance(prompt, FormattedPrompt)
    llm.issues_inputs(prompt)
    assert read_all(llm, 1) == {0: STORY}


def test_a_template_that_refuses_says_so(llm: LLMBoost, worker: ScriptedWorker) -> None:
    worker.script = lambda job: [fails("The template takes no system message.")]
    with pytest.raises(LLMBoostError, match="takes no system message"):
        llm.apply_format(CHAT)
    with pytest.raises(ValueError, match="role"):
        llm.apply_format([{"content": "x"}])


def test_a_failed_input_holds_nobody_up(
    llm: LLMBoost, worker: ScriptedWorker, caplog: pytest.LogCaptureFixture
) -> None:
    """It ends in an output with an error, which a loop that only looks at `finished` survives."""

    def script(job: GenerationJob) -> Iterable[Step]:
        if job.prompt.text == "bad":
            yield fails("It is too long.", type="invalid_request_error", code="context_length_exceeded")
        else:
            yield from says(WORDS)
            yield ends()

    worker.script = script
    with caplog.at_level(logging.WARNING):
        llm.issues_inputs(["good", {"id": "b", "prompt": "bad"}])
        texts, errors = "", []
        finished = 0
        while finished < 2:
            for output in llm.get_output(timeout=20):
                texts += output["val"]
                finished += output["finished"]
                if output["error"]:
                    errors.append((output["id"], output["error"]))
    assert texts == STORY
    ((failed, error),) = errors
    assert failed == "b"
    assert error["code"] == "context_length_exceeded"
    assert "It is too long." in caplog.text


def test_more_inputs_than_the_queue_should_hold(
    worker: ScriptedWorker, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They wait their turn in the SDK; all are answered."""
    monkeypatch.setattr("llmboost.sdk.session.MOST_IN_FLIGHT", 3)
    unsealed: list[int] = []

    async def count() -> None:
        unsealed.append(await worker.redis.zcard(keys.OPEN))

    def script(job: GenerationJob) -> Iterable[Step]:
        yield count()
        yield from says(WORDS)
        yield ends()

    worker.script = script
    with LLMBoost(MODEL, redis_url=redis_url) as llm:
        llm.issues_inputs(["a"] * 20)
        assert read_all(llm, 20) == dict.fromkeys(range(20), STORY)
    assert 0 < max(unsealed) <= 3


def test_nothing_wrong_is_issued(llm: LLMBoost, worker: ScriptedWorker) -> None:
    """If one input of a call is refused, none of the call is sent; ids are not used up."""
    with pytest.raises(ValueError, match="input 1"):
        llm.issues_inputs(["a", {"prompt": "b", "tempature": 1}])
    llm.issues_inputs({"id": "x", "prompt": "a"})
    with pytest.raises(ValueError, match="'x'"):
        llm.issues_inputs(["b", {"id": "x", "prompt": "c"}])
    assert llm.issues_inputs("b") == [0]
    assert read_all(llm, 2) == {"x": STORY, 0: STORY}
    assert len(worker.jobs) == 2


def test_waiting_for_nothing_is_an_error(llm: LLMBoost) -> None:
    with pytest.raises(LLMBoostError, match="issues_inputs"):
        llm.get_output()
    llm.issues_inputs("a")
    read_all(llm, 1)
    with pytest.raises(LLMBoostError, match="issues_inputs"):
        llm.get_output()


def test_a_timeout_loses_nothing(llm: LLMBoost, worker: ScriptedWorker) -> None:
    go_on = threading.Event()
    worker.script = lambda job: [held(go_on), *says(WORDS), ends()]
    llm.issues_inputs("a")
    with pytest.raises(TimeoutError):
        llm.get_output(timeout=0.05)
    go_on.set()
    assert read_all(llm, 1) == {0: STORY}


# --- Async output --------------------------------------------------------------------------------------


async def test_awaiting_outputs_blocks_nobody(worker: ScriptedWorker, redis_url: str) -> None:
    """In the caller's own event loop, which goes on meanwhile; a cancelled wait takes nothing."""
    go_on = threading.Event()
    worker.script = lambda job: [held(go_on), *says(WORDS), ends()]
    llm = LLMBoost(MODEL, redis_url=redis_url, streaming=True, enable_async_output=True)
    llm.start()
    try:
        llm.issues_inputs("a")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(llm.aget_output(), 0.05)
        go_on.set()
        text, finished = "", False
        while not finished:
            output = await asyncio.wait_for(llm.aget_output(), 20)
            text += output["val"]
            finished = output["finished"]
        assert text == STORY
        with pytest.raises(LLMBoostError, match="issues_inputs"):
            await llm.aget_output()
        with pytest.raises(LLMBoostError, match="aget_output"):
            llm.get_output()
    finally:
        llm.stop()


async def test_async_output_must_be_enabled(llm: LLMBoost) -> None:
    with pytest.raises(LLMBoostError, match="enable_async_output"):
        await llm.aget_output()
