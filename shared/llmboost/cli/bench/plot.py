"""Reports as a figure. Needs matplotlib, which the extra `bench` brings."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, NullLocator

from llmboost.cli.bench.report import described
from llmboost.cli.bench.summary import CURVE, PERCENTILES

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#555555")
"""Okabe and Ito's, which all eyes can tell apart."""
_STYLE: dict[Any, Any] = {
    "font.size": 10,
    "font.family": "sans-serif",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelcolor": "#444444",
    "axes.edgecolor": "#999999",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "legend.frameon": False,
    "svg.fonttype": "none",  # text stays text
    "figure.dpi": 100,
    "savefig.dpi": 160,
}
_LINES: tuple[Literal["-", "--", ":"], ...] = ("-", "--", ":")
"""Of the percentiles."""


def draw(reports: Sequence[dict[str, Any]], place: Path) -> None:
    """Writes a figure of the newest report, which comes first, and of the others beside it.

    Raises:
        OSError: it can't be written.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(13, 4.4), layout="constrained")
        panels = figure.subplots(1, 3)
        if all(len(report["points"]) == 1 for report in reports):
            _one_load(panels, reports)
        else:
            _several_loads(panels, reports)
        if len(reports) > 1:
            handles, labels = panels[0].get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 5))
        newest = reports[0]
        figure.suptitle(described(newest), x=0.01, ha="left", fontsize=10, color="#444444")
        figure.savefig(place)


def _several_loads(panels: Sequence[Axes], reports: Sequence[dict[str, Any]]) -> None:
    """What more load does to throughput, and to those who wait."""
    throughput, ttft, itl = panels
    throughput.set(title="Output", ylabel="tokens/s")
    for report, colour in zip(reports, _colours(reports), strict=True):
        loads = [_size(point) for point in report["points"]]
        speeds = [point["output_tokens_per_s"] for point in report["points"]]
        throughput.plot(loads, speeds, "o-", color=colour, label=report["label"])
        if len(reports) == 1:
            for at, speed in zip(loads, speeds, strict=True):
                _say(throughput, f"{speed:.0f}", at, speed, (0, 9), "center")
    _latencies(ttft, reports, "ttft_ms", "Time to first token")
    _latencies(itl, reports, "itl_ms", "Inter-token latency")
    is_rate = all(point["request_rate"] for report in reports for point in report["points"])
    sizes = sorted({_size(point) for report in reports for point in report["points"]})
    for axes in panels:
        axes.set_xlabel("requests a second" if is_rate else "concurrent requests")
        axes.margins(x=0.08, y=0.12)
        axes.set_ylim(bottom=0)
        if sizes[-1] >= 8 * sizes[0]:
            axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [f"{size:g}" for size in sizes])
        axes.xaxis.set_minor_locator(NullLocator())


def _latencies(axes: Axes, reports: Sequence[dict[str, Any]], key: str, title: str) -> None:
    axes.set(title=title, ylabel="ms")
    # Of several reports the middle and the tail: more lines could not be told apart.
    shown = PERCENTILES if len(reports) == 1 else (PERCENTILES[0], PERCENTILES[-1])
    for report, colour in zip(reports, _colours(reports), strict=True):
        points = [point for point in report["points"] if point[key]]
        loads = [_size(point) for point in points]
        for percent, line in zip(shown, _LINES, strict=False):
            values = [point[key][f"p{percent}"] for point in points]
            axes.plot(loads, values, line, marker="o", markersize=4, color=colour)
    keys = [Line2D([], [], color="#666666", linestyle=line) for line in _LINES[: len(shown)]]
    axes.legend(keys, [f"p{percent}" for percent in shown], loc="upper left")


def _one_load(panels: Sequence[Axes], reports: Sequence[dict[str, Any]]) -> None:
    """How latencies spread, and what came when."""
    ttft, itl, output = panels
    _distribution(ttft, reports, "ttft_ms", "Time to first token")
    _distribution(itl, reports, "itl_ms", "Inter-token latency")
    means = [report["points"][0]["output_tokens_per_s"] for report in reports]
    title = f"Output: {means[0]:.0f} tokens/s on average" if len(reports) == 1 else "Output, and its mean"
    output.set(title=title, ylabel="tokens/s", xlabel="seconds")
    for report, colour, mean in zip(reports, _colours(reports), means, strict=True):
        line = report["points"][0]["timeline"]
        smooth = _smoothed(line["tokens_per_s"])
        at = [(number + 0.5) * line["step_s"] for number in range(len(smooth))]
        output.plot(at, smooth, color=colour)
        output.axhline(mean, color=colour, linestyle="--", linewidth=1)
        if len(reports) == 1:
            output.fill_between(at, smooth, color=colour, alpha=0.12, linewidth=0)
    output.set_ylim(bottom=0)
    output.set_xlim(left=0)


def _distribution(axes: Axes, reports: Sequence[dict[str, Any]], key: str, title: str) -> None:
    """Which share of all had to wait no longer than so many milliseconds."""
    axes.set(title=title, ylabel="share of all", xlabel="ms")
    found = [report["points"][0][key] for report in reports]
    # A few outliers would push all the others to the margin.
    most = max((min(each["max"], 1.3 * each["p99"]) for each in found if each), default=0.0)
    most = most or 1.0
    for report, each, colour in zip(reports, found, _colours(reports), strict=True):
        if each is None:
            continue
        axes.plot(each["curve"], [percent / 100 for percent in CURVE], color=colour, label=report["label"])
        for percent in PERCENTILES:
            value = each[f"p{percent}"]
            axes.plot([value], [percent / 100], "o", color=colour, markersize=5)
            if len(reports) == 1:  # below and right of a dot there is never a curve
                _say(axes, f"p{percent}: {value:.3g} ms", value, percent / 100, (8, -11), "left")
        if len(reports) == 1 and each["max"] > most:
            axes.text(0.98, 0.03, f"max: {each['max']:.3g} ms", ha="right", transform=axes.transAxes)
    axes.set_xlim(0, 1.3 * most if len(reports) == 1 else 1.03 * most)
    axes.set_ylim(0, 1.03)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))


def _say(
    axes: Axes,
    words: str,
    x: float,
    y: float,
    offset: tuple[int, int],
    side: Literal["left", "center", "right"],
) -> None:
    """Words beside a dot, legible above lines."""
    said = axes.annotate(words, (x, y), offset, textcoords="offset points", ha=side, fontsize=9)
    said.set_path_effects([withStroke(linewidth=3, foreground="white")])


def _colours(reports: Sequence[dict[str, Any]]) -> list[str]:
    return [COLOURS[number % len(COLOURS)] for number in range(len(reports))]


def _size(point: dict[str, Any]) -> float:
    size: float = point["request_rate"] or point["concurrency"]
    return size


def _smoothed(values: Sequence[float], width: int = 5) -> list[float]:
    """Means of neighbours: one part of the time may hold a step more or less."""
    half = width // 2
    windows = (values[max(0, at - half) : at + half + 1] for at in range(len(values)))
    return [sum(window) / len(window) for window in windows]
