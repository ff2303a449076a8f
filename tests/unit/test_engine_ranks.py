"""A model split over processes says what it says in one, and none of them outlives the others."""

import os
import signal
from collections import deque
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llmboost_worker.engine.interface import EngineError
from llmboost_worker.engine.transformers import EngineConfig, TransformersEngine, failures
from llmboost_worker.engine.transformers.attention.layout import StepLayout
from llmboost_worker.engine.transformers.cache import KeyValueCache, LayerShape
from llmboost_worker.engine.transformers.loading import architecture
from llmboost_worker.engine.transformers.ranks import Leader, Message, Place, RankLost, compute_with
from tests.unit.engine_configs import CONFIGS, FAMILIES
from tests.unit.engine_models import POISON, driving, prompt, request, save_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(CONFIGS["qwen3"], tmp_path_factory.mktemp("qwen3"), spread=0.1, poison=POISON)


def exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_two_processes_say_what_one_says_and_end_together(folder: Path) -> None:
    """Chunks, decoding, sampling, a sequence that fails and leaves NaN behind. In the end one is killed."""
    requests = [
        *(request(f"{i}", prompt(length), max_tokens=12) for i, length in enumerate((3, 20, 70))),
        request("drawn", prompt(9), max_tokens=12, temperature=1.0, seed=7),
        request("poisoned", [*prompt(40), POISON], max_tokens=12),
    ]
    options: dict[str, Any] = {"max_num_batched_tokens": 32, "max_num_seqs": 4, "kv_cache_memory": 0.01}
    with driving(folder, **options) as driver:
        alone = [result.token_ids for result in driver.run(*requests)]
        again = [result.token_ids for result in driver.run(*requests)]
    with driving(folder, tp=2, **options) as driver:
        assert [result.token_ids for result in driver.run(*requests)] == alone
        assert [result.token_ids for result in driver.run(*requests)] == again
        followers = driver.engine._followers
        assert followers is not None
        (child,) = followers._children
        assert child.pid is not None
        os.kill(child.pid, signal.SIGTERM)  # as a whole process group is told to go: it leaves that to rank 0
        assert driver.run(requests[0])[0].token_ids == alone[0]
        os.kill(child.pid, signal.SIGKILL)
        driver.wait(lambda: driver.failures)
        assert "rank 1 of the model has died" in str(driver.failures[0])
    assert len(driver.failures) == 1
    driver.wait_until(lambda: not exists(child.pid))


class Line:
    """Ranks in one process: what is sent is received later."""

    def __init__(self) -> None:
        self.messages: deque[Message | None] = deque()

    def send(self, message: Message | None) -> None:
        self.messages.append(message)

    def receive(self) -> Message | None:
        return self.messages.popleft()


class Recorder:
    """A forward that keeps what it was given."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __call__(self, ids: Tensor, layout: StepLayout, cache: KeyValueCache, rows: Tensor | None) -> Tensor:
        if not len(ids):
            raise RuntimeError("out of memory")
        wanted = None if rows is None else rows.tolist()
        plain = (layout.query_starts, layout.lengths, layout.block_tables, layout.slots, layout.positions)
        self.calls.append((ids.tolist(), [tensor.tolist() for tensor in plain], layout.num_single, wanted))
        return ids


def layout() -> StepLayout:
    starts, rows = torch.tensor([20, 3]).numpy(), torch.tensor([1, 5]).numpy()
    tables = torch.tensor([[4, 2], [7, 0]], dtype=torch.int32).numpy()
    return StepLayout.build(starts, rows, tables, 16, torch.device("cpu"))


def test_every_rank_computes_what_the_first_one_computes() -> None:
    line, mine, theirs = Line(), Recorder(), Recorder()
    caches = [
        KeyValueCache([LayerShape(1, 2, 2)], 8, 16, torch.float32, torch.device("cpu")) for _ in range(2)
    ]
    for cache in caches:
        cache.keys[0].fill_(7.0)
    leader = Leader(line, mine, caches[0])  # type: ignore[arg-type]
    leader(torch.arange(6), layout(), caches[0], torch.tensor([0, 5]))
    leader(torch.arange(6), layout(), caches[0])
    leader.clear([3, 5])
    line.send(None)
    compute_with(line, theirs, caches[1], torch.device("cpu"))  # type: ignore[arg-type]
    assert theirs.calls == mine.calls
    assert mine.calls[0][3] == [0, 5]
    assert torch.equal(caches[0].keys[0], caches[1].keys[0])
    assert caches[1].keys[0].flatten(1).sum(1).ne(0).tolist() == [block not in (3, 5) for block in range(9)]


def test_a_step_that_fails_on_one_rank_ends_the_engine() -> None:
    """The others stand in the middle of a layer, and wait for it."""
    leader = Leader(Line(), Recorder(), None)  # type: ignore[arg-type]
    with pytest.raises(RankLost, match=r"rank 0 failed in a step \(RuntimeError: out of memory") as caught:
        leader(torch.arange(0), layout(), None)  # type: ignore[arg-type]
    assert failures.is_device_lost(caught.value)


def test_torchrun_says_which_process_one_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Place.given() is None
    place = Place(rank=3, local_rank=1, size=4, address="10.0.0.7", port=29500)
    for name, value in place.environment().items():
        monkeypatch.setenv(name, value)
    assert Place.given() == place


def test_as_many_processes_as_tp_says(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in Place(0, 0, 4, "127.0.0.1", 29500).environment().items():
        monkeypatch.setenv(name, value)
    engine = TransformersEngine(EngineConfig(model=str(folder), tp=2))
    with pytest.raises(EngineError, match=r"torchrun has started 4 processes, but --tp is 2"):
        engine.start(lambda outputs: None, lambda error: None)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (CONFIGS["gpt2"], r"'gpt2' models: --tp is 2, and transformers has no plan"),
        (FAMILIES["one-key-head"], r"--tp is 2, but 'llama' has 1 num_key_value_heads"),
    ],
    ids=["no plan", "too few heads"],
)
def test_what_cannot_be_split_is_refused(config: Any, words: str) -> None:
    with pytest.raises(EngineError, match=words):
        architecture.check_split(config.model_type, config, 2)


def test_one_device_for_two_ranks_is_refused() -> None:
    with pytest.raises(ValueError, match=r"device is 'cuda:1', but tp is 2"):
        EngineConfig("m", device="cuda:1", tp=2)
    with pytest.raises(ValueError, match=r"quantization is 'int8', but tp is 2"):
        EngineConfig("m", quantization="int8", tp=2)
