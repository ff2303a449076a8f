"""Which command of `llmboost batch` is meant, and what its failure looks like."""

import difflib
import json
import signal
import sys
import threading
from collections.abc import Callable, Sequence

from llmboost.cli.batch.options import USAGE, ServerOptions, parse_one, parse_run
from llmboost.cli.flags import UsageError

_SHOW = "Prints a batch, as the server describes it."
_CANCEL = "Ends a batch early. What is done stays done; the rest is reported as cancelled."


def run_command(argv: Sequence[str]) -> int:
    """Runs a command line without its first word, `batch`; returns its exit code."""
    command = argv[0] if argv else ""
    if command in ("", "help", "-h", "--help"):
        print(USAGE, end="")
        return 0 if argv else 2
    runners: dict[str, Callable[[Sequence[str]], int]] = {"run": _run, "show": _show, "cancel": _cancel}
    if command not in runners:
        close = difflib.get_close_matches(command, runners, 1)
        advice = f"did you mean {close[0]}?" if close else f"it is one of {', '.join(runners)}"
        raise UsageError(f"unknown command {command!r}: {advice}")
    try:
        return runners[command](argv[1:])
    except UsageError as error:
        print(f"llmboost batch {command}: error: {error}", file=sys.stderr)
        return 2


def _run(argv: Sequence[str]) -> int:
    options = parse_run(argv)
    from llmboost.cli.batch.run import run

    return _told(options.server, lambda: run(options))


def _show(argv: Sequence[str]) -> int:
    server, batch_id = parse_one("show", _SHOW, argv)
    return _told(server, lambda: _ask(server, batch_id, cancel=False))


def _cancel(argv: Sequence[str]) -> int:
    server, batch_id = parse_one("cancel", _CANCEL, argv)
    return _told(server, lambda: _ask(server, batch_id, cancel=True))


def _ask(options: ServerOptions, batch_id: str, *, cancel: bool) -> int:
    from llmboost.cli.batch.server import NoServer, Server

    def give_up(reason: str) -> None:
        raise NoServer(f"{options.url} does not answer: {reason}")

    with Server(options, give_up) as server:
        if cancel:
            batch = server.cancel(batch_id)
            print(f"{batch.id}: {batch.status}")
        else:
            print(json.dumps(server.describe(batch_id), indent=2, ensure_ascii=False))
    return 0


def _told(options: ServerOptions, do: Callable[[], int]) -> int:
    """Runs it, and puts what went wrong into words."""
    from llmboost.cli.batch.server import NoServer, ServerError
    from llmboost.processes import ProcessesError

    if threading.current_thread() is threading.main_thread():
        # Whoever runs this for a user, and wants it to end, means the same as Ctrl-C.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return do()
    except (NoServer, ProcessesError, OSError) as error:
        reason = str(error)
    except ServerError as error:
        reason = f"{options.url}: {error}"
        if error.status in (401, 403):
            key = "the key was refused" if options.api_key else "a key is needed"
            reason = f"--api-key (or LLMBOOST_API_KEY): {key}: {reason}"
    print(f"llmboost batch: error: {reason}", file=sys.stderr)
    return 1
