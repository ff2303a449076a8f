"""The prefix cache: requests that have a long beginning in common, with it and without.

Two servers, one that keeps prefixes and one that does not, take turns; only one has anything to do at a time.
All requests come at once, after one has brought the prefix in.

    python -m benchmarks.prefix [--requests 32] [--prefix 512] [--prompt-tokens 16] [--tokens 8] [--rounds 3]
"""

import sys
from typing import Any

from benchmarks import results, servers
from benchmarks.models import smollm2
from llmboost.cli.bench.options import Options
from llmboost.cli.bench.run import measure
from llmboost.cli.bench.values import Load, Span

WITHOUT = "--no-enable-prefix-caching"


def main() -> None:
    """Prints a table."""
    parser = results.parser(__doc__, rounds=3)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--prefix", type=int, default=512, help="tokens that all have in common")
    parser.add_argument("--prompt-tokens", type=int, default=16, help="of each its own")
    parser.add_argument("--tokens", type=int, default=8, help="of an answer")
    options = parser.parse_args()
    rows = []
    for dtype in options.dtypes:
        with (
            servers.llmboost(smollm2(), dtype, options.threads) as keeps,
            servers.llmboost(smollm2(), dtype, options.threads, WITHOUT) as forgets,
        ):
            rounds = []
            for number in range(options.rounds):
                pair = [_measure(server.url, number, options) for server in (keeps, forgets)]
                rounds.append(pair)
                print([each["ttft_ms"]["p50"] for each in pair], file=sys.stderr, flush=True)
        rows.append({"dtype": dtype, **_row(rounds)})
    results.write(options.json, options, rows)
    names = [
        "precision",
        "first token p50, ms: with",
        "without",
        "ratio",
        "ratio of p99",
        "found in the cache",
    ]
    print(results.table(names, [_cells(row) for row in rows]))


def _measure(url: str, number: int, options: Any) -> dict[str, Any]:
    report = measure(
        Options(
            url=url,
            loads=(Load(concurrency=options.requests),),
            num_requests=options.requests,
            warmup=1,
            prompt_tokens=Span(options.prompt_tokens, options.prompt_tokens),
            output_tokens=Span(options.tokens, options.tokens),
            shared_prefix_tokens=options.prefix,
            seed=number,  # another prefix in each round, the same for both
        )
    )
    (point,) = report["points"]
    if point["requests"]["failed"]:
        raise RuntimeError(f"requests failed: {point['errors']}")
    found: dict[str, Any] = point
    return found


def _row(rounds: list[list[dict[str, Any]]]) -> dict[str, Any]:
    row: dict[str, Any] = {"cached": [keeps["cached_tokens"] / keeps["prompt_tokens"] for keeps, _ in rounds]}
    for percentile in ("p50", "p99"):
        with_cache, without = zip(
            *([each["ttft_ms"][percentile] for each in pair] for pair in rounds), strict=True
        )
        row[percentile] = {"with": with_cache, "without": without}
        row[f"ratio_{percentile}"] = round(results.ratio(with_cache, without), 3)
    return row


def _cells(row: dict[str, Any]) -> list[Any]:
    times = [results.spread(row["p50"][side]) for side in ("with", "without")]
    return [row["dtype"], *times, row["ratio_p50"], row["ratio_p99"], f"{min(row['cached']):.0%}"]


if __name__ == "__main__":
    main()
