"""Small tensors on their way from the device to the host."""

from typing import Protocol

import torch
from torch import Tensor


class HostCopy(Protocol):
    """One copy at a time: what is done between `start` and `wait` goes on beside it."""

    def start(self, tensor: Tensor) -> None:
        """[n], integers. It may be overwritten by whatever the device does next."""

    def wait(self) -> list[int]:
        """What was in it when the device got there."""


class CpuCopy:
    """There is no way to go."""

    def __init__(self) -> None:
        self._values: list[int] = []

    def start(self, tensor: Tensor) -> None:
        self._values = tensor.tolist()

    def wait(self) -> list[int]:
        return self._values


class CudaCopy:
    """Into pinned memory, to which a GPU writes by itself, with an event behind it. A copy into other memory
    holds the host up until everything before it is computed."""

    def __init__(self) -> None:
        self._pinned = torch.empty(0, dtype=torch.int64)
        self._count = 0
        self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def start(self, tensor: Tensor) -> None:
        self._count = len(tensor)
        if len(self._pinned) < self._count:
            self._pinned = torch.empty(2 * self._count, dtype=torch.int64, pin_memory=True)
        self._pinned[: self._count].copy_(tensor, non_blocking=True)
        self._arrived.record()

    def wait(self) -> list[int]:
        self._arrived.synchronize()
        return self._pinned[: self._count].tolist()


def host_copy(device: torch.device) -> HostCopy:
    return CudaCopy() if device.type == "cuda" else CpuCopy()
