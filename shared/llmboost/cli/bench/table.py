"""Reports as tables."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from llmboost.cli.bench.report import described

WIDE = 132
"""Columns of a table that no terminal limits."""
_LATENCIES = {
    "ttft_ms": "time to first token",
    "itl_ms": "inter-token latency",
    "tpot_ms": "time per output token",
    "e2e_ms": "end to end",
}


def show(reports: Sequence[dict[str, Any]], console: Console) -> None:
    """Prints the newest report, which comes first, and the others beside it."""
    newest, *others = reports
    console.print(Text(described(newest), style="bold"))
    if len(newest["points"]) == 1 and not others:
        console.print(_details(newest["points"][0]))
    else:
        console.print(_rows(reports))
    for line in remarks(newest):
        console.print(Text(line, style="yellow"))


def console() -> Console:
    """Standard output; wide, if it is no terminal."""
    found = Console(highlight=False)
    return found if found.is_terminal else Console(highlight=False, width=WIDE)


def remarks(report: dict[str, Any]) -> list[str]:
    """What to know before the figures are believed, and what went wrong."""
    lines = list(report["notes"])
    for point in report["points"]:
        where = f"{load_of(point)}: " if len(report["points"]) > 1 else ""
        lines += [where + warning for warning in point["warnings"]]
        lines += [
            f"{where}{error['count']} failed, {error['kind']}: {error['message']}"
            for error in point["errors"]
        ]
    if report["interrupted"]:
        lines.append("interrupted: these are the requests that had ended")
    return list(dict.fromkeys(lines))


def load_of(point: dict[str, Any]) -> str:
    """The load, in words."""
    return f"{point['load']} requests" if point["request_rate"] else f"concurrency {point['load']}"


def _details(point: dict[str, Any]) -> RenderableType:
    """One point, all of it."""
    totals = Table(show_header=False, box=None, pad_edge=False)
    for name, value in _totals(point):
        totals.add_row(name, Text(value, style="bold"))
    latencies = Table("milliseconds", *(_right(name) for name in ("mean", "p50", "p90", "p99", "max")))
    for key, name in _LATENCIES.items():
        found = point[key]
        if found is not None:
            cells = (found[part] for part in ("mean", "p50", "p90", "p99", "max"))
            latencies.add_row(name, *map(_ms, cells))
    return Group(totals, latencies)


def _totals(point: dict[str, Any]) -> list[tuple[str, str]]:
    requests = point["requests"]
    tokens = [
        f"{name} {point[key]:.1f}"
        for name, key in (("prompt", "mean_prompt_tokens"), ("answer", "mean_output_tokens"))
        if point[key]
    ]
    found = [
        ("load", load_of(point)),
        ("requests", f"{requests['ok']} ok, {requests['failed']} failed in {point['duration_s']:.2f} s"),
        ("tokens of a request, mean", ", ".join(tokens) or "none"),
        ("requests/s", f"{point['requests_per_s']:.2f}"),
        ("output tokens/s", f"{point['output_tokens_per_s']:.1f}"),
        ("total tokens/s", f"{point['total_tokens_per_s']:.1f}"),
    ]
    if point["cached_tokens"]:
        share = point["cached_tokens"] / max(point["prompt_tokens"], 1)
        found.append(("prompt tokens from a cache", f"{share:.0%}"))
    if goodput := point.get("goodput"):
        limits = ", ".join(f"{name} {most:g} ms" for name, most in goodput["slo_ms"].items())
        good = f"{goodput['requests_per_s']:.2f}/s, {goodput['requests']} requests within {limits}"
        found.append(("goodput", good))
    return found


def _rows(reports: Sequence[dict[str, Any]]) -> Table:
    """A row for each point of each report; of several, those of the same load stand together."""
    several = len(reports) > 1
    caption = "latencies in milliseconds: p50 / p90 / p99"
    if several:
        caption += f"; ratio: output of {reports[0]['label']} to that of the row"
    table = Table(caption=caption, caption_justify="left")
    names = ["load", *(["label"] if several else []), "ok", "failed", "req/s", "out tok/s", "total tok/s"]
    first = {point["load"]: point for point in reports[0]["points"]}
    goodput = any("goodput" in point for report in reports for point in report["points"])
    for name in [
        *names,
        *(["ratio"] if several else []),
        *(["good/s"] if goodput else []),
        "first token",
        "inter-token",
        "end to end",
    ]:
        table.add_column(name, justify="left" if name in ("load", "label") else "right")
    loads = dict.fromkeys(point["load"] for report in reports for point in report["points"])
    for load in loads:
        for report in reports:
            for point in report["points"]:
                if point["load"] == load:
                    label = [Text(report["label"])] if several else []
                    ratio = [_ratio(first.get(load), point)] if several else []
                    good = [_good(point)] if goodput else []
                    table.add_row(load, *label, *_figures(point), *ratio, *good, *_percentiles(point))
        if several:
            table.add_section()
    return table


def _figures(point: dict[str, Any]) -> list[str]:
    return [
        str(point["requests"]["ok"]),
        str(point["requests"]["failed"]),
        f"{point['requests_per_s']:.2f}",
        f"{point['output_tokens_per_s']:.1f}",
        f"{point['total_tokens_per_s']:.1f}",
    ]


def _percentiles(point: dict[str, Any]) -> list[str]:
    cells = []
    for key in ("ttft_ms", "itl_ms", "e2e_ms"):
        found = point[key]
        cells.append("" if found is None else " / ".join(_ms(found[part]) for part in ("p50", "p90", "p99")))
    return cells


def _good(point: dict[str, Any]) -> str:
    return f"{point['goodput']['requests_per_s']:.2f}" if "goodput" in point else ""


def _ratio(first: dict[str, Any] | None, point: dict[str, Any]) -> str:
    """Of this run's output to another's."""
    if first is None or not point["output_tokens_per_s"]:
        return ""
    return f"{first['output_tokens_per_s'] / point['output_tokens_per_s']:.2f}"


def _right(name: str) -> Any:
    from rich.table import Column

    return Column(name, justify="right")


def _ms(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
