"""A server of one's own, for one run: where nothing is served yet."""

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pydantic import ValidationError

from llmboost.cli.flags import UsageError, explain
from llmboost.processes import Processes
from llmboost.settings import ServeSettings


@contextmanager
def private_server(model: str, api_key: str | None) -> Iterator[Processes]:
    """A server with this model, which nobody else knows of; it is gone afterwards, with all that it kept.

    Variables are its settings, but for where it is and what it keeps.

    Raises:
        UsageError: a variable is wrong.
        ProcessesError: it can't be started; says why.
    """
    with tempfile.TemporaryDirectory(prefix="llmboost-batch-") as folder:
        given: dict[str, Any] = {
            "model": model,
            "host": "127.0.0.1",
            "port": 0,
            "redis_url": None,
            "data_dir": None,
            "files_url": folder,
        }
        if api_key:
            given["api_key"] = (api_key,)
        try:
            settings = ServeSettings(**given)
        except ValidationError as error:
            raise UsageError(explain(error, given)) from None
        processes = Processes(settings, log=_log)
        try:
            processes.start()
            yield processes
        finally:
            processes.stop()


def _log(line: str) -> None:
    """What the supervisor says; what the others do is theirs, unless they fail, and then it says so."""
    if line.startswith("[serve] "):
        print(line.removeprefix("[serve] "), file=sys.stderr)
