"""Tensor parallelism: several processes with a part of every layer each. The first, rank 0, decides what is
computed, and the others compute it with it.

What is to be computed travels as plain data from rank 0 to all, so nobody but rank 0 knows of sequences,
sampling or clients. Sums over the ranks are transformers' own affair (`tp_plan`), by gloo on CPUs and NCCL on
GPUs. A rank that dies takes the others with it: a sum without it can't be had.
"""

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from llmboost_worker.engine.interface import EngineError
from llmboost_worker.engine.transformers.attention.backend import AttentionBackend, Formula
from llmboost_worker.engine.transformers.attention.layout import StepLayout
from llmboost_worker.engine.transformers.cache import KeyValueCache
from llmboost_worker.engine.transformers.failures import RankLost
from llmboost_worker.engine.transformers.forward import Forward

FOREVER = timedelta(days=3650)
"""Ranks wait for the next step as long as there are no requests. That one has died they notice otherwise: its
connection breaks."""


@dataclass(frozen=True, slots=True)
class Place:
    """Of a process among the ranks of its engine."""

    rank: int
    local_rank: int
    """On its machine: which of the GPUs is its own."""
    size: int
    address: str
    port: int

    @classmethod
    def given(cls) -> "Place | None":
        """As torchrun says it, if it started this process."""
        if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
            return None
        rank = int(os.environ["RANK"])
        return cls(
            rank,
            int(os.environ.get("LOCAL_RANK", rank)),
            int(os.environ["WORLD_SIZE"]),
            os.environ.get("MASTER_ADDR", "127.0.0.1"),
            int(os.environ["MASTER_PORT"]),
        )

    def environment(self) -> dict[str, str]:
        """As torchrun says it; transformers reads it too."""
        return {
            "RANK": str(self.rank),
            "LOCAL_RANK": str(self.local_rank),
            "WORLD_SIZE": str(self.size),
            "MASTER_ADDR": self.address,
            "MASTER_PORT": str(self.port),
        }


@dataclass(frozen=True, slots=True)
class Compute:
    """A forward."""

    ids: NDArray[np.int64]
    """[T]"""
    starts: NDArray[np.int64]
    """[S]: tokens that are in the cache."""
    rows: NDArray[np.int64]
    """[S]"""
    tables: NDArray[np.int32]
    """[S, most blocks]"""
    wanted: NDArray[np.int64] | None
    """[n]: the rows whose logits are wanted; None: all."""


@dataclass(frozen=True, slots=True)
class Clear:
    """Blocks that are to be zeroed."""

    blocks: list[int]


Message = Compute | Clear
"""Or None: the engine has closed."""


class Ranks:
    """This process's connection to the others."""

    def __init__(self, place: Place, device: torch.device) -> None:
        """Waits for the others.

        Raises:
            EngineError: they don't come.
        """
        self.place = place
        os.environ.update(place.environment())
        try:
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                init_method=f"tcp://{place.address}:{place.port}",
                rank=place.rank,
                world_size=place.size,
            )
            self._messages = dist.new_group(backend="gloo", timeout=FOREVER)
        except (RuntimeError, ValueError) as error:
            self.leave()
            raise EngineError(f"the {place.size} ranks of --tp {place.size} don't meet: {error}") from error

    @property
    def leads(self) -> bool:
        return self.place.rank == 0

    def send(self, message: Message | None) -> None:
        """From rank 0 to all others.

        Raises:
            RankLost
        """
        self._broadcast([message])

    def receive(self) -> Message | None:
        """What rank 0 sends next.

        Raises:
            RankLost
        """
        box: list[Any] = [None]
        self._broadcast(box)
        message: Message | None = box[0]
        return message

    def fewest(self, number: int) -> int:
        """The smallest of the numbers that all ranks come with."""
        numbers = torch.tensor([number], dtype=torch.int64)
        dist.all_reduce(numbers, dist.ReduceOp.MIN, group=self._messages)
        return int(numbers)

    def leave(self) -> None:
        """Idempotent."""
        if dist.is_initialized():
            dist.destroy_process_group()
        for name in self.place.environment():
            os.environ.pop(name, None)

    def _broadcast(self, box: list[Any]) -> None:
        try:
            dist.broadcast_object_list(box, src=0, group=self._messages)
        except RuntimeError as error:
            raise RankLost(f"a rank has died: {error}") from error


class Leader:
    """A `Forward` of rank 0: all ranks compute what it computes."""

    def __init__(self, ranks: Ranks, forward: Forward, cache: KeyValueCache) -> None:
        self._ranks, self._forward, self._cache = ranks, forward, cache

    @property
    def backend(self) -> AttentionBackend:
        return self._forward.backend

    def __call__(
        self, ids: Tensor, layout: StepLayout, cache: KeyValueCache, rows: Tensor | None = None
    ) -> Tensor:
        """
        Raises:
            RankLost: also if only this rank failed, since the others wait for it in the middle of a layer.
        """
        wanted = None if rows is None else rows.cpu().numpy()
        starts = layout.ends - layout.rows
        self._ranks.send(Compute(ids.cpu().numpy(), starts, layout.rows, layout.tables, wanted))
        try:
            return self._forward(ids, layout, cache, rows)
        except Exception as error:
            raise RankLost(f"rank 0 failed in a step ({type(error).__name__}: {error})") from error

    def formula(self, layer: int, asked: Formula) -> Formula:
        return self._forward.formula(layer, asked)

    def clear(self, blocks: list[int]) -> None:
        """Zeroes them on all ranks."""
        self._ranks.send(Clear(blocks))
        self._cache.clear(blocks)


def compute_with(ranks: Ranks, forward: Forward, cache: KeyValueCache, device: torch.device) -> None:
    """Computes with rank 0 until its engine closes.

    Raises:
        RankLost: rank 0 has died.
    """
    while (message := ranks.receive()) is not None:
        if isinstance(message, Clear):
            cache.clear(message.blocks)
            continue
        layout = StepLayout.build(message.starts, message.rows, message.tables, cache.block_size, device)
        wanted = None if message.wanted is None else torch.from_numpy(message.wanted).to(device)
        forward(torch.from_numpy(message.ids).to(device), layout, cache, wanted)
