"""The SDK on a running system: how it starts and stops."""

import asyncio
import gc
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest

from llmboost import LLMBoost, LLMBoostError
from llmboost.connection import connect
from tests.commands import wait_until
from tests.integration.api_pod import MODEL, WORDS, ScriptedWorker, ends, says
from tests.integration.sdk.program import program
from tests.integration.sdk.reading import CHAT, STORY, held, read_all


def clients(redis_url: str) -> list[str]:
    """Names of the connections that the SDK has made."""

    async def ask() -> list[str]:
        redis = connect(redis_url)
        names = [each["name"] for each in await redis.client_list()]
        await redis.aclose()
        return [name for name in names if name.startswith(("sdk-", "llmboost-tailer"))]

    return asyncio.run(ask())


@pytest.fixture
def our_threads() -> Callable[[], list[str]]:
    """Names of the product's threads that the test has begun: others of this process may have theirs."""
    before = set(threading.enumerate())
    return lambda: [
        thread.name
        for thread in threading.enumerate()
        if thread.name.startswith("llmboost") and thread not in before
    ]


def test_stopping_cancels_what_is_in_flight_and_leaves_nothing(
    worker: ScriptedWorker, redis_url: str, our_threads: Callable[[], list[str]]
) -> None:
    """The worker learns at once that nobody waits any more; no thread and no connection stays."""
    go_on = threading.Event()
    worker.script = lambda job: [says(WORDS)[0], held(go_on), *says(WORDS)[1:], ends()]

    def use() -> None:
        with LLMBoost(MODEL, redis_url=redis_url, streaming=True) as llm:
            llm.issues_inputs(["a", "b"])
            llm.get_output(timeout=20)
            wait_until(lambda: len(worker.jobs) == 2)  # what still waits in the queue never begins
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


def test_a_dropped_object_frees_everything(
    worker: ScriptedWorker, redis_url: str, our_threads: Callable[[], list[str]]
) -> None:
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


def test_a_model_that_nobody_serves(
    worker: ScriptedWorker, redis_url: str, our_threads: Callable[[], list[str]]
) -> None:
    """The error says what is served instead."""
    with pytest.raises(LLMBoostError, match=rf"serves 'other' .*{MODEL}"):
        LLMBoost("other", redis_url=redis_url).start(timeout=0.2)
    assert not our_threads()


def test_a_redis_that_is_not_there(our_threads: Callable[[], list[str]]) -> None:
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
