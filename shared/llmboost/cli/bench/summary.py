"""What records come to."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from llmboost.cli.bench.record import Record

PERCENTILES = (50, 90, 99)
CURVE = tuple(range(101))
"""Percentiles of which a distribution is drawn."""


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Of values in order, with what lies between two of them interpolated (as numpy does)."""
    place = (len(ordered) - 1) * percent / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def latency(seconds: Iterable[float | None]) -> dict[str, Any] | None:
    """Mean, percentiles and curve in milliseconds; None if there are no values."""
    ordered = sorted(value * 1000 for value in seconds if value is not None)
    if not ordered:
        return None
    found: dict[str, Any] = {"count": len(ordered), "mean": sum(ordered) / len(ordered)}
    found |= {f"p{percent}": percentile(ordered, percent) for percent in PERCENTILES}
    found |= {"min": ordered[0], "max": ordered[-1]}
    found["curve"] = [percentile(ordered, percent) for percent in CURVE]
    return found


def summarize(
    records: Sequence[Record],
    began: float,
    ended: float,
    slo: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Figures of all records of a point; latencies in milliseconds, times in seconds."""
    good = [record for record in records if record.error is None]
    duration = max(ended - began, 1e-9)
    prompt = sum(record.prompt_tokens for record in good)
    output = sum(record.output_tokens for record in good)
    found: dict[str, Any] = {
        "requests": {"ok": len(good), "failed": len(records) - len(good)},
        "duration_s": duration,
        "requests_per_s": len(good) / duration,
        "output_tokens_per_s": output / duration,
        "total_tokens_per_s": (prompt + output) / duration,
        "prompt_tokens": prompt,
        "output_tokens": output,
        "cached_tokens": sum(record.cached_tokens for record in good),
        "mean_prompt_tokens": prompt / len(good) if good else None,
        "mean_output_tokens": output / len(good) if good else None,
        "counted_by": "usage" if all(record.counted_tokens is not None for record in good) else "chunks",
        "ttft_ms": latency(record.ttft for record in good),
        "itl_ms": latency(gap for record in good for gap in record.gaps),
        "tpot_ms": latency(record.tpot for record in good),
        "e2e_ms": latency(record.e2e for record in good),
        "errors": _errors(records),
        "timeline": timeline(good, began, ended),
    }
    if slo:
        within = sum(_is_within(record, slo) for record in good)
        found["goodput"] = {"slo_ms": dict(slo), "requests": within, "requests_per_s": within / duration}
    return found


def _errors(records: Sequence[Record]) -> list[dict[str, Any]]:
    """By kind, the most frequent first, with the message of the first of each."""
    found: dict[str, dict[str, Any]] = {}
    for record in records:
        if record.error is not None:
            kind = found.setdefault(
                record.error, {"kind": record.error, "count": 0, "message": record.message}
            )
            kind["count"] += 1
    return sorted(found.values(), key=lambda kind: -kind["count"])


def _is_within(record: Record, slo: Mapping[str, float]) -> bool:
    gaps = sorted(record.gaps)
    measured = {
        "ttft": record.ttft,
        "itl": percentile(gaps, 99) if gaps else None,
        "tpot": record.tpot,
        "e2e": record.e2e,
    }
    # What a request has no value of, such as gaps of one token, it can't exceed.
    return all((measured[name] or 0.0) * 1000 <= most for name, most in slo.items())


def timeline(records: Sequence[Record], began: float, ended: float, parts: int = 120) -> dict[str, Any]:
    """Tokens a second, as they came, in equal parts of the time. A chunk counts as its share of its
    request's tokens."""
    step = max((ended - began) / parts, 1e-9)
    tokens = [0.0] * parts
    for record in records:
        chunks = sum(record.chunks)
        if not chunks:
            continue
        share = record.output_tokens / chunks
        for at, count in zip(record.arrivals, record.chunks, strict=True):
            tokens[min(max(int((at - began) / step), 0), parts - 1)] += count * share
    return {"step_s": step, "tokens_per_s": [count / step for count in tokens]}
