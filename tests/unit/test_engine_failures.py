"""Whatever throws, the sequences that it concerns end with an error that helps, and no others; the engine
lives on. What leaves nothing to go on with ends the engine."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from llmboost_worker.engine.interface import EngineError, SequenceRequest, StepOutput
from llmboost_worker.engine.transformers import EngineConfig, TransformersEngine, failures
from llmboost_worker.engine.transformers.core import EngineCore
from llmboost_worker.engine.transformers.runner import ModelRunner
from llmboost_worker.engine.transformers.sampling.sampler import Sampler
from llmboost_worker.engine.transformers.scheduler import Scheduler
from llmboost_worker.engine.transformers.sequence import Sequence
from tests.unit.engine_models import CONFIGS, Collected, Driver, driving, prompt, request, save_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(CONFIGS["llama"], tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def driver(folder: Path) -> Iterator[Driver]:
    with driving(folder, max_num_batched_tokens=64, max_num_seqs=8, enable_prefix_caching=False) as driver:
        yield driver


def sound(id: str, **options: Any) -> SequenceRequest:
    return request(id, prompt(20), **{"max_tokens": 12, "ignore_eos": True, **options})


def four(driver: Driver, *bad: SequenceRequest) -> tuple[list[Collected], list[Collected]]:
    """What four sound sequences get beside the bad ones, and what these get."""
    results = driver.run(sound("a"), *bad, *(sound(id) for id in "bcd"))
    return [results[0], *results[len(bad) + 1 :]], results[1 : len(bad) + 1]


@pytest.fixture
def alone(driver: Driver) -> Collected:
    """What a sound sequence gets when nothing fails."""
    return driver.run_one(sound("alone"))


def failing_for(
    method: Callable[..., Any], error: Callable[[], Exception], fails: Callable[[Sequence], bool]
) -> Callable[..., Any]:
    """The method, which throws where some sequence of the batch is such."""

    def failing(self: Any, *args: Any) -> Any:
        if any(fails(sequence) for each in args if isinstance(each, list) for sequence in each):
            raise error()
        return method(self, *args)

    return failing


ERRORS: list[Callable[[], Exception]] = [
    lambda: RuntimeError("shape '[3]' is invalid\nC++ stack: ..."),
    lambda: IndexError("index out of range in self"),
    lambda: MemoryError(),
    lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    lambda: RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 99 bytes"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda make: type(make()).__name__)
@pytest.mark.parametrize("where", ["forward", "sample"])
def test_a_sequence_that_no_step_can_take_fails_alone(
    driver: Driver,
    alone: Collected,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    error: Callable[[], Exception],
) -> None:
    """From its third token on, say, as of a token for which the model raises."""
    owner: Any = ModelRunner if where == "forward" else Sampler

    def is_bad(sequence: Sequence) -> bool:
        return "bad" in sequence.id and sequence.num_output > 2

    monkeypatch.setattr(owner, where, failing_for(getattr(owner, where), error, is_bad))
    good, bad = four(driver, sound("bad-1"), sound("bad-2", temperature=1.0))
    assert good == [alone] * 4
    for each in bad:
        assert each.finish_reason == "error"
        assert len(each.token_ids) == 3
        assert type(error()).__name__ in (each.error or "")
        assert "\n" not in (each.error or "")
        assert re.search("operator", each.error or ""), "says what to do"
    assert driver.engine.stats().running == 0


@pytest.mark.parametrize("most", [64, 7])
def test_what_has_no_memory_together_is_computed_apart(
    driver: Driver, alone: Collected, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    """In halves of the batch, and in halves of a chunk: nobody fails who has room alone."""
    long = request("long", prompt(150), max_tokens=5, ignore_eos=True)
    expected = driver.run_one(long)
    forward, sizes = ModelRunner.forward, []

    def tight(self: ModelRunner, batch: list[Sequence], *args: Any) -> Any:
        tokens = sum(sequence.num_scheduled for sequence in batch)
        if tokens > most:
            raise torch.OutOfMemoryError("out of memory")
        sizes.append(tokens)
        return forward(self, batch, *args)

    monkeypatch.setattr(ModelRunner, "forward", tight)
    before = driver.engine.stats().prompt_tokens
    good, (result,) = four(driver, long)
    assert result == expected
    assert good == [alone] * 4
    assert max(sizes) <= most
    assert driver.engine.stats().prompt_tokens - before == 150 + 4 * 20


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_distribution_fail_their_own_row(
    driver: Driver, alone: Collected, monkeypatch: pytest.MonkeyPatch, value: float, temperature: float
) -> None:
    forward = ModelRunner.forward

    def broken(self: ModelRunner, *args: Any) -> Any:
        logits, sampled = forward(self, *args)
        for row, sequence in zip(logits, sampled, strict=True):
            if "bad" in sequence.id:
                row[:] = value
        return logits, sampled

    monkeypatch.setattr(ModelRunner, "forward", broken)
    good, (bad,) = four(driver, sound("bad", temperature=temperature, top_p=0.5))
    assert good == [alone] * 4
    assert bad.finish_reason == "error"
    assert not bad.is_refused
    assert "dtype" in (bad.error or "") or "damaged" in (bad.error or "")


def test_a_request_that_leaves_nothing_to_draw_is_to_blame_itself(driver: Driver, alone: Collected) -> None:
    everything = tuple(range(300))
    good, (bad,) = four(driver, sound("bad", min_tokens=5, stop_token_ids=everything))
    assert good == [alone] * 4
    assert bad.is_refused
    assert "min_tokens" in (bad.error or "")
    assert driver.run_one(request("worse", [1, 10**6])).is_refused


def test_a_sequence_that_cannot_take_its_token_fails_alone(
    driver: Driver, alone: Collected, monkeypatch: pytest.MonkeyPatch
) -> None:
    append = Sequence.append

    def failing(self: Sequence, token: int) -> None:
        if self.id == "bad" and self.num_output == 3:
            raise MemoryError
        append(self, token)

    monkeypatch.setattr(Sequence, "append", failing)
    good, (bad,) = four(driver, sound("bad"))
    assert good == [alone] * 4
    assert (bad.finish_reason, len(bad.token_ids)) == ("error", 3)


def test_when_no_step_can_be_scheduled_all_fail_and_the_next_are_served(
    driver: Driver, alone: Collected, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Running ones and waiting ones."""
    schedule = Scheduler.schedule

    def failing(self: Scheduler) -> Any:
        batch = schedule(self)
        if any(sequence.num_output == 5 for sequence in batch):
            raise KeyError("7")
        return batch

    with monkeypatch.context() as patch:
        patch.setattr(Scheduler, "schedule", failing)
        results = driver.run(*(sound(f"{i}") for i in range(12)))
    assert {each.finish_reason for each in results} == {"error"}
    assert 0 < sum(bool(each.token_ids) for each in results) <= 8
    assert driver.engine.stats().running == driver.engine.stats().waiting == 0
    assert driver.run_one(sound("after")) == alone


