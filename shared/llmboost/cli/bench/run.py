"""`llmboost bench`: one measurement for each load."""

import asyncio
import time
from collections.abc import Callable
from typing import Any

from llmboost.cli.bench import arrivals
from llmboost.cli.bench.client import Client
from llmboost.cli.bench.options import Options
from llmboost.cli.bench.progress import Progress, State
from llmboost.cli.bench.record import Record
from llmboost.cli.bench.summary import percentile, summarize
from llmboost.cli.bench.target import Target, find
from llmboost.cli.bench.values import Load
from llmboost.cli.bench.workload import Question, Workload, read
from llmboost.cli.flags import UsageError

BUSY = 0.8
"""Of a core: from there on the generator may be what is measured."""
LATE_S = 0.01
"""By which requests may be sent late."""


def measure(options: Options, progress: Progress | None = None) -> dict[str, Any]:
    """Measures a server; the report, in full. Ctrl-C ends it early: the report has what there is.

    Raises:
        TargetError: the server can't be measured.
        UsageError: the input is wrong.
    """
    questions = None if options.input is None else read(options.input)
    measurement = Measurement(options, progress or Progress(), questions)
    try:
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            runner.run(measurement.run())
    except KeyboardInterrupt:
        if measurement.target is None:
            raise
        measurement.was_interrupted = True
    return measurement.report()


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:  # there is none for Windows
        return None
    return uvloop.new_event_loop


class Measurement:
    """All points, one after another."""

    def __init__(self, options: Options, progress: Progress, questions: list[Question] | None) -> None:
        self.options = options
        self.target: Target | None = None
        self.was_interrupted = False
        self._progress = progress
        self._questions = questions
        self._points: list[Point] = []

    async def run(self) -> None:
        options = self.options
        client = Client(options.url, options.api_key, options.timeout)
        try:
            is_chat = self._questions is not None and self._questions[0].is_chat
            self.target = await find(client, options, messages=is_chat)
            self._check_length(self.target)
            workload = Workload(options, self.target, self._questions)
            for number, load in enumerate(options.loads):
                point = Point(options, load, number, client, workload)
                self._points.append(point)
                await point.run(self._progress)
        finally:
            client.close()

    def _check_length(self, target: Target) -> None:
        options = self.options
        if self._questions is not None or target.max_model_len is None:
            return
        needed = options.shared_prefix_tokens + options.prompt_tokens.most + options.output_tokens.most
        if needed > target.max_model_len:
            raise UsageError(
                f"{target.model} takes {target.max_model_len} tokens, prompt and answer together, and these "
                f"are up to {needed}: choose smaller --prompt-tokens or --output-tokens"
            )

    def report(self) -> dict[str, Any]:
        """What there is."""
        options, target = self.options, self.target
        assert target is not None
        prompts: dict[str, Any] = {"input": str(options.input)}
        if options.input is None:
            prompts = {
                "prompt_tokens": str(options.prompt_tokens),
                "shared_prefix_tokens": options.shared_prefix_tokens,
                "num_prefixes": options.num_prefixes if options.shared_prefix_tokens else 0,
                "prompts_are": "text" if target.highest_id is None else "token ids",
            }
        points = [point.result() for point in self._points if point.records]
        return {
            "label": options.label or target.model,
            "url": options.url,
            "model": target.model,
            "endpoint": target.endpoint,
            "workload": {
                **prompts,
                "output_tokens": str(options.output_tokens),
                "temperatures": list(options.temperatures),
                "ignore_eos": options.ignore_eos and "ignore_eos" not in target.refused,
                "extra_body": dict(options.extra_body or {}),
                "burstiness": options.burstiness,
                "seed": options.seed,
            },
            "notes": list(target.notes),
            "interrupted": self.was_interrupted,
            "points": points,
        }


class Point:
    """One load."""

    def __init__(self, options: Options, load: Load, number: int, client: Client, workload: Workload) -> None:
        self.load = load
        self.records: list[Record] = []
        self._options = options
        self._phase = f"point {number}"
        self._client = client
        self._workload = workload
        self._began = self._ended = 0.0
        self._cpu = 0.0
        self._late: list[float] = []

    async def run(self, progress: Progress) -> None:
        """Warms the server up, then measures."""
        options, load = self._options, self.load
        progress.warm(load)
        await self._warm_up()
        requests = options.num_requests
        if requests is None and options.duration is None:
            requests = max(16, 4 * load.concurrency if load.concurrency else round(30 * (load.rate or 0)))
        limit = arrivals.Limit(requests, options.duration)
        progress.begin(load, requests)
        watching = asyncio.create_task(self._watch(progress))
        cpu = time.thread_time()
        self._began = time.perf_counter()
        try:
            if load.rate is not None:
                seed = f"{options.seed} {self._phase}"
                self._late = await arrivals.at_a_rate(load.rate, options.burstiness, seed, limit, self._send)
            else:
                await arrivals.at_a_time(load.concurrency or 1, limit, self._send)
        finally:
            self._ended = time.perf_counter()
            self._cpu = time.thread_time() - cpu
            watching.cancel()
            progress.show(self._state())

    async def _warm_up(self) -> None:
        count = self._options.warmup
        if count is None:
            count = self.load.concurrency or 4
        path = self._workload.path
        async with asyncio.TaskGroup() as tasks:
            for number in range(count):
                body = self._workload.warmup(self._phase, number)
                tasks.create_task(self._client.stream(path, body))

    async def _send(self, number: int) -> None:
        body = self._workload.body(self._phase, number)
        self.records.append(await self._client.stream(self._workload.path, body))

    async def _watch(self, progress: Progress) -> None:
        while True:
            await asyncio.sleep(progress.every)
            progress.show(self._state())

    def _state(self) -> State:
        failed = sum(record.error is not None for record in self.records)
        return State(len(self.records), failed, self._client.running, self._client.chunks)

    def result(self) -> dict[str, Any]:
        """Its figures."""
        found = summarize(self.records, self._began, self._ended, self._options.slo)
        busy = self._cpu / found["duration_s"]
        warnings = []
        if busy > BUSY:
            warnings.append(
                f"the generator took {busy:.0%} of a core: it, and not the server, may be what is measured"
            )
        if self._late and (late := percentile(sorted(self._late), 99)) > LATE_S:
            warnings.append(f"a hundredth of the requests were sent {late * 1000:.0f} ms late, or more")
        if found["counted_by"] == "chunks" and found["requests"]["ok"]:
            warnings.append("tokens are counted as chunks, which may hold several: the server sends no usage")
        return {
            "load": str(self.load),
            "concurrency": self.load.concurrency,
            "request_rate": self.load.rate,
            **found,
            "generator_cpu": busy,
            "warnings": warnings,
        }
