"""The arguments of `llmboost bench`."""

import argparse
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmboost.cli.bench import values
from llmboost.cli.bench.values import Load, Span
from llmboost.cli.flags import Parser, UsageError, spelled

DEFAULT_URL = "http://localhost:8011/v1"
STANDARD = "-"
"""Standard output, in the place of a file."""
PLOTS = (".png", ".svg", ".pdf")

_PROMPT, _ANSWER = Span(256, 256), Span(128, 128)

_ELSEWHERE = {
    "--host": "give the URL",
    "--port": "give the URL",
    "--random-input-len": "use --prompt-tokens",
    "--random-output-len": "use --output-tokens",
    "--synthetic-input-tokens-mean": "use --prompt-tokens",
    "--output-tokens-mean": "use --output-tokens",
    "--random-range-ratio": "give ranges: --prompt-tokens 100-300",
    "--random-prefix-len": "use --shared-prefix-tokens",
    "--dataset-name": "prompts are made up, or read from --input",
    "--dataset-path": "use --input",
    "--input-file": "use --input",
    "--goodput": "use --slo",
    "--save-result": "use --json FILE",
    "--result-filename": "use --json FILE",
    "--tokenizer": "none is needed: the server's own counts are taken",
    "--streaming": "every request is streamed",
    "--rate": "use --request-rate",
    "--qps": "use --request-rate",
    "--num-warmups": "use --warmup",
    "--max-seconds": "use --duration",
}
"""Flags of other load generators, and what to use here."""


@dataclass(frozen=True, slots=True)
class Options:
    """What is measured, and where the figures go."""

    url: str
    """With its `/v1`."""
    loads: tuple[Load, ...]
    api_key: str | None = None
    model: str | None = None
    """None: the first that the server lists."""
    endpoint: str = "auto"
    """completions, chat, or auto: completions where there is such a thing."""
    burstiness: float = 1.0
    """Of arrivals at a rate: 1 is Poisson's, less is burstier, more is more even."""
    num_requests: int | None = None
    duration: float | None = None
    """Seconds in which requests are sent; those under way are waited for."""
    warmup: int | None = None
    """Requests before the measurement. None: as many as run at a time."""
    prompt_tokens: Span = _PROMPT
    output_tokens: Span = _ANSWER
    shared_prefix_tokens: int = 0
    """Before each prompt, and besides its own tokens."""
    num_prefixes: int = 1
    input: Path | None = None
    temperatures: tuple[float, ...] = (0.0,)
    """Requests take one of them at random."""
    seed: int = 0
    timeout: float = 600.0
    """Seconds that a request may take in all."""
    ignore_eos: bool = True
    extra_body: Mapping[str, Any] | None = None
    json: str | None = None
    plot: Path | None = None
    compare: tuple[Path, ...] = ()
    label: str | None = None
    slo: Mapping[str, float] | None = None
    """Milliseconds that a good request takes at most, by name of the latency."""


def parse(argv: Sequence[str], environment: Mapping[str, str] = os.environ) -> Options:
    """Options from the arguments.

    Raises:
        UsageError: says what is wrong with them.
    """
    parser = _parser()
    given = parser.parse_args([spelled(argument, parser, _ELSEWHERE) for argument in argv])
    if given.url is not None and given.base_url not in (None, given.url):
        raise UsageError(f"two URLs are given: {given.url!r} and --base-url {given.base_url!r}")
    url = given.url or given.base_url or environment.get("LLMBOOST_URL") or DEFAULT_URL
    key = given.api_key or environment.get("OPENAI_API_KEY") or environment.get("LLMBOOST_API_KEY", "")
    if given.num_requests is not None and given.duration is not None:
        raise UsageError("--num-requests and --duration are two ways to say when to end: give one of them")
    if given.concurrency is not None and given.request_rate is not None:
        raise UsageError(
            "--concurrency keeps so many requests running, --request-rate sends them whether or not others "
            "have ended: give one of them"
        )
    if given.burstiness is not None and given.request_rate is None:
        raise UsageError("--burstiness is of requests that come at a rate: give --request-rate too")
    if given.num_prefixes is not None and not given.shared_prefix_tokens:
        raise UsageError("--num-prefixes says how many prefixes there are: give --shared-prefix-tokens too")
    if given.input is not None:
        for flag in ("prompt_tokens", "shared_prefix_tokens"):
            if getattr(given, flag) is not None:
                raise UsageError(
                    f"--{flag.replace('_', '-')} is of prompts that are made up: not with --input"
                )
    options = Options(
        url=values.url(url),
        # The server's own variable may hold several, of which any will do.
        api_key=key.split(",")[0].strip() or None,
        model=given.model,
        endpoint=given.endpoint,
        loads=_loads(given),
        burstiness=values.number("--burstiness", given.burstiness, 1.0),
        num_requests=values.count("--num-requests", given.num_requests),
        duration=values.number("--duration", given.duration, None),
        warmup=values.count("--warmup", given.warmup, least=0),
        prompt_tokens=values.span("--prompt-tokens", given.prompt_tokens or "256"),
        output_tokens=values.span("--output-tokens", given.output_tokens or "128"),
        shared_prefix_tokens=values.count("--shared-prefix-tokens", given.shared_prefix_tokens, least=0) or 0,
        num_prefixes=values.count("--num-prefixes", given.num_prefixes) or 1,
        input=given.input,
        temperatures=values.temperatures("--temperature", given.temperature or "0"),
        seed=_seed(given.seed),
        timeout=values.number("--timeout", given.timeout, 600.0),
        ignore_eos=given.ignore_eos,
        extra_body=values.json_object("--extra-body", given.extra_body),
        json=given.json,
        plot=given.plot,
        compare=tuple(given.compare),
        label=given.label,
        slo=values.slo("--slo", given.slo),
    )
    _check_places(options)
    return options


