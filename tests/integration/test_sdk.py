"""The SDK on a running system whose worker plays a script: what is asked, what comes back, what is left."""

import asyncio
import gc
import logging
import signal
import sys
import textwrap
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
from arq.connections import ArqRedis

from llmboost import FormattedPrompt, LLMBoost, LLMBoostError, keys
from llmboost.connection import connect
from llmboost.entries import ChoiceDelta, Delta
from llmboost.jobs import GenerationJob, Prompt
from llmboost.streams import TokenStreams

from ..commands import STANDINS, Command, wait_until
from .api_pod import MODEL, WORDS, ScriptedWorker, Step, ends, fails, says, working

STORY = "".join(WORDS)
CHAT = [{"role": "user", "content": "Tell me a story."}]


@pytest.fixture
def worker(redis: ArqRedis, redis_url: str) -> Iterator[ScriptedWorker]:
    """A worker in a thread, for the SDK's calls block this one."""
    ready, stop = threading.Event(), threading.Event()
    made: list[ScriptedWorker] = []

    async def work() -> None:
        own = connect(redis_url)
        async with working(own, TokenStreams(own, retention=60)) as scripted:
            made.append(scripted)
            ready.set()
            await asyncio.to_thread(stop.wait)
        await own.aclose()

    thread = threading.Thread(target=asyncio.run, args=(work(),))
    thread.start()
    assert ready.wait(10)
    yield made[0]
    wait_until(lambda: made[0].finished == len(made[0].jobs))
    stop.set()
    thread.join(10)


@pytest.fixture
def llm(worker: ScriptedWorker, redis_url: str) -> Iterator[LLMBoost]:
    with LLMBoost(MODEL, redis_url=redis_url, streaming=True) as running:
        yield running


def held(event: threading.Event) -> Step:
    """A step of a script: waits for the test."""
    return asyncio.to_thread(event.wait, 20)


def read_all(llm: LLMBoost, count: int) -> dict[Any, str]:
    """What each of so many inputs was answered; refuses a second end of one, and text after it."""
    texts: dict[Any, str] = {}
    finished: set[Any] = set()
    while len(finished) < count:
        for output in llm.get_output(timeout=20):
            assert output["id"] not in finished
            assert output["error"] is None
            texts[output["id"]] = texts.get(output["id"], "") + output["val"]
            if output["finished"]:
                finished.add(output["id"])
    return texts


# --- Asking and reading --------------------------------------------------------------------------------


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


# --- Starting and stopping -----------------------------------------------------------------------------


def clients(redis_url: str) -> list[str]:
    """Names of the connections that the SDK has made."""

    async def ask() -> list[str]:
        redis = connect(redis_url)
        names = [each["name"] for each in await redis.client_list()]
        await redis.aclose()
        return [name for name in names if name.startswith(("sdk-", "llmboost-tailer"))]

    return asyncio.run(ask())


def our_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("llmboost")]


def test_stopping_cancels_what_is_in_flight_and_leaves_nothing(
    worker: ScriptedWorker, redis_url: str
) -> None:
    """The worker learns at once that nobody waits any more; no thread and no connection stays."""
    go_on = threading.Event()
    worker.script = lambda job: [says(WORDS)[0], held(go_on), *says(WORDS)[1:], ends()]

    def use() -> None:
        with LLMBoost(MODEL, redis_url=redis_url, streaming=True) as llm:
            llm.issues_inputs(["a", "b"])
            llm.get_output(timeout=20)
            assert clients(redis_url)
            raise RuntimeError("the caller failed")

    with pytest.raises(RuntimeError, match="the caller failed"):
        use()
    go_on.set()
    wait_until(lambda: worker.finished == 2)
    assert all("sealed" in str(why) for why in worker.stopped.values())
    assert len(worker.stopped) == 2
    wait_until(lambda: not clients(redis_url))
    assert not our_threads()


def test_stopping_twice_and_starting_again(worker: ScriptedWorker, redis_url: str) -> None:
    llm = LLMBoost(MODEL, redis_url=redis_url, streaming=True)
    llm.stop()
    with pytest.raises(LLMBoostError, match="start"):
        llm.issues_inputs("a")
    for _ in range(2):
        llm.start()
        llm.start()
        llm.issues_inputs("a")
        assert read_all(llm, 1) == {0: STORY}
        llm.stop()
        llm.stop()
        with pytest.raises(LLMBoostError, match="start"):
            llm.get_output()


def test_a_waiting_caller_learns_of_the_stop(worker: ScriptedWorker, redis_url: str) -> None:
    """Stopped from another thread, `get_output` and `apply_format` end."""
    go_on = threading.Event()
    worker.script = lambda job: [held(go_on), ends()]
    for call in (LLMBoost.get_output, partial(LLMBoost.apply_format, messages=CHAT)):
        llm = LLMBoost(MODEL, redis_url=redis_url)
        llm.start()
        llm.issues_inputs("a")
        with ThreadPoolExecutor() as pool:
            waiting = pool.submit(call, llm)
            if call is LLMBoost.get_output:
                assert llm._running
                waiters = llm._running.outputs._changed._waiters  # type: ignore[attr-defined]
                wait_until(lambda: waiters)  # noqa: B023
            else:
                wait_until(lambda: any(job.echo for job in worker.jobs))
            llm.stop()
            with pytest.raises(LLMBoostError, match="stopped"):
                waiting.result(10)
    go_on.set()
    wait_until(lambda: worker.finished == len(worker.jobs))


def test_a_dropped_object_frees_everything(worker: ScriptedWorker, redis_url: str) -> None:
    """Whoever forgets `stop` leaves nothing running when the object is gone."""
    llm = LLMBoost(MODEL, redis_url=redis_url)
    llm.start()
    assert our_threads()
    del llm
    gc.collect()
    wait_until(lambda: not our_threads())
    wait_until(lambda: not clients(redis_url))


