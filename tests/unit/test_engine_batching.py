"""Sequences join, leave and fail, each by itself; figures and memory tell the truth; the thread behaves."""

import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from llmboost_worker.engine.interface import EngineError, SequenceRequest
from llmboost_worker.engine.transformers import EngineConfig, TransformersEngine
from llmboost_worker.engine.transformers.pace import UNBOUNDED, Pace
from llmboost_worker.engine.transformers.runner import ModelRunner
from tests.unit.engine_models import (
    CONFIGS,
    LONG,
    PER_TOKEN,
    POISON,
    TIMEOUT,
    VOCAB,
    Driver,
    driving,
    prompt,
    request,
    save_model,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(CONFIGS["llama"], tmp_path_factory.mktemp("llama"), poison=POISON)


@pytest.fixture
def driver(folder: Path) -> Iterator[Driver]:
    with driving(folder, max_num_batched_tokens=64, max_num_seqs=8) as driver:
        yield driver


def sound(id: str, **options: Any) -> SequenceRequest:
    """Never draws the poisoned token."""
    return request(id, prompt(20), **{"logit_bias": {POISON: -1000.0}, "max_tokens": 12, **options})


def started(driver: Driver, *ids: str) -> Callable[[], bool]:
    return lambda: all(driver.tokens(id) for id in ids)


def test_a_sequence_joins_while_others_run_and_leaves_before_them(driver: Driver) -> None:
    alone = driver.run_one(sound("alone")).token_ids
    driver.engine.add([sound("long", **LONG)])
    driver.wait(started(driver, "long"))
    assert driver.run_one(sound("short")).token_ids == alone
    assert not driver.finished("long")
    driver.wait(lambda: driver.finished("long"))
    assert len(driver.tokens("long")) == 400
    assert driver.tokens("long")[:12] == alone


def test_others_get_tokens_while_a_long_prompt_is_computed(folder: Path) -> None:
    """In chunks: the runner sees steps in which one sequence decodes beside a part of the other's prompt."""
    steps: list[list[tuple[str, int]]] = []

    class Recorder(ModelRunner):
        def run(self, batch: Any) -> Any:
            steps.append([(sequence.id, sequence.num_scheduled) for sequence in batch])
            return super().run(batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llmboost_worker.engine.transformers.core.ModelRunner", Recorder)
        patch.setattr(Pace, "tokens", lambda *arguments: UNBOUNDED)
        with driving(folder, max_num_batched_tokens=32, max_num_seqs=4) as driver:
            driver.engine.add([sound("short", **LONG)])
            driver.wait(started(driver, "short"))
            driver.run_one(request("long", prompt(100), max_tokens=1))
    chunks = [(dict(step).get("short"), dict(step)["long"]) for step in steps if "long" in dict(step)]
    assert chunks == [(1, 31), (1, 31), (1, 31), (1, 7)]
    assert all(sum(size for _, size in step) <= 32 for step in steps)


@pytest.mark.parametrize("length", [20, 100])
def test_without_chunks_a_prompt_takes_one_step(folder: Path, length: int) -> None:
    """Even one above the step's tokens. Same tokens either way."""
    with driving(folder, max_num_batched_tokens=32, max_num_seqs=4) as driver:
        chunked = driver.run_one(request("a", prompt(length), max_tokens=3, ignore_eos=True))
        steps = driver.engine.stats().steps
        assert steps == (3 if length == 20 else 6)
    with driving(folder, max_num_batched_tokens=32, max_num_seqs=4, enable_chunked_prefill=False) as driver:
        unchunked = driver.run_one(request("a", prompt(length), max_tokens=3, ignore_eos=True))
        assert driver.engine.stats().steps == 3
        results = driver.run(
            *(request(f"{i}", prompt(length), max_tokens=3, ignore_eos=True) for i in range(6))
        )
    assert chunked == unchunked
    assert results == [chunked] * 6


def test_cancel_frees_slots_at_the_next_step_and_silences(driver: Driver) -> None:
    ids = [f"{i}" for i in range(10)]
    driver.engine.add([sound(id, **LONG) for id in ids])
    driver.wait(started(driver, *ids[:8]))
    stats = driver.engine.stats()
    assert (stats.running, stats.waiting) == (8, 2)
    driver.engine.cancel([*ids[:7], ids[8], "unknown"])
    driver.wait(started(driver, ids[9]))
    stats = driver.engine.stats()
    assert (stats.running, stats.waiting) == (2, 0)
    driver.wait(lambda: driver.finished(ids[7]) and driver.finished(ids[9]))
    assert [driver.finished(id) for id in ids] == [False] * 7 + [True, False, True]
    assert not driver.tokens(ids[8])
    assert driver.engine.stats().running == 0


def test_a_cancelled_id_can_be_used_again_at_once(driver: Driver) -> None:
    alone = driver.run_one(sound("alone")).token_ids
    driver.engine.add([sound("again", **LONG)])
    driver.wait(started(driver, "again"))
    driver.engine.cancel(["again"])
    assert driver.run_one(sound("again")).token_ids == alone


def test_interactive_sequences_are_admitted_before_batch_ones(driver: Driver) -> None:
    driver.engine.add([sound(f"busy-{i}", max_tokens=30, ignore_eos=True) for i in range(8)])
    driver.engine.add([sound("batch", priority=1), sound("interactive")])
    driver.wait(lambda: driver.finished("batch") and driver.finished("interactive"))
    assert list(driver.sequences).index("interactive") < list(driver.sequences).index("batch")


BAD: dict[str, dict[str, Any]] = {
    "outside the vocabulary": {"prompt_ids": [1, VOCAB]},
    "id -1 of prompt": {"prompt_ids": [1, -1]},
    "id 300 of output": {"prompt_ids": [1], "output_ids": [VOCAB]},
    "logit_bias": {"prompt_ids": [1], "logit_bias": {VOCAB: 1.0}},
    "more than the context of 512": {"prompt_ids": [1] * 500, "max_tokens": 13},
    "NaN": {"prompt_ids": [5, POISON, 6]},
    "is empty": {"prompt_ids": []},
    "not supported": {"prompt_ids": [5, "no id"]},
}


def test_bad_requests_fail_alone_each_with_its_reason(driver: Driver) -> None:
    """In one batch with sound ones, which get what they get without them."""
    alone = driver.run_one(sound("alone")).token_ids
    bad = [request(f"bad {reason}", **options) for reason, options in BAD.items()]
    good = [sound(f"good-{i}") for i in range(4)]
    results = driver.run(*good[:2], *bad, *good[2:])
    assert [result.token_ids for result in (*results[:2], *results[-2:])] == [alone] * 4
    for one, result in zip(bad, results[2:-2], strict=True):
        assert (result.finish_reason, result.token_ids) == ("error", [])
        assert one.id.removeprefix("bad ") in (result.error or "")
    stats = driver.engine.stats()
    assert (stats.running, stats.waiting) == (0, 0)


def test_nan_left_in_a_block_does_not_reach_its_next_owner(driver: Driver) -> None:
    """The next owners are shorter than a neighbour, so what their blocks hold beyond their tokens is read."""
    good = [sound(f"good-{i}") for i in range(5)]
    neighbour = request("neighbour", prompt(105), max_tokens=20, logit_bias={POISON: -1000})
    alone = driver.run(*good, neighbour)
    poisoned = [request(f"poisoned-{i}", [*prompt(100), POISON]) for i in range(6)]
    assert [result.finish_reason for result in driver.run(*poisoned)] == ["error"] * 6
    assert driver.run(*good, neighbour) == alone


@pytest.mark.parametrize("culprits", [1, 3])
def test_a_step_that_throws_fails_only_the_culprits(
    driver: Driver, monkeypatch: pytest.MonkeyPatch, culprits: int
) -> None:
    alone = driver.run_one(sound("alone")).token_ids
    forward = ModelRunner.forward

    def failing(self: ModelRunner, batch: Any, layout: Any) -> Any:
        if any("culprit" in sequence.id and sequence.num_output > 2 for sequence in batch):
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return forward(self, batch, layout)

    monkeypatch.setattr(ModelRunner, "forward", failing)
    bad = [sound(f"culprit-{i}") for i in range(culprits)]
    results = driver.run(*(sound(f"{i}") for i in range(4)), *bad)
    assert [result.token_ids for result in results[:4]] == [alone] * 4
    for result in results[4:]:
        assert (result.finish_reason, result.token_ids) == ("error", alone[:3])
        assert "can't allocate memory" in (result.error or "")
    assert driver.engine.stats().running == 0


def test_when_memory_is_short_sequences_give_way_and_lose_nothing(folder: Path) -> None:
    """Room for one sequence of full length, or four of these eight at their end."""
    requests = [
        request(
            f"{i}",
            prompt(90 + i),
            max_tokens=60,
            ignore_eos=True,
            temperature=float(i % 2),
            seed=i,
            logit_bias={POISON: -1000},
        )
        for i in range(8)
    ]
    with driving(folder, max_num_batched_tokens=64, max_num_seqs=8) as driver:
        alone = [driver.run_one(one).token_ids for one in requests]
    little = (512 + 16) * PER_TOKEN / 2**30
    with driving(folder, max_num_batched_tokens=64, max_num_seqs=8, kv_cache_memory=little) as driver:
        results = driver.run(*requests)
        computed = driver.engine.stats().prompt_tokens
    assert [result.token_ids for result in results] == alone
    assert computed > sum(len(one.prompt_ids) for one in requests), "nobody gave way: the test tests nothing"


def test_counters_add_up(driver: Driver) -> None:
    """Of six prompts that share a block, one computes it."""
    driver.run(*(sound(f"{i}", max_tokens=10, ignore_eos=True) for i in range(6)))
    stats = driver.engine.stats()
    assert (stats.prompt_tokens, stats.cached_tokens, stats.output_tokens) == (20 + 5 * 4, 5 * 16, 60)
    assert 10 <= stats.steps <= 40
    assert (stats.blocks_used, stats.blocks_total) == (0, 8 * 512 // 16)


def test_added_sequences_count_as_waiting_at_once(folder: Path) -> None:
    release = threading.Event()
    engine = TransformersEngine(
        EngineConfig(model=str(folder), threads=1, kv_cache_memory=0.1, max_num_seqs=2)
    )
    engine.start(lambda outputs: release.wait(TIMEOUT) and None, lambda error: None)
    try:
        engine.add([sound(f"{i}", **LONG) for i in range(5)])
        stats = engine.stats()
        assert stats.running + stats.waiting == 5
        engine.add([sound("late", **LONG)])
        stats = engine.stats()
        assert stats.running + stats.waiting == 6
        engine.cancel(["late"])
        stats = engine.stats()
        assert stats.running + stats.waiting == 5
    finally:
        release.set()
        engine.close()


def test_an_id_in_use_is_refused(driver: Driver) -> None:
    driver.engine.add([sound("twin", **LONG)])
    with pytest.raises(ValueError, match="twin"):
        driver.engine.add([sound("twin")])
    driver.wait(lambda: driver.finished("twin"))
    driver.run_one(sound("twin"))


def test_an_idle_engine_sleeps_on_its_inbox(driver: Driver) -> None:
    """Its thread stands in a lock's wait, and wakes for the next request."""
    driver.run_one(sound("first"))
    thread = next(thread for thread in threading.enumerate() if thread.name == "llmboost-engine")

    def asleep() -> bool:
        frame = sys._current_frames()[thread.ident or 0]
        return frame.f_code.co_name == "wait" and frame.f_code.co_filename == threading.__file__

    driver.wait_until(asleep)
    steps = driver.engine.stats().steps
    driver.engine.cancel(["nobody"])
    driver.wait_until(asleep)
    assert driver.engine.stats().steps == steps
    driver.run_one(sound("second"))


def test_close_ends_the_thread_in_the_middle_of_work_and_twice(folder: Path) -> None:
    with driving(folder) as driver:
        driver.engine.add([sound("long", **LONG)])
        driver.wait(started(driver, "long"))
        driver.engine.close()
        driver.engine.close()
        assert not [thread for thread in threading.enumerate() if thread.name == "llmboost-engine"]
        assert driver.engine.stats().running == 0
        with pytest.raises(EngineError, match="closed"):
            driver.engine.add([sound("late")])
    assert not driver.failures


def test_an_engine_that_breaks_says_so_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lost device, say. Afterwards it takes nothing on."""
    with driving(folder) as driver:

        def lost(self: ModelRunner, batch: Any, layout: Any) -> Any:
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

        monkeypatch.setattr(ModelRunner, "forward", lost)
        driver.engine.add([sound("a"), sound("b")])
        driver.wait(lambda: driver.failures)
        with pytest.raises(EngineError, match="illegal memory access"):
            driver.engine.add([sound("c")])
    assert len(driver.failures) == 1
    assert not driver.sequences
