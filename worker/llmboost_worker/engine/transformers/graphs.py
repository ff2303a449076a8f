"""Decoding by CUDA graphs: what a GPU does for a batch is recorded once per size of the batch, and then
started by one call instead of some thousand.

A graph reads and writes the same memory each time, so each size has buffers of its own. A batch is padded to
the next size; its padding has a context of one token, in a block of its own: what the model makes of that
token may be no number, and nobody's block pads everyone's table.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from llmboost_worker.engine.transformers import failures
from llmboost_worker.engine.transformers.backend import AttentionBackend, Formula, StaticBackend
from llmboost_worker.engine.transformers.blocks import NOBODYS
from llmboost_worker.engine.transformers.cache import KeyValueCache
from llmboost_worker.engine.transformers.forward import Forward
from llmboost_worker.engine.transformers.layout import StepLayout

logger = logging.getLogger(__name__)

MIN_BLOCKS = 8
"""Width of the narrowest block table, where the width matters."""


class Capture(Protocol):
    """Records work on the device."""

    def __call__(self, work: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """`work` reads and writes the same memory in every call. What comes back does it again, and returns
        the same tensor every time."""


class CudaCapture:
    """All graphs share one pool of memory: they never run at the same time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Callable[[], Tensor]) -> Callable[[], Tensor]:
        # As torch's notes on CUDA graphs have it: first uncaptured, in a stream of its own, since kernels may
        # be chosen and workspaces made in the first calls.
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                work()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            out = work()

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay


@dataclass(slots=True)
class _Graph:
    """Of one size, with its buffers."""

    ids: Tensor
    layout: StepLayout
    replay: Callable[[], Tensor]


class DecodeGraphs:
    """A `Forward`: batches in which every sequence decodes by graphs, all others as before."""

    def __init__(
        self,
        forward: Forward,
        cache: KeyValueCache,
        capture: Capture,
        max_num_seqs: int,
        max_model_len: int,
    ) -> None:
        """`forward.backend` is a `StaticBackend`."""
        assert isinstance(forward.backend, StaticBackend)
        self._forward, self._cache, self._capture = forward, cache, capture
        self._sizes = sizes(max_num_seqs)
        longest = -(-max_model_len // cache.block_size)
        self._most_blocks = forward.backend.most_blocks
        self._widths = [longest] if self._most_blocks is None else widths(longest)
        self._graphs: dict[tuple[int, int], _Graph] = {}
        self._works = True

    @property
    def backend(self) -> AttentionBackend:
        return self._forward.backend

    def formula(self, layer: int, asked: Formula) -> Formula:
        return self._forward.formula(layer, asked)

    def record(self) -> None:
        """All sizes, the largest first, whose memory serves the smaller ones; of the widths only the least.
        Others are recorded when they are first needed."""
        for size in reversed(self._sizes):
            self._graph(size, self._widths[0])

    def __call__(
        self, ids: Tensor, layout: StepLayout, cache: KeyValueCache, rows: Tensor | None = None
    ) -> Tensor:
        count, blocks = layout.tables.shape
        graph = None
        if rows is None and count == layout.num_single == len(ids) <= self._sizes[-1]:
            size = next(size for size in self._sizes if size >= count)
            graph = self._graph(size, next(width for width in self._widths if width >= blocks))
        if graph is None:
            return self._forward(ids, layout, cache, rows)
        self._fill(graph, ids, layout)
        return graph.replay()[:count]

    def _graph(self, size: int, width: int) -> _Graph | None:
        """None: it would read too much, or can't be recorded, and so none will be."""
        if self._most_blocks is not None and size * width > self._most_blocks:
            return None
        if self._works and (size, width) not in self._graphs:
            ids, layout = self._buffers(size, width)

            def work() -> Tensor:
                layout.plans.clear()  # what a backend works out is part of the graph
                return self._forward(ids, layout, self._cache)

            try:
                self._graphs[size, width] = _Graph(ids, layout, self._capture(work))
            except Exception as error:
                if failures.is_device_lost(error):
                    raise
                logger.warning("decoding isn't recorded as CUDA graphs, and takes longer: %s", error)
                self._works = False
                self._graphs.clear()
        return self._graphs.get((size, width))

    def _buffers(self, size: int, width: int) -> tuple[Tensor, StepLayout]:
        """The inputs of a graph, all of it padding."""
        device = self._cache.keys[0].device
        layout = StepLayout.build(
            np.zeros(size, dtype=np.int64),
            np.ones(size, dtype=np.int64),
            np.full((size, width), self._cache.scratch, dtype=np.int32),
            self._cache.block_size,
            device,
        )
        layout.is_static = True
        return torch.zeros(size, dtype=torch.int64, device=device), layout

    def _fill(self, graph: _Graph, ids: Tensor, layout: StepLayout) -> None:
        """The batch first, padding after it."""
        count, blocks = layout.tables.shape
        mine = graph.layout
        pairs = (
            (graph.ids, ids, 0),
            (mine.positions, layout.positions, 0),
            (mine.slots, layout.slots, self._cache.scratch * self._cache.block_size),
            (mine.lengths, layout.lengths, 1),
        )
        for buffer, given, padding in pairs:
            buffer[:count].copy_(given)
            buffer[count:].fill_(padding)
        mine.block_tables[:count].fill_(NOBODYS)
        mine.block_tables[:count, :blocks].copy_(layout.block_tables)
        mine.block_tables[count:].fill_(self._cache.scratch)


def sizes(most: int) -> list[int]:
    """Of batches, up to `most`: small ones exactly, since a step of those takes no longer for the padding but
    there are the most of them; then every eighth."""
    small = [size for size in (1, 2, 4) if size < most]
    return [*small, *range(8, most, 8), most]


def widths(most: int) -> list[int]:
    """Of block tables: powers of two up to `most`."""
    steps = []
    width = MIN_BLOCKS
    while width < most:
        steps.append(width)
        width *= 2
    return [*steps, most]
