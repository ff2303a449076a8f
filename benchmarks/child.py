"""A side of a comparison in a process of its own, which keeps what it has loaded between rounds.

Two sides in one process would disturb each other: the second thread to run torch has an OpenMP pool of its
own, and is slower for it.
"""

import multiprocessing
import os
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

Runner = Callable[..., Any]


class Child:
    """Runs one thing at a time: what it was made for, with new arguments."""

    def __init__(
        self, make: Callable[..., Runner], *, env: Mapping[str, str] | None = None, **arguments: Any
    ) -> None:
        """`make` is called there, once, and returns what runs. It is sent by name: a function of a module.
        `env`: set before anything is imported there."""
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, env or {}, make, arguments), daemon=True)
        self._process.start()
        theirs.close()

    def run(self, **work: Any) -> Any:
        """What comes of it.

        Raises:
            RuntimeError: it failed there; says how.
        """
        self._pipe.send(work)
        try:
            result, failure = self._pipe.recv()
        except EOFError:
            raise RuntimeError("the process has ended by itself") from None
        if failure is not None:
            raise RuntimeError(failure)
        return result

    def __enter__(self) -> "Child":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pipe.close()
        self._process.join(timeout=10)
        self._process.kill()


def _serve(
    pipe: Connection, env: Mapping[str, str], make: Callable[..., Runner], arguments: dict[str, Any]
) -> None:
    os.environ.update(env)
    from transformers.utils import logging

    logging.disable_progress_bar()
    runner: Runner | None = None
    while True:
        try:
            work = pipe.recv()
        except EOFError:
            os._exit(0)  # at once: nobody needs what torch would take apart in seconds
        try:
            runner = runner or make(**arguments)
            pipe.send((runner(**work), None))
        except Exception as error:
            pipe.send((None, f"{type(error).__name__}: {error}"))
