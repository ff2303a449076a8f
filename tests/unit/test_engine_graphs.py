"""Decoding as recorded says what the model says, at every size of the batch, and harms nobody's memory."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llmboost_worker.engine.transformers import EngineConfig, ready
from llmboost_worker.engine.transformers.cache import KeyValueCache, LayerShape
from llmboost_worker.engine.transformers.forward import Forward, ModelForward
from llmboost_worker.engine.transformers.graphs import DecodeGraphs, sizes, widths
from llmboost_worker.engine.transformers.layout import StepLayout
from llmboost_worker.engine.transformers.loader import LoadedModel
from llmboost_worker.engine.transformers.torch_backend import TorchBackend
from tests.unit.engine_configs import CONFIGS, FAMILIES
from tests.unit.engine_models import driving, prompt, request, save_model


class Tape:
    """Records as a GPU does: what was computed from Python objects is fixed; only what is in tensors is read
    again. It can't do that, so it runs the work anew, and writes into the tensor of the first time."""

    def __init__(self) -> None:
        self.recorded: list[int] = []
        self.replayed: list[int] = []

    def __call__(self, work: Callable[[], Tensor]) -> Callable[[], Tensor]:
        work()
        out = work().clone()
        self.recorded.append(len(out))

        def replay() -> Tensor:
            self.replayed.append(len(out))
            out.copy_(work())
            return out

        return replay


class Broken(Tape):
    def __call__(self, work: Callable[[], Tensor]) -> Callable[[], Tensor]:
        self.recorded.append(0)
        raise RuntimeError("operation not permitted when stream is capturing")


@pytest.fixture(params=["llama", "gemma3", "gpt-oss"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return save_model({**CONFIGS, **FAMILIES}[request.param], tmp_path, spread=0.1)


@pytest.fixture
def recording(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Tape], None]]:
    """Makes engines record on that tape, around transformers' own forward, as on a GPU."""

    def use(tape: Tape) -> None:
        def forward(config: EngineConfig, loaded: LoadedModel, cache: KeyValueCache) -> Forward:
            graphs = DecodeGraphs(loaded.forward, cache, tape, config.max_num_seqs, loaded.max_model_len)
            graphs.record()
            return graphs

        def unpacked(loaded: LoadedModel, quantization: str) -> bool:
            loaded.forward = ModelForward(loaded.model, TorchBackend())
            return False

        monkeypatch.setattr(ready, "forward", forward)
        monkeypatch.setattr(ready.packing, "pack", unpacked)

    return use


REQUESTS = [
    request(f"{i}", prompt(length), max_tokens=20 + 10 * i, ignore_eos=True)
    for i, length in enumerate((1, 3, 5, 7, 9))
]
"""They begin in one step, and end one after the other."""


def run(folder: Path) -> list[list[int]]:
    options: dict[str, Any] = {"max_num_batched_tokens": 48, "max_num_seqs": 5}
    with driving(folder, **options) as driver:
        return [result.token_ids for result in driver.run(*REQUESTS)]


def test_batches_that_decode_are_replayed_and_say_the_same(
    folder: Path, recording: Callable[[Tape], None]
) -> None:
    expected, tape = run(folder), Tape()
    recording(tape)
    assert run(folder) == expected
    assert sorted(set(tape.replayed)) == [1, 2, 4, 5], "a size wasn't tested"
    assert tape.recorded[:4] == [5, 4, 2, 1], "the largest first"


def test_what_cannot_be_recorded_is_computed_as_before(
    folder: Path, recording: Callable[[Tape], None], caplog: pytest.LogCaptureFixture
) -> None:
    expected, tape = run(folder), Broken()
    recording(tape)
    assert run(folder) == expected
    assert (len(tape.recorded), tape.replayed) == (1, []), "it was tried again"
    assert "decoding isn't recorded as CUDA graphs" in caplog.text


class Watched:
    """A forward that does nothing, and keeps the layout that it was recorded with."""

    backend = TorchBackend()

    def __init__(self) -> None:
        self.inputs: list[tuple[Tensor, StepLayout]] = []

    def __call__(
        self, ids: Tensor, layout: StepLayout, cache: KeyValueCache, rows: Tensor | None = None
    ) -> Tensor:
        self.inputs.append((ids, layout))
        return ids[:, None].float()


def test_what_a_larger_batch_left_behind_is_gone_from_the_next() -> None:
    """Its blocks above all: they may hold NaN, and that times a weight of 0 is NaN."""
    cache = KeyValueCache([LayerShape(1, 2, 2)], 8, 16, torch.float32, torch.device("cpu"))
    forward = Watched()
    graphs = DecodeGraphs(forward, cache, Tape(), 4, 256)  # type: ignore[arg-type]
    for count, blocks in ((4, 3), (3, 2)):
        starts, rows = np.full(count, 16 * blocks - 1), np.ones(count, dtype=np.int64)
        tables = np.full((count, blocks), 5, dtype=np.int32)
        layout = StepLayout.build(starts, rows, tables, 16, torch.device("cpu"))
        logits = graphs(torch.full((count,), 7), layout, cache)
        assert logits.tolist() == [[7.0]] * count
    ids, layout = forward.inputs[-1]
    assert ids.tolist() == [7, 7, 7, 0]
    assert layout.lengths.tolist() == [32, 32, 32, 1]
    assert layout.positions.tolist() == [31, 31, 31, 0]
    assert layout.slots.tolist() == [5 * 16 + 15] * 3 + [8 * 16]
    assert layout.block_tables.tolist() == [[5, 5, *[0] * 6]] * 3 + [[8] * 8]
    assert cache.scratch == 8


def test_sizes_and_widths() -> None:
    assert sizes(40) == [1, 2, 4, 8, 16, 24, 32, 40]
    assert sizes(13) == [1, 2, 4, 8, 13]
    assert (sizes(4), sizes(3), sizes(1)) == ([1, 2, 4], [1, 2, 3], [1])
    assert (widths(100), widths(8), widths(3)) == ([8, 16, 32, 64, 100], [8], [3])
