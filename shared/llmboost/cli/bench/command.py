"""`llmboost bench` from its arguments to its exit code."""

import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from llmboost.cli.bench import report
from llmboost.cli.bench.options import STANDARD, parse
from llmboost.cli.flags import UsageError

INTERRUPTED = 130

Place = TypeVar("Place", str, Path)


def run_command(argv: Sequence[str]) -> int:
    """Runs a command line without its first word, `bench`; returns its exit code.

    Raises:
        UsageError: the arguments are wrong.
    """
    options = parse(argv)
    others = [report.read(source) for source in options.compare]
    draw = None if options.plot is None else _plotter()
    from llmboost.cli.bench import table
    from llmboost.cli.bench.progress import progress
    from llmboost.cli.bench.run import measure
    from llmboost.cli.bench.target import TargetError

    if threading.current_thread() is threading.main_thread():
        # Whoever runs this for a user, and wants it to end, means the same as Ctrl-C.
        signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        with progress() as shown:
            found = measure(options, shown)
    except TargetError as error:
        print(f"llmboost bench: error: {error}", file=sys.stderr)
        return 1
    if not found["points"]:
        print("llmboost bench: no request had ended", file=sys.stderr)
        return INTERRUPTED
    is_written = True
    if options.json is not None:
        is_written &= _written("--json", options.json, lambda place: report.write(found, place))
    if draw is not None and options.plot is not None:
        is_written &= _written("--plot", options.plot, lambda place: draw([found, *others], place))
    if options.json == STANDARD:
        for line in table.remarks(found):
            print(line, file=sys.stderr)
    else:
        table.show([found, *others], table.console())
    if found["interrupted"]:
        return INTERRUPTED
    return 0 if is_written and any(point["requests"]["ok"] for point in found["points"]) else 1


def _written(flag: str, place: Place, write: Callable[[Place], None]) -> bool:
    """Whether it could be written; says why not, for what has been measured is to be shown all the same."""
    try:
        write(place)
    except OSError as error:
        why = error.strerror or error
        print(f"llmboost bench: error: {flag} {str(place)!r} can't be written: {why}", file=sys.stderr)
        return False
    return True


def _plotter() -> Callable[[Sequence[dict[str, Any]], Path], None]:
    """What draws, if it can: said before anything is measured."""
    try:
        from llmboost.cli.bench.plot import draw
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("llmboost"):
            raise
        raise UsageError(
            f"--plot needs the package {error.name!r}: pip install 'llmboost[bench]' brings it"
        ) from None
    return draw
