"""How far something is, on standard error: a bar in a terminal, now and then a line elsewhere."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
)

EVERY_S = 10.0
"""Between lines."""

Say = Callable[[str], None]
"""Prints a line as it is."""

T = TypeVar("T")


@contextmanager
def on_stderr(
    live: Callable[[Progress], T],
    lines: Callable[[Say], T],
    *columns: ProgressColumn,
    transient: bool = False,
) -> Iterator[T]:
    """What suits standard error: `live`, with a bar that `columns` follow, or `lines`."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lines(partial(console.print, markup=False, highlight=False, soft_wrap=True))
        return
    described = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(*described, *columns, console=console, transient=transient) as bars:
        yield live(bars)
