"""What each command does once its flags are parsed."""

import difflib
import errno
import os
import socket
import sys
from collections.abc import Callable
from importlib import import_module, metadata
from typing import TypeVar

from llmboost import webhooks
from llmboost.cli.flags import Flags, UsageError
from llmboost.settings import ApiSettings, CommonSettings, ServeSettings, WorkerSettings, variable

W = TypeVar("W", bound=WorkerSettings)

USAGE = """\
usage: llmboost COMMAND [MODEL] [FLAGS]

Serves language models through a message queue: token streams that survive what makes them.

  llmboost serve [MODEL]                   everything in one command: Redis, an API pod, workers
  llmboost api --redis-url URL             one API pod
  llmboost worker [MODEL] --redis-url URL  one worker
  llmboost batch run INPUT -o OUTPUT       a file of requests, answered into another
  llmboost bench [URL]                     how fast a server is, ours or another

  llmboost COMMAND --help   the flags of a command
  llmboost --version

MODEL is a hub name or a local folder; without it the small demo model is served.
"""

SUMMARIES = {
    "serve": "Serves a model with everything it needs: Redis (an embedded one unless --redis-url names "
    "another), an API pod and --dp workers, watched and restarted.",
    "api": "Runs one API pod on a Redis that workers share.",
    "worker": "Runs one worker, which serves a model to all API pods on the same Redis.",
    "batch": "Runs files of requests.",
    "bench": "Measures a server.",
}


_CLIENTS_VARIABLES = ("LLMBOOST_URL",)
"""Variables of `llmboost batch` that are no settings."""


def run(argv: list[str]) -> int:
    """Runs a command line; returns its exit code."""
    command = argv[0] if argv else ""
    try:
        match command:
            case "" | "help" | "-h" | "--help":
                print(USAGE, end="")
                return 0 if argv else 2
            case "--version" | "version":
                print(f"llmboost {_version()}")
                return 0
            case "serve":
                settings = Flags(command, ServeSettings, SUMMARIES[command]).parse(argv[1:])
                return _serve(settings)
            case "api":
                return _api(Flags(command, ApiSettings, SUMMARIES[command]).parse(argv[1:]))
            case "worker":
                return _worker(Flags(command, WorkerSettings, SUMMARIES[command]).parse(argv[1:]))
            case "batch":
                return _batch(argv[1:])
            case "bench":
                return _bench(argv[1:])
        close = difflib.get_close_matches(command, SUMMARIES, 1)
        raise UsageError(
            f"unknown command {command!r}: "
            + (f"did you mean {close[0]}?" if close else f"it is one of {', '.join(SUMMARIES)}")
        )
    except UsageError as error:
        name = f"llmboost {command}" if command in SUMMARIES else "llmboost"
        print(f"{name}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before the command has taken it over
        return 130


def _version() -> str:
    try:
        return metadata.version("llmboost")
    except metadata.PackageNotFoundError:
        return "(run from its sources, not installed)"


def _serve(settings: ServeSettings) -> int:
    from llmboost.cli.serve import serve

    if settings.redis_url and settings.data_dir:
        raise UsageError("--data-dir is the embedded Redis's, but --redis-url names another")
    _warn_of_typos(ServeSettings)
    _check_webhooks(settings)
    _check_port(settings)
    return serve(_with_model_checked(settings))


def _api(settings: ApiSettings) -> int:
    _need_redis(settings)
    _check_webhooks(settings)
    _check_port(settings)
    return _start("llmboost_api.app", settings, "")


def _worker(settings: WorkerSettings) -> int:
    _need_redis(settings)
    return _start("llmboost_worker.worker", _with_model_checked(settings), "[worker]")


def _batch(argv: list[str]) -> int:
    from llmboost.cli.batch.command import run_command

    return run_command(argv)


def _bench(argv: list[str]) -> int:
    from llmboost.cli.bench.command import run_command

    return run_command(argv)


def _start(module: str, settings: CommonSettings, extra: str) -> int:
    """Runs one side in this process; returns its exit code.

    By name, when it is asked for: `shared/` imports neither side.
    """
    try:
        run_side: Callable[[CommonSettings], int | None] = import_module(module).run
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("llmboost"):
            raise
        raise UsageError(
            f"the package {error.name!r} is missing: pip install 'llmboost{extra}' brings it"
        ) from None
    return run_side(settings) or 0


def _need_redis(settings: CommonSettings) -> None:
    if settings.redis_url is None:
        raise UsageError(
            "--redis-url (or LLMBOOST_REDIS_URL) is needed: the Redis that pods and workers share, "
            "such as redis://localhost:6379/0"
        )


def _check_webhooks(settings: ApiSettings) -> None:
    try:
        webhooks.check(settings)
    except ValueError as error:
        raise UsageError(str(error)) from None


def _with_model_checked(settings: W) -> W:
    """The settings, with `~` in a model's path made plain; otherwise the name stays as it is given.

    Raises:
        UsageError: the model is written as a path, and there is no such folder.
    """
    if not settings.model.startswith(("./", "../", "/", "~")) and settings.model not in (".", ".."):
        return settings
    path = os.path.expanduser(settings.model)
    if not os.path.isdir(path):
        what = "is not a folder" if os.path.exists(path) else "does not exist"
        raise UsageError(f"model {settings.model!r} {what}")
    return settings.model_copy(update={"model": path})


def _check_port(settings: ApiSettings) -> None:
    """Says at once that a port is taken, not after a model was loaded."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except socket.gaierror as error:
        raise UsageError(f"--host {settings.host!r}: {error.strerror}") from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UsageError(
                f"port {settings.port} on {settings.host} is in use: choose another with --port, "
                "or --port 0 for any free one"
            ) from None
        raise UsageError(f"can't listen on {settings.host}:{settings.port}: {error.strerror}") from None


def _warn_of_typos(settings: type[CommonSettings]) -> None:
    """A misspelt variable would be ignored in silence, unlike a misspelt flag."""
    known = [*(variable(name) for name in settings.model_fields), *_CLIENTS_VARIABLES]
    for name in os.environ:
        if name.startswith("LLMBOOST_") and name not in known:
            close = difflib.get_close_matches(name, known, 1, cutoff=0.8)
            if close:
                print(f"llmboost: {name} is no setting; did you mean {close[0]}?", file=sys.stderr)
