"""Sharing: interactive requests on a worker whose every slot is taken by batch jobs.

One worker with few slots, one pod and one Redis, as processes. Each round runs the batch alone, then the
batch with interactive requests that arrive at random (Poisson), then the same requests alone at the same
times. The interactive ones are streamed over HTTP; the batch is put into the queue, all of it at once. Last,
as a contrast, a batch whose jobs are no batch jobs.

    python -m benchmarks.sharing [--rounds 3] [--slots 4] [--jobs 48] [--tokens 300] [--rate 2]
"""

import argparse
import asyncio
import itertools
import json
import random
import statistics
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import httpx
from tests.e2e.system import MODEL, ONE_THREAD, System

from llmboost.connection import connect
from llmboost.jobs import GenerationJob, JobClass, Prompt, SamplingParams, new_id, now
from llmboost.keys import stream
from llmboost.queue import JobQueue
from llmboost.registry import Registry, WorkerCard
from llmboost.streams import BEGINNING, SEAL_ID, TokenStreams
from llmboost.transcript import Transcript

REPLY_TOKENS = 24
"""Of an interactive request."""
QUESTION = "Tom had a red ball. One day he took it to the park, and there he met a dog. The dog"
STORY = "Once upon a time there was a little girl named Lily, who"


@dataclass
class Answer:
    """An interactive request, in seconds."""

    arrived: float
    """After the beginning of its phase."""
    first_token: float = 0.0
    """After its arrival."""
    total: float = 0.0
    id: str = ""


@dataclass
class Phase:
    """What came of some work."""

    makespan: float = 0.0
    """Seconds until the batch was done."""
    answers: list[Answer] = field(default_factory=list)
    evictions: int = 0
    computed: int = 0
    """Tokens that the engine computed."""
    emitted: int = 0
    """Tokens in the streams."""

    @property
    def first_tokens(self) -> list[float]:
        return [answer.first_token for answer in self.answers]

    @property
    def busy(self) -> float:
        """Seconds in which an interactive request was being answered."""
        seconds = until = 0.0
        for answer in sorted(self.answers, key=lambda each: each.arrived):
            end = answer.arrived + answer.total
            seconds += max(0.0, end - max(until, answer.arrived))
            until = max(until, end)
        return seconds


class Bench:
    """A system and what its clients do."""

    def __init__(self, system: System, options: argparse.Namespace) -> None:
        self.options = options
        self.redis = connect(system.redis_url)
        self.streams = TokenStreams(self.redis, 600)
        self.queue = JobQueue(self.redis, self.streams)
        self.http = httpx.AsyncClient(base_url=system.url, timeout=600)

    async def phase(
        self, arrivals: list[float] | None = None, job_class: JobClass | None = "batch", seed: int = 0
    ) -> Phase:
        """Runs the batch, unless its class is None, while requests arrive: at these times, or if there are
        none given at random ones for as long as the batch runs."""
        phase = Phase()
        before = await self._card()
        began = time.perf_counter()
        jobs = [self._job(number, job_class) for number in range(self.options.jobs)] if job_class else []
        batch = asyncio.create_task(self._run(jobs))
        asking: list[asyncio.Task[Answer]] = []
        async for at in _due(_poisson(self.options.rate, seed) if arrivals is None else arrivals, began):
            if arrivals is None and batch.done():
                break
            asking.append(asyncio.create_task(self._ask(at)))
        await batch
        phase.makespan = batch.result() - began
        phase.answers = [await each for each in asking]
        after = await self._card()
        phase.evictions = after.evictions - before.evictions
        phase.computed = after.output_tokens - before.output_tokens
        for job_id in [*(job.id for job in jobs), *(answer.id for answer in phase.answers)]:
            transcript = Transcript()
            for entry_id, entry in await self.streams.read(job_id):
                transcript.apply(entry_id, entry)
            phase.emitted += transcript.completion_tokens
        return phase

    def _job(self, number: int, job_class: JobClass) -> GenerationJob:
        sampling = SamplingParams(seed=number, max_tokens=self.options.tokens, ignore_eos=True)
        return GenerationJob(
            id=new_id("bench"),
            model=MODEL,
            prompt=Prompt(text=STORY),
            sampling=sampling,
            job_class=job_class,
            needs_audience=False,
            created=now(),
            deadline=now() + 3600,
        )

    async def _run(self, jobs: list[GenerationJob]) -> float:
        """Submits them all; the time when the last of them has ended."""
        for job in jobs:
            await self.queue.submit(job)
        for job in jobs:
            cursor = BEGINNING
            while cursor != SEAL_ID:
                for _, raw in await self.redis.xread({stream(job.id): cursor}, block=2000):
                    cursor = raw[-1][0].decode()
        return time.perf_counter()

    async def _ask(self, at: float) -> Answer:
        answer = Answer(at)
        began = time.perf_counter()
        body = {
            "model": MODEL,
            "prompt": QUESTION,
            "max_tokens": REPLY_TOKENS,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
        }
        async with self.http.stream("POST", "/v1/completions", json=body) as response:
            response.raise_for_status()
            async for line in response.aiter_lines():
                if line.startswith("data: {") and not answer.id:
                    answer.first_token = time.perf_counter() - began
                    answer.id = json.loads(line[6:])["id"]
        answer.total = time.perf_counter() - began
        return answer

    async def _card(self) -> WorkerCard:
        """Of the worker, when it has nothing to do; its figures are those of its last heartbeat."""
        calm = 0
        while True:
            [card] = await Registry(self.redis).workers()
            calm = calm + 1 if card.running + card.waiting == 0 else 0
            if calm == 2:
                return card
            await asyncio.sleep(1.0)