def test_a_sequence_cancelled_while_its_step_fails_gets_no_output(
    driver: Driver, alone: Collected, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = ModelRunner.forward

    def failing(self: ModelRunner, batch: list[Sequence], *args: Any) -> Any:
        if any(sequence.id == "gone" and sequence.num_output > 2 for sequence in batch):
            driver.engine.cancel(["gone"])
            raise RuntimeError("in a step")
        return forward(self, batch, *args)

    monkeypatch.setattr(ModelRunner, "forward", failing)
    driver.engine.add([sound("gone")])
    assert driver.run(sound("a"), sound("b")) == [alone] * 2
    driver.wait_until(lambda: driver.engine.stats().running == 0)
    assert driver.sequences["gone"].finish_reason is None
    monkeypatch.undo()
    assert driver.run_one(sound("gone")) == alone


@pytest.mark.parametrize(
    ("error", "lost", "no_memory"),
    [
        (torch.AcceleratorError("CUDA error: device-side assert triggered"), True, False),
        (torch.OutOfMemoryError("CUDA out of memory"), False, True),
        (RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED"), False, False),
        (MemoryError(), False, True),
    ],
)
def test_what_an_exception_means(error: Exception, lost: bool, no_memory: bool) -> None:
    assert (failures.is_device_lost(error), failures.is_out_of_memory(error)) == (lost, no_memory)


def test_cuda_without_memory_is_not_lost() -> None:
    error = torch.AcceleratorError("CUDA error: out of memory")
    error.error_code = failures.CUDA_OUT_OF_MEMORY
    assert failures.is_out_of_memory(error)
    assert not failures.is_device_lost(error)


@pytest.mark.parametrize("breaks", ["on_step", "step"])
@pytest.mark.parametrize("hears", [True, False], ids=["", "to nobody who listens"])
def test_what_loses_tokens_ends_the_engine(
    folder: Path, monkeypatch: pytest.MonkeyPatch, breaks: str, hears: bool
) -> None:
    """Outputs that were not taken, or a step that broke off: going on would leave a gap in a stream."""
    failed: list[BaseException] = []

    def on_step(outputs: StepOutput) -> None:
        if breaks == "on_step":
            raise RuntimeError("nobody takes it")

    def on_failure(error: BaseException) -> None:
        failed.append(error)
        if not hears:
            raise RuntimeError("the loop is closed")

    def broken(self: EngineCore, *args: Any) -> Any:
        raise RuntimeError("nobody takes it")

    engine = TransformersEngine(EngineConfig(model=str(folder), threads=1, kv_cache_memory=0.1))
    with monkeypatch.context() as patch:
        if breaks == "step":
            patch.setattr(EngineCore, "_postprocess", broken)
        if not hears:
            patch.setattr("threading.excepthook", lambda args: None)
        engine.start(on_step, on_failure)
        engine.add([sound("a")])
        assert engine._thread is not None
        engine._thread.join(60)
    assert [str(error) for error in failed] == ["nobody takes it"]
    with pytest.raises(EngineError, match="nobody takes it"):
        engine.add([sound("b")])
    engine.close()
