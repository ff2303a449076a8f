"""The arguments of `llmboost batch`: a client's, so they are no settings."""

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from llmboost.cli.flags import Parser, UsageError, spelled

DEFAULT_URL = "http://localhost:8011/v1"
STANDARD = "-"
"""Standard input or output, in the place of a file."""

USAGE = """\
usage: llmboost batch COMMAND [FLAGS]

Files of requests, in the format of OpenAI's batches: one line each, answered into another file.

  llmboost batch run INPUT -o OUTPUT  upload, run, watch and download; a server is started if there is none
  llmboost batch show ID              how far a batch is, as JSON
  llmboost batch cancel ID            end a batch early; what is done stays done

  llmboost batch COMMAND --help       the flags of a command
"""

_ELSEWHERE = {
    "--base-url": "use --url",
    "--host": "use --url",
    "--port": "use --url",
    "--tensor-parallel-size": "set LLMBOOST_TP for the server that is started",
}


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """Which server is asked, and as whom."""

    url: str
    chosen: bool
    """The URL was named, and is not the default."""
    api_key: str | None


@dataclass(frozen=True, slots=True)
class RunOptions:
    """What `run` does."""

    server: ServerOptions
    output: str
    input: str | None
    """None: the batch runs already."""
    batch_id: str | None
    errors: Path | None
    endpoint: str | None
    window: str
    metadata: dict[str, str]
    model: str | None
    """What a server that has to be started serves; default: what the first line asks for."""

    @property
    def errors_path(self) -> Path:
        """Where the lines go that failed."""
        if self.errors is not None:
            return self.errors
        return Path("batch.errors.jsonl" if self.output == STANDARD else f"{self.output}.errors.jsonl")


def parse_run(argv: Sequence[str]) -> RunOptions:
    """The arguments of `run`.

    Raises:
        UsageError: says what is wrong with them.
    """
    parser = _parser("run", "[INPUT] -o OUTPUT [FLAGS]", _RUN, epilog=_RUN_EPILOG)
    parser.add_argument(
        "input", nargs="?", metavar="INPUT", help="File of requests, a line each; -: standard input."
    )
    parser.add_argument(
        "-i", "--input", "--input-file", dest="named_input", metavar="INPUT", help="The same."
    )
    parser.add_argument(
        "-o", "--output", "--output-file", metavar="FILE", help="Where the answers go; -: standard output."
    )
    parser.add_argument(
        "--errors",
        type=Path,
        metavar="FILE",
        help="Where the lines go that failed, if there are any [OUTPUT.errors.jsonl].",
    )
    parser.add_argument("--endpoint", metavar="PATH", help="Such as /v1/chat/completions [the first line's].")
    parser.add_argument(
        "--completion-window",
        default="24h",
        metavar="TIME",
        help="What is not done by then is reported as expired [24h].",
    )
    parser.add_argument(
        "--metadata",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="Kept with the batch. Several: repeat it.",
    )
    parser.add_argument("--batch-id", metavar="ID", help="Watch and download this batch, which runs already.")
    parser.add_argument(
        "--model", metavar="MODEL", help="Served if a server has to be started [the first line's]."
    )
    given = parser.parse_args(_spelled(argv, parser))
    source = given.named_input if given.input is None else given.input
    if given.input is not None and given.named_input not in (None, given.input):
        raise UsageError(f"two inputs are given: {given.input!r} and {given.named_input!r}")
    if source is None and given.batch_id is None:
        raise UsageError("an input is needed: a file of requests, a line each, or - for standard input")
    if source is not None and given.batch_id is not None:
        raise UsageError(f"--batch-id names a batch that has its input: leave {source!r} out")
    if given.batch_id is not None:
        for flag in ("endpoint", "metadata", "model"):
            if getattr(given, flag):
                raise UsageError(f"--batch-id names a batch that has begun: leave --{flag} out")
    if given.output is None:
        raise UsageError("-o FILE is needed: where the answers go, or - for standard output")
    options = RunOptions(
        _server(given),
        given.output,
        source,
        given.batch_id,
        given.errors,
        given.endpoint,
        given.completion_window,
        _metadata(given.metadata),
        given.model,
    )
    _check_places(options)
    return options


def parse_one(command: str, summary: str, argv: Sequence[str]) -> tuple[ServerOptions, str]:
    """The arguments of a command on one batch: which server, which batch.

    Raises:
        UsageError: says what is wrong with them.
    """
    parser = _parser(command, "ID [FLAGS]", summary)
    parser.add_argument("batch_id", nargs="?", metavar="ID", help="Id of the batch, batch_….")
    given = parser.parse_args(_spelled(argv, parser))
    if given.batch_id is None:
        raise UsageError("the id of a batch is needed")
    return _server(given), given.batch_id


_RUN = "Uploads a file of requests, has it run as a batch, shows how far it is, and downloads the answers."
_RUN_EPILOG = (
    "If no --url is given and nothing answers there, a private server with the lines' model is started for "
    "the run; LLMBOOST_* variables are its settings. Ctrl-C leaves the batch running on a server of others. "
    "Exit code 0: all lines were answered; 1: some were not; 2: the arguments or the input are wrong."
)


def _parser(command: str, usage: str, description: str, epilog: str | None = None) -> Parser:
    prog = f"llmboost batch {command}"
    parser = Parser(
        prog=prog, usage=f"{prog} {usage}", description=description, epilog=epilog, allow_abbrev=False
    )
    parser.add_argument("--url", metavar="URL", help=f"The server; also LLMBOOST_URL [{DEFAULT_URL}].")
    parser.add_argument("--api-key", metavar="KEY", help="Sent to it; also LLMBOOST_API_KEY.")
    return parser


def _spelled(argv: Sequence[str], parser: Parser) -> list[str]:
    return [spelled(argument, parser, _ELSEWHERE) for argument in argv]


def _server(given: argparse.Namespace, environment: Mapping[str, str] = os.environ) -> ServerOptions:
    chosen = given.url or environment.get("LLMBOOST_URL")
    # The server's own variable may hold several, of which any will do.
    key = given.api_key or environment.get("LLMBOOST_API_KEY", "").split(",")[0].strip() or None
    return ServerOptions(_with_path(chosen or DEFAULT_URL), chosen is not None, key)


def _with_path(url: str) -> str:
    """The URL under which the endpoints are; `/v1` where only a host is named."""
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError as error:
        raise UsageError(f"--url {url!r}: {error}") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UsageError(f"--url {url!r} must be such as {DEFAULT_URL}")
    url = url.rstrip("/")
    return url if parts.path.strip("/") else f"{url}/v1"


def _metadata(pairs: Sequence[str]) -> dict[str, str]:
    metadata = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise UsageError(f"--metadata {pair!r} must be KEY=VALUE")
        metadata[name] = value
    return metadata


def _check_places(options: RunOptions) -> None:
    """Says at once that an output can't be written, not when the batch is done."""
    places = {"-o": Path(options.output), "--errors": options.errors_path}
    if options.output == STANDARD:
        del places["-o"]
    for flag, place in places.items():
        if place.is_dir():
            raise UsageError(f"{flag} {str(place)!r} is a folder")
        if not os.access(place.parent, os.W_OK):
            why = "can't be written to" if place.parent.is_dir() else "does not exist"
            raise UsageError(f"{flag} {str(place)!r}: the folder {str(place.parent)!r} {why}")
        if options.input is not None and place.exists() and _same(place, options.input):
            raise UsageError(f"{flag} {str(place)!r} is the input")


def _same(place: Path, source: str) -> bool:
    return source != STANDARD and os.path.exists(source) and place.samefile(source)