def _parser() -> Parser:
    parser = Parser(
        prog="llmboost bench",
        usage="llmboost bench [URL] [FLAGS]",
        description="Measures a server with OpenAI's protocol, by streaming answers from it.",
        epilog="Ctrl-C shows what there is so far. Exit code 0: requests were answered; 1: none was; "
        "2: the arguments are wrong. Underscores are taken for dashes.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("url", nargs="?", metavar="URL", help=f"The server; also LLMBOOST_URL [{DEFAULT_URL}].")
    add("--base-url", "--url", metavar="URL", help="The same.")
    add("--api-key", metavar="KEY", help="Sent to it; also OPENAI_API_KEY or LLMBOOST_API_KEY.")
    add("--model", metavar="MODEL", help="Asked for [the first that the server lists].")
    add(
        "--endpoint",
        choices=("auto", "completions", "chat"),
        default="auto",
        help="auto: completions, where prompts can be of exact lengths, or else chat [auto].",
    )
    add(
        "--concurrency",
        "--max-concurrency",
        metavar="N[,N...]",
        help="Requests that run at a time. Several: one measurement each [1].",
    )
    add(
        "--request-rate",
        metavar="R[,R...]",
        help="Requests a second that are sent, whether or not others have ended, at random times.",
    )
    add(
        "--burstiness",
        metavar="B",
        help="Of these times: 1 is a Poisson process, less comes in bursts, more comes evenly [1].",
    )
    add(
        "--num-requests",
        "--num-prompts",
        metavar="N",
        help="To measure, each time [4 for each that runs at a time, 30 s of a rate; at least 16].",
    )
    add("--duration", metavar="SECONDS", help="To send requests for, in the place of a number of them.")
    add(
        "--warmup",
        metavar="N",
        help="Requests before that, of at most 16 tokens, that do not count [as many as run at a time].",
    )
    add("--prompt-tokens", "--input-len", metavar="N|MIN-MAX", help="Tokens of a prompt [256].")
    add("--output-tokens", "--output-len", metavar="N|MIN-MAX", help="Tokens of an answer [128].")
    add(
        "--shared-prefix-tokens",
        metavar="N",
        help="Tokens before each prompt, besides its own, that requests have in common [0].",
    )
    add("--num-prefixes", metavar="N", help="Different ones of these [1].")
    add(
        "--input",
        type=Path,
        metavar="FILE",
        help="JSON lines with a prompt or messages each, in the place of made-up ones; also a batch's.",
    )
    add("--temperature", metavar="T[,T...]", help="Several: each request takes one of them at random [0].")
    add("--seed", metavar="N", help="Makes the same prompts, lengths and times again [a new one each time].")
    add("--timeout", metavar="SECONDS", help="That a request may take [600].")
    add(
        "--ignore-eos",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="Ask for answers of full length; left out where the server does not know it [on].",
    )
    add("--extra-body", metavar="JSON", help="Fields that are added to each request.")
    add("--slo", metavar="NAME:MS,...", help="Counts good requests: ttft:200,tpot:50, also itl and e2e.")
    add("--json", metavar="FILE", help="Where all figures go; -: standard output.")
    add("--plot", type=Path, metavar="FILE", help=f"Where a plot goes: {', '.join(PLOTS)}.")
    add(
        "--compare",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="Figures of another run (--json) to show beside these. Several: repeat it.",
    )
    add("--label", metavar="NAME", help="Of this run in tables and plots [the model's name].")
    return parser


def _loads(given: argparse.Namespace) -> tuple[Load, ...]:
    if given.request_rate is not None:
        return tuple(Load(rate=rate) for rate in values.rates("--request-rate", given.request_rate))
    return tuple(Load(concurrency=n) for n in values.counts("--concurrency", given.concurrency or "1"))


def _seed(given: str | None) -> int:
    # Not the same each time: a server that keeps prefixes would have the prompts of the run before.
    return random.SystemRandom().randrange(1_000_000) if given is None else values.integer("--seed", given)


def _check_places(options: Options) -> None:
    """Says at once that something can't be read or written, not when all is measured."""
    for flag, source in [("--input", options.input), *(("--compare", path) for path in options.compare)]:
        if source is not None and not source.is_file():
            what = "is no file" if source.exists() else "does not exist"
            raise UsageError(f"{flag} {str(source)!r} {what}")
    if options.plot is not None and options.plot.suffix.lower() not in PLOTS:
        raise UsageError(f"--plot {str(options.plot)!r} must end in {', '.join(PLOTS)}")
    json = None if options.json in (None, STANDARD) else Path(str(options.json))
    for flag, place in (("--json", json), ("--plot", options.plot)):
        if place is None:
            continue
        if place.is_dir():
            raise UsageError(f"{flag} {str(place)!r} is a folder")
        if not os.access(place.parent, os.W_OK):
            why = "can't be written to" if place.parent.is_dir() else "does not exist"
            raise UsageError(f"{flag} {str(place)!r}: the folder {str(place.parent)!r} {why}")