def test_a_program_that_forgets_to_stop_cancels_at_its_end(worker: ScriptedWorker, redis_url: str) -> None:
    """On a running system too: its worker need not wait for the audience to lapse."""
    go_on = threading.Event()
    worker.script = lambda job: [says(WORDS)[0], held(go_on), *says(WORDS)[1:], ends()]
    text = f"""
        from llmboost import LLMBoost
        llm = LLMBoost({MODEL!r}, streaming=True)
        llm.start()
        llm.issues_inputs("a")
        print(llm.get_output()[0]["val"])
        """
    with program(text, LLMBOOST_REDIS_URL=redis_url) as command:
        assert command.wait() == 0
        assert command.out == [WORDS[0]]
    go_on.set()
    wait_until(lambda: worker.finished == 1)
    assert len(worker.stopped) == 1


def test_a_model_that_nobody_serves(worker: ScriptedWorker, redis_url: str) -> None:
    """The error says what is served instead."""
    with pytest.raises(LLMBoostError, match=rf"serves 'other' .*{MODEL}"):
        LLMBoost("other", redis_url=redis_url).start(timeout=0.2)
    assert not our_threads()


def test_a_redis_that_is_not_there() -> None:
    with pytest.raises(LLMBoostError, match="in vain for Redis"):
        LLMBoost(MODEL, redis_url="redis://127.0.0.1:1").start(timeout=0.2)
    assert not our_threads()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temprature": 1}, "'temprature'; did you mean 'temperature'"),
        ({"temperature": 9}, "temperature is 9"),
        ({"max_num_seqs": 0}, "max_num_seqs"),
        ({"dp": 0}, "dp"),
        ({"redis_url": "http://x"}, "redis_url"),
        ({"port": 80}, "'port'"),
    ],
)
def test_wrong_options_are_refused_before_anything_starts(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        LLMBoost(MODEL, **options)


# --- Processes of its own, with stand-ins for the workers -----------------------------------------------


def program(text: str, **env: str) -> Command:
    return Command([sys.executable, "-c", textwrap.dedent(text)], path=[STANDINS], env=env)


def test_a_worker_that_cannot_start_raises_its_reason() -> None:
    with program("""
        from llmboost import LLMBoost
        LLMBoost("unknown").start()
        """) as command:
        assert command.wait() == 1
        assert (
            command.err[-1].startswith("llmboost.sdk.outputs.LLMBoostError: ")
            or "LLMBoostError" in command.log
        )
        assert "there is no model 'unknown'" in command.log
        assert command.family() == []


@pytest.mark.parametrize("ending", ["", "llm.stop()", "raise SystemExit(3)"])
def test_the_end_of_the_program_leaves_no_process(ending: str) -> None:
    """Even if it forgets to stop."""
    with program(f"""
        from llmboost import LLMBoost
        llm = LLMBoost("any", dp=2, device="cpu")
        llm.start()
        print("ready", flush=True)
        {ending}
        """) as command:
        command.wait_for_line("ready")
        assert command.wait() == (3 if "SystemExit" in ending else 0)
        assert command.family() == []
        assert "Traceback" not in command.log


@pytest.mark.parametrize("when", ["starting", "ready"])
def test_ctrl_c_leaves_no_process(when: str) -> None:
    """While it starts, and while it waits for an output."""
    with program("""
        from llmboost import LLMBoost
        with LLMBoost("any") as llm:
            llm.issues_inputs("a")
            print("ready", flush=True)
            llm.get_output()
        """) as command:
        command.wait_for_line(when, among="err" if when == "starting" else "out")
        command.signal(signal.SIGINT)
        command.wait()
        assert "KeyboardInterrupt" in command.err[-1]
        assert command.family() == []


def test_workers_that_die_for_good_end_the_wait() -> None:
    """What can't be answered any more is an error, not a wait."""
    with program("""
        from llmboost import LLMBoost, processes
        processes._MAX_DEATHS = 1
        with LLMBoost("any") as llm:
            llm.issues_inputs("a")
            print("ready", flush=True)
            try:
                llm.get_output()
            finally:
                try:
                    llm.apply_format([{"role": "user", "content": "a"}])
                except Exception as error:
                    print(error, flush=True)
        """) as command:
        command.wait_for_line("ready")
        command.member("worker").kill()
        assert command.wait() == 1
        assert "LLMBoostError: worker-0 was ended by SIGKILL" in command.log
        assert "worker-0" in command.out[-1]
        assert command.family() == []


def test_importing_is_cheap_and_the_sdk_needs_neither_side() -> None:
    """`import llmboost` loads no SDK, and the SDK neither pod nor worker nor torch."""
    with program("""
        import sys
        import llmboost
        assert not [name for name in sys.modules if name.startswith(("llmboost.", "redis", "pydantic"))]
        from llmboost import LLMBoost
        heavy = {"llmboost_api", "llmboost_worker", "torch", "transformers", "fastapi", "uvicorn"}
        assert not heavy & sys.modules.keys()
        """) as command:
        assert command.wait() == 0, command.log


def test_progress_is_said_on_stderr_alone(
    worker: ScriptedWorker,
    redis_url: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Standard output belongs to the caller."""
    monkeypatch.setattr("llmboost.sdk.session._FIRST_NOTE_S", 0.0)
    with pytest.raises(LLMBoostError):
        LLMBoost("other", redis_url=redis_url).start(timeout=0.2)
    out, err = capsys.readouterr()
    assert out == ""
    assert "llmboost: waiting for a worker that serves 'other'" in err
