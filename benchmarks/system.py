"""The whole system (client, API pod, Redis, worker) beside the engine in process, with the same requests.

`llmboost serve` is measured by `llmboost bench`; all of that shares the cores with the engine in it.
Throughput at several concurrencies, and time to first token of one request at a time.

    python -m benchmarks.system [--concurrency 16,32] [--prompt-tokens 64] [--tokens 64] [--rounds 3]
                                [--stream-interval 1]
"""

import statistics
import sys
from typing import Any

from benchmarks import results, servers
from benchmarks.child import Child
from benchmarks.engine import WORKERS_ENV, Run, in_process
from benchmarks.models import VOCAB, smollm2
from llmboost.cli.bench.options import Options
from llmboost.cli.bench.run import measure
from llmboost.cli.bench.target import Target
from llmboost.cli.bench.values import Load, Span
from llmboost.cli.bench.workload import Workload

ALONE = 12
"""Requests, one after another, whose first tokens are waited for."""


def main() -> None:
    """Prints a table."""
    parser = results.parser(__doc__, rounds=3)
    parser.add_argument("--concurrency", type=results.numbers, default=[16, 32])
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64, help="of an answer")
    parser.add_argument("--turns", type=int, default=3, help="requests for each that runs at a time")
    parser.add_argument("--stream-interval", default="1", help="as `llmboost serve` takes it")
    options = parser.parse_args()
    rows = []
    for dtype in options.dtypes:
        model = smollm2()
        with (
            Child(in_process, env=WORKERS_ENV, model=model, dtype=dtype, threads=options.threads) as engine,
            servers.llmboost(
                model, dtype, options.threads, "--stream-interval", options.stream_interval
            ) as server,
        ):
            for concurrency in [1, *options.concurrency]:
                rows.append({"dtype": dtype, **_compare(engine, server.url, concurrency, options)})
                print(rows[-1], file=sys.stderr, flush=True)
    results.write(options.json, options, rows)
    print(_table(rows))


def _compare(engine: Child, url: str, concurrency: int, options: Any) -> dict[str, Any]:
    systems: list[dict[str, Any]] = []
    engines: list[Run] = []
    requests = ALONE if concurrency == 1 else options.turns * concurrency
    for number in range(options.rounds):
        asked = Options(
            url=url,
            loads=(Load(concurrency=concurrency),),
            num_requests=requests,
            prompt_tokens=Span(options.prompt_tokens, options.prompt_tokens),
            output_tokens=Span(options.tokens, options.tokens),
            seed=100 * concurrency + number,
        )
        systems.append(measure(asked)["points"][0])
        if systems[-1]["requests"]["failed"]:
            raise RuntimeError(f"requests failed: {systems[-1]['errors']}")
        # The same prompts: nobody has had them, for the engine here is another one.
        workload = Workload(asked, Target("", "completions", highest_id=VOCAB - 1), None)
        bodies = [workload.body("point 0", place) for place in range(requests)]
        engines.append(
            engine.run(
                prompts=[body["prompt"] for body in bodies],
                max_tokens=[body["max_tokens"] for body in bodies],
                concurrency=concurrency,
            )
        )
    speeds = [point["output_tokens_per_s"] for point in systems], [run.tokens_per_s for run in engines]
    firsts = [point["ttft_ms"]["p50"] for point in systems], [_first_ms(run) for run in engines]
    return {
        "concurrency": concurrency,
        "tokens_per_s": {"system": speeds[0], "engine": speeds[1]},
        "ttft_p50_ms": {"system": firsts[0], "engine": firsts[1]},
        "ratio": round(results.ratio(*speeds), 3),
        "more_ttft_ms": round(statistics.median(firsts[0]) - statistics.median(firsts[1]), 2),
        "client_cpu": [round(point["generator_cpu"], 3) for point in systems],
    }


def _first_ms(run: Run) -> float:
    return 1000 * statistics.median(run.ttft)


def _table(rows: list[dict[str, Any]]) -> str:
    names = [
        "precision",
        "concurrency",
        "tok/s: system",
        "engine",
        "ratio",
        "first token, ms: system",
        "engine",
    ]
    return results.table(
        [*names, "more"],
        [
            [
                row["dtype"],
                row["concurrency"],
                results.spread(row["tokens_per_s"]["system"]),
                results.spread(row["tokens_per_s"]["engine"]),
                row["ratio"],
                results.spread(row["ttft_p50_ms"]["system"]),
                results.spread(row["ttft_p50_ms"]["engine"]),
                row["more_ttft_ms"],
            ]
            for row in rows
        ],
    )


if __name__ == "__main__":
    main()
