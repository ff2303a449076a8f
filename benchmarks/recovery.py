"""Recovery: from the moment a stream's worker is lost to the client's next token.

Two workers, one pod, one Redis, as processes; the client reads one stream at a time over HTTP. Its worker is
killed (SIGKILL), told to go (SIGTERM) or frozen (SIGSTOP), and replaced before the next round.

    python -m benchmarks.recovery [--kills 20] [--others 8] [--lease 3]
"""

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from tests.e2e.system import MODEL
from tests.faults.fleet import Fleet

from llmboost import keys
from llmboost.connection import BLOCK_S, connect
from llmboost.entries import Delta, Started, decode
from llmboost.streams import BEGINNING

TOKENS_BEFORE = 20
"""That the client has read when the worker is lost."""


@dataclass
class Stream:
    """One stream as its client sees it, and as the log has it."""

    id: str = ""
    arrivals: list[float] = field(default_factory=list)
    """Monotonic times of the chunks with text."""
    entries: list[tuple[float, type]] = field(default_factory=list)
    """Monotonic times at which entries were seen in the log, and their kinds."""
    worker: str = ""
    """That began the newest attempt."""


@dataclass
class Recovery:
    """Seconds from the loss of the worker."""

    lapse: float
    """To the end of its lease, as the queue had it."""
    fence: float
    """To the fence of the next attempt."""
    token: float
    """To the next token in the log."""
    client: float
    """To the next token in the client's hands."""


@asynccontextmanager
async def streaming(fleet: Fleet) -> AsyncIterator[Stream]:
    """A stream that is read, and its log followed, for as long as the block lasts."""
    stream = Stream()
    body = {
        "model": MODEL,
        "prompt": "Once upon a time",
        "max_tokens": 900,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
    }

    async def read() -> None:
        async with (
            httpx.AsyncClient(base_url=fleet.url, timeout=120) as http,
            http.stream("POST", "/v1/completions", json=body) as response,
        ):
            response.raise_for_status()
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    stream.arrivals.append(time.monotonic())
                    stream.id = stream.id or line.partition('"id":"')[2].partition('"')[0]

    async def follow() -> None:
        redis = connect(fleet.redis_url)
        key, after = keys.stream(stream.id), BEGINNING
        try:
            while True:
                for _, raw in await redis.xread({key: after}, block=int(BLOCK_S * 1000)):
                    for entry_id, entry in decode(raw):
                        after = entry_id
                        if isinstance(entry, Started):
                            stream.worker = entry.worker
                        stream.entries.append((time.monotonic(), type(entry)))
        finally:
            await redis.aclose()

    tasks = [asyncio.create_task(read())]
    try:
        await _until(lambda: len(stream.arrivals) >= TOKENS_BEFORE, tasks)
        tasks.append(asyncio.create_task(follow()))
        await _until(lambda: bool(stream.worker), tasks)
        yield stream
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _until(condition: Callable[[], bool], tasks: list["asyncio.Task[None]"]) -> None:
    while not condition():
        for task in tasks:
            if task.done():
                task.result()
                raise RuntimeError("the stream ended too early for a measurement")
        await asyncio.sleep(0.001)


async def recover(fleet: Fleet, lose: Callable[[str], Any]) -> Recovery:
    """Loses the worker of a stream and waits for its next token."""
    redis = connect(fleet.redis_url)
    async with streaming(fleet) as stream:
        name = fleet.name_of(stream.worker)
        score = await redis.zscore(keys.leases(MODEL), stream.id)
        seconds, micro = await redis.time()
        lapse = (score or 0) / 1000 - seconds - micro / 1e6
        seen, read = len(stream.entries), stream.worker
        lost_at = time.monotonic()
        lose(name)
        # What was under way may still arrive; what follows the next fence is the other worker's.
        await _until(lambda: stream.worker != read, [])
        fence_at = next(at for at, kind in stream.entries[seen:] if kind is Started)
        await _until(lambda: any(at >= fence_at and kind is Delta for at, kind in stream.entries), [])
        token_at = next(at for at, kind in stream.entries if at >= fence_at and kind is Delta)
        await _until(lambda: stream.arrivals[-1] > fence_at, [])
        client_at = next(at for at in stream.arrivals if at > fence_at)
    await redis.aclose()
    return Recovery(lapse, fence_at - lost_at, token_at - lost_at, client_at - lost_at)


async def measure(kills: int, others: int, lease: float) -> dict[str, list[Recovery]]:
    """Every fault in turn, as often as asked for."""
    found: dict[str, list[Recovery]] = {}
    flags = ("--lease", str(lease), "--max-tries", "1000")
    with tempfile.TemporaryDirectory() as folder, Fleet(Path(folder), pods=1, worker_flags=flags) as fleet:
        faults = {
            "killed": (kills, fleet.kill),
            "told to go": (others, fleet.tell_to_go),
            "frozen": (others, fleet.freeze),
        }
        for fault, (rounds, lose) in faults.items():
            for number in range(1, rounds + 1):
                await fleet.ready()
                recovery = await recover(fleet, lose)
                found.setdefault(fault, []).append(recovery)
                print(f"{fault} {number}: {recovery}", file=sys.stderr, flush=True)
                fleet.mend()
    return found


def report(found: dict[str, list[Recovery]], lease: float) -> str:
    """A table in Markdown: multiples of the lease, and where the time went."""
    lines = [
        "| the worker is | n | median | worst | median, of it until the lease ends | until the fence | "
        "until the token | until the client has it |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for fault, rounds in found.items():
        total = [each.client / lease for each in rounds]

        def median(parts: list[float]) -> str:
            return f"{statistics.median(parts):.3f} s"

        ends = [each.lapse if fault != "told to go" else 0.0 for each in rounds]
        lines.append(
            f"| {fault} | {len(rounds)} | {statistics.median(total):.2f} | {max(total):.2f} | "
            f"{median(ends)} | "
            f"{median([each.fence - end for each, end in zip(rounds, ends, strict=True)])} | "
            f"{median([each.token - each.fence for each in rounds])} | "
            f"{median([each.client - each.token for each in rounds])} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--others", type=int, default=8, help="hand-overs, and freezes")
    parser.add_argument("--lease", type=float, default=3.0, help="seconds")
    options = parser.parse_args()
    print(report(asyncio.run(measure(options.kills, options.others, options.lease)), options.lease))


if __name__ == "__main__":
    main()
