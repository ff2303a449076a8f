"""Several pods that take turns: a client's next call goes to another one than the last."""

from itertools import cycle
from typing import Generic, TypeVar

T = TypeVar("T")


class Turns(Generic[T]):
    """Clients of the pods, one after the other."""

    def __init__(self, *clients: T) -> None:
        self._clients = cycle(clients)

    @property
    def next(self) -> T:
        """The client of the pod whose turn it is."""
        return next(self._clients)
