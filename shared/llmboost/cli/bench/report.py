"""Reports: how they are kept, and what they are about."""

import json
import sys
from pathlib import Path
from typing import Any

from llmboost.cli.bench.options import STANDARD
from llmboost.cli.flags import UsageError

VERSION = 1
"""Of the form of a report; a reader refuses another."""


def write(report: dict[str, Any], place: str) -> None:
    """Writes it to a file, or to standard output."""
    text = json.dumps({"llmboost_bench": VERSION, **report}, ensure_ascii=False, indent=2) + "\n"
    if place == STANDARD:
        sys.stdout.write(text)
    else:
        Path(place).write_text(text, encoding="utf-8")


def read(source: Path) -> dict[str, Any]:
    """A report.

    Raises:
        UsageError: it is none.
    """
    try:
        report = json.loads(source.read_text(encoding="utf-8"))
        version = report["llmboost_bench"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UsageError(f"--compare {str(source)!r} is not what llmboost bench --json writes") from None
    if version != VERSION:
        raise UsageError(f"--compare {str(source)!r} is of another version of llmboost: measure again")
    found: dict[str, Any] = report
    return found


def described(report: dict[str, Any]) -> str:
    """What was measured, in a line."""
    workload = report["workload"]
    if "input" in workload:
        prompts = f"prompts from {workload['input']}"
    else:
        prompts = f"prompts of {workload['prompt_tokens']} tokens"
        if workload["shared_prefix_tokens"]:
            prompts += (
                f" after {workload['num_prefixes']} shared prefixes of {workload['shared_prefix_tokens']}"
            )
    temperatures = ", ".join(f"{value:g}" for value in workload["temperatures"])
    return (
        f"{report['model']} at {report['url']}, {report['endpoint']}: {prompts}, answers of "
        f"{workload['output_tokens']}, temperature {temperatures}, seed {workload['seed']}"
    )