def _poisson(rate: float, seed: int) -> list[float]:
    gaps = random.Random(seed)
    return list(itertools.accumulate(gaps.expovariate(rate) for _ in range(10_000)))


async def _due(arrivals: list[float], began: float) -> AsyncIterator[float]:
    for at in arrivals:
        await asyncio.sleep(max(0.0, began + at - time.perf_counter()))
        yield at


async def measure(system: System, options: argparse.Namespace) -> dict[str, Any]:
    """Every round, and what it comes to."""
    bench = Bench(system, options)
    await bench.phase([0.5 * number for number in range(6)], None)  # warm
    rounds: list[tuple[Phase, Phase, Phase]] = []
    for seed in range(options.rounds):
        alone = await bench.phase([])
        shared = await bench.phase(seed=seed)
        idle = await bench.phase([answer.arrived for answer in shared.answers], None)
        rounds.append((alone, shared, idle))
        print(f"round {seed + 1}: {_result([rounds[-1]])}", file=sys.stderr, flush=True)
    contrast = await bench.phase(job_class="interactive")
    return {**_result(rounds), "ttft_p50_ms_in_one_class": _ms(contrast.first_tokens)}


def _result(rounds: list[tuple[Phase, Phase, Phase]]) -> dict[str, Any]:
    loaded = [seconds for _, shared, _ in rounds for seconds in shared.first_tokens]
    idle = [seconds for _, _, alone in rounds for seconds in alone.first_tokens]
    evictions = sum(shared.evictions for _, shared, _ in rounds)
    twice = sum(shared.computed - shared.emitted for _, shared, _ in rounds)
    makespans = [shared.makespan / (alone.makespan + idle.busy) for alone, shared, idle in rounds]
    return {
        "interactive": len(loaded),
        "ttft_p50_ms": {"shared": _ms(loaded), "idle": _ms(idle)},
        "ttft_ratio": round(statistics.median(loaded) / statistics.median(idle), 2),
        "makespan_s": [
            {name: round(s, 2) for name, s in zip(("shared", "alone", "interactive"), each, strict=True)}
            for each in ((shared.makespan, alone.makespan, idle.busy) for alone, shared, idle in rounds)
        ],
        "makespan_ratio": round(statistics.median(makespans), 3),
        "evictions": evictions,
        "decoded_twice": twice,
        "decoded_twice_per_eviction": round(twice / max(evictions, 1), 2),
    }


def _ms(seconds: list[float]) -> float:
    return round(statistics.median(seconds) * 1000, 1)


def main() -> None:
    """Prints the result as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--slots", type=int, default=4)
    parser.add_argument("--jobs", type=int, default=48, help="of the batch")
    parser.add_argument("--tokens", type=int, default=300, help="of each of them")
    parser.add_argument("--rate", type=float, default=2.0, help="interactive requests a second")
    options = parser.parse_args()
    with System() as system:
        system.start_worker(*ONE_THREAD, "--max-num-seqs", str(options.slots))
        system.start_pod()
        system.await_worker("worker")
        print(json.dumps(asyncio.run(measure(system, options)), indent=2))


if __name__ == "__main__":
    main()
