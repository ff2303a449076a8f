"""Outputs reach whoever waits for them, whole and in order, however many wait together."""

import asyncio
import threading

import pytest

from llmboost.sdk.outputs import LLMBoostError, Output, Outputs
from tests.waiting import suspended


def output(
    each_id: int | str, val: str, *, index: int = 0, finished: bool = False, reason: str | None = None
) -> Output:
    return {
        "id": each_id,
        "val": val,
        "finished": finished,
        "index": index,
        "finish_reason": reason,
        "error": None,
    }


def test_inputs_are_numbered_around_the_ids_in_use() -> None:
    """No two inputs that are not finished have the same id."""
    outputs = Outputs()
    assert outputs.expect([None, 2, "a", None, None]) == [0, 2, "a", 1, 3]
    with pytest.raises(ValueError, match="'a'"):
        outputs.expect([None, "a"])
    outputs.put(output("a", "", finished=True))
    outputs.get(0)
    assert outputs.expect([None, "a"]) == [4, "a"]
    with pytest.raises(ValueError, match="'b'"):
        outputs.expect(["b", "b"])


def test_text_that_waits_together_is_joined() -> None:
    """The caller gets one output per answer, with all that has come."""
    outputs = Outputs()
    outputs.expect([0, 1])
    outputs.put(output(0, "Once"))
    outputs.put(output(1, "Hello", finished=True))
    outputs.put(output(0, " upon", reason="stop"))
    outputs.put(output(0, "", finished=True))
    assert outputs.get(None) == [
        output(1, "Hello", finished=True),
        output(0, "Once upon", finished=True, reason="stop"),
    ]


def test_the_last_output_of_an_input_comes_last() -> None:
    """What is finished has nothing waiting behind it, whichever of its answers waited first."""
    outputs = Outputs()
    outputs.expect([0])
    outputs.put(output(0, "b", index=1))
    outputs.put(output(0, "a", index=0))
    outputs.put(output(0, "", index=1, finished=True))
    assert [each["finished"] for each in outputs.get(None)] == [False, True]


def test_waiting_for_what_cannot_come_is_an_error() -> None:
    """Nothing in flight, or all of it taken."""
    outputs = Outputs()
    with pytest.raises(LLMBoostError, match="issues_inputs"):
        outputs.get(None)
    outputs.expect([0])
    with pytest.raises(TimeoutError):
        outputs.get(0.01)
    outputs.put(output(0, "", finished=True))
    outputs.get(None)
    with pytest.raises(LLMBoostError, match="issues_inputs"):
        outputs.get(None)


def test_closing_wakes_whoever_waits() -> None:
    """After what has come, the reason."""
    outputs = Outputs()
    outputs.expect([0, 1])
    errors: list[Exception] = []

    def wait() -> None:
        try:
            outputs.get(10)
        except LLMBoostError as error:
            errors.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    outputs.close(LLMBoostError("over"))
    thread.join(5)
    assert [str(error) for error in errors] == ["over"]
    with pytest.raises(LLMBoostError, match="over"):
        outputs.expect([2])


async def test_a_cancelled_wait_takes_nothing() -> None:
    """What comes after it is for the next who asks."""
    outputs = Outputs()
    outputs.expect([0])
    waiting = asyncio.create_task(outputs.aget())
    await suspended(waiting)
    waiting.cancel()
    threading.Thread(target=outputs.put, args=(output(0, "a"),)).start()
    await asyncio.gather(waiting, return_exceptions=True)
    assert await asyncio.wait_for(outputs.aget(), 5) == output(0, "a")
    assert outputs._coroutines == []


async def test_coroutines_that_wait_get_different_outputs() -> None:
    """Each output is taken once; whoever is left when all inputs are finished gets an error."""
    outputs = Outputs()
    outputs.expect([0, 1])
    waiting = [asyncio.create_task(outputs.aget()) for _ in range(3)]
    await suspended(*waiting)
    outputs.put(output(0, "a", finished=True))
    outputs.put(output(1, "b", finished=True))
    got = await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), 5)
    assert {each["val"] for each in got if isinstance(each, dict)} == {"a", "b"}
    assert sum(isinstance(each, LLMBoostError) for each in got) == 1
