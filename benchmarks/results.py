"""How the scripts that compare say what they found: a table, and all of it as JSON."""

import argparse
import json
import os
import platform
import statistics
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any


def numbers(text: str) -> list[int]:
    """`N,N,...`: a type for argparse."""
    return [int(part) for part in text.split(",")]


def words(text: str) -> list[str]:
    """`WORD,WORD,...`: a type for argparse."""
    return text.split(",")


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ratio(above: Iterable[float], below: Iterable[float]) -> float:
    """Of medians: machines are noisy, and single rounds may be lost to whatever else runs."""
    return statistics.median(above) / statistics.median(below)


def spread(values: Sequence[float]) -> str:
    """The median, and from where to where the rounds went."""
    middle = statistics.median(values)
    return f"{middle:.3g}" if len(values) == 1 else f"{middle:.3g} ({min(values):.3g}-{max(values):.3g})"


def table(names: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """In Markdown."""
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def parser(description: str | None, rounds: int) -> argparse.ArgumentParser:
    """With the flags that all of these scripts have."""
    found = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("--rounds", type=int, default=rounds, help="each side once in each")
    found.add_argument("--threads", type=int, default=cores(), help="of torch, on each side")
    found.add_argument("--dtypes", type=words, default=["float32", "bfloat16"])
    found.add_argument("--json", type=Path, metavar="FILE", help="where everything goes that was measured")
    return found


def write(place: Path | None, options: argparse.Namespace, rows: Any) -> None:
    """Keeps what was measured, and on what."""
    if place is None:
        return
    found = {
        "machine": {"cpu": _cpu(), "cores": cores(), "python": platform.python_version()},
        "packages": {name: _version(name) for name in ("llmboost", "torch", "transformers")},
        "options": vars(options),
        "rows": rows,
    }
    place.write_text(json.dumps(found, indent=2, default=str) + "\n")


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""
