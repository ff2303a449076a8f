"""Where the rows of one step belong: which sequence, which positions, which blocks. Built once per step, read
by every layer."""

from collections.abc import Sequence as Rows
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmboost_worker.engine.transformers.blocks import NOBODYS, BlockTable


class Scheduled(Protocol):
    """Of a sequence, what a step needs to know."""

    @property
    def num_cached(self) -> int: ...

    @property
    def num_scheduled(self) -> int: ...

    @property
    def table(self) -> BlockTable: ...


@dataclass(slots=True)
class StepLayout:
    """S sequences with T rows (tokens) in all: first the sequences that have one row, which are the decoding
    ones, then chunks of prompts. As flash-attention and vLLM have it."""

    query_starts: Tensor
    """[S + 1], int32: sequence i has the rows [query_starts[i], query_starts[i + 1])."""
    lengths: Tensor
    """[S], int32: tokens to attend to, this step's rows included."""
    block_tables: Tensor
    """[S, most blocks], int32, padded with nobody's block."""
    slots: Tensor
    """[T], int64: where each row's key and value go, as block * block_size + offset."""
    positions: Tensor
    """[T], int64: where each row's token stands in its sequence."""
    num_single: int
    """Sequences of one row."""
    rows: NDArray[np.int64]
    """[S], on the host: rows of each sequence."""
    ends: NDArray[np.int64]
    """[S], on the host: `lengths`."""
    tables: NDArray[np.int32]
    """[S, most blocks], on the host: `block_tables`."""
    is_static: bool = False
    """Recorded once and computed many times: only the tensors count, and all sequences have one row."""
    plans: dict[Any, Any] = field(default_factory=dict)
    """What a backend has worked out from all this; layers share it."""

    @classmethod
    def of(cls, sequences: Rows[Scheduled], block_size: int, device: torch.device) -> "StepLayout":
        """`sequences`: those with one row first."""
        count = len(sequences)
        starts = np.fromiter((sequence.num_cached for sequence in sequences), np.int64, count)
        rows = np.fromiter((sequence.num_scheduled for sequence in sequences), np.int64, count)
        used = -(-(starts + rows) // block_size)
        tables = np.full((count, int(used.max())), NOBODYS, dtype=np.int32)
        for table, sequence, blocks in zip(tables, sequences, used.tolist(), strict=True):
            table[:blocks] = sequence.table.blocks[:blocks]
        return cls.build(starts, rows, tables, block_size, device)

    @classmethod
    def build(
        cls,
        starts: NDArray[np.int64],
        rows: NDArray[np.int64],
        tables: NDArray[np.int32],
        block_size: int,
        device: torch.device,
    ) -> "StepLayout":
        """
        Args:
            starts: [S], tokens in the cache
            rows: [S]; those of one row first
            tables: [S, most blocks]
        """
        count, ends = len(rows), starts + rows
        query_starts = np.zeros(count + 1, dtype=np.int64)
        np.cumsum(rows, out=query_starts[1:])
        owner = np.repeat(np.arange(count), rows)
        positions = np.arange(int(query_starts[-1])) + (starts - query_starts[:-1])[owner]
        slots = tables[owner, positions // block_size].astype(np.int64) * block_size + positions % block_size
        return cls(
            query_starts=torch.from_numpy(query_starts.astype(np.int32)).to(device),
            lengths=torch.from_numpy(ends.astype(np.int32)).to(device),
            block_tables=torch.from_numpy(tables).to(device),
            slots=torch.from_numpy(slots).to(device),
            positions=torch.from_numpy(positions).to(device),
            num_single=int((rows == 1).sum()),
            rows=rows,
            ends=ends,
            tables=tables,
        )

    def head(self, count: int) -> "StepLayout":
        """That of the first sequences, which have one row each."""
        return StepLayout(
            query_starts=self.query_starts[: count + 1],
            lengths=self.lengths[:count],
            block_tables=self.block_tables[:count],
            slots=self.slots[:count],
            positions=self.positions[:count],
            num_single=count,
            rows=self.rows[:count],
            ends=self.ends[:count],
            tables=self.tables[:count],
        )

    def tail(self, first: int) -> "StepLayout":
        """That of the sequences from `first` on, with their rows alone."""
        row = int(self.rows[:first].sum())
        return StepLayout(
            query_starts=self.query_starts[first:] - row,
            lengths=self.lengths[first:],
            block_tables=self.block_tables[first:],
            slots=self.slots[row:],
            positions=self.positions[row:],
            num_single=max(0, self.num_single - first),
            rows=self.rows[first:],
            ends=self.ends[first:],
            tables=self.tables[first:],
        )
