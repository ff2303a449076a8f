"""An API pod on a real socket, and a worker without a model that plays what a test wrote for it."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
from arq.connections import ArqRedis
from openai import AsyncOpenAI
from redis.exceptions import RedisError

from llmboost import keys
from llmboost.connection import deserialize
from llmboost.entries import ChoiceDelta, Delta, StreamError, Terminal, TokenLogprob, Usage
from llmboost.jobs import GenerationJob
from llmboost.leases import Claim
from llmboost.queue import JobQueue
from llmboost.registry import ModelCard, Registry, WorkerCard
from llmboost.settings import ApiSettings
from llmboost.streams import StreamEnded, TokenStreams, Writer, persist
from llmboost_api import sse
from llmboost_api.app import create_app
from llmboost_api.server import PodServer

from ..waiting import wait_until
from .answers import Frame, OpenStream, frames_of

MODEL = "meta-llama/Llama-3.1-8B-Instruct"
ROOT = "llama"
"""The name of the queue: `MODEL` is an alias."""
CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
RETRY = sse.RETRY.decode()
WORDS = ["Once", " upon", " a", " time", "."]

Entry = Delta | Terminal
Step = Entry | list[Entry] | Awaitable[object]
"""One entry, several in one write, or something to wait for."""
Script = Callable[[GenerationJob], Iterable[Step]]


def says(
    texts: Sequence[str],
    *,
    choice: int = 0,
    reason: str | None = "stop",
    logprobs: Sequence[TokenLogprob] | None = None,
) -> list[Delta]:
    """One token per text, the last with the finish reason."""
    last = len(texts) - 1
    return [
        Delta(
            [
                ChoiceDelta(
                    choice,
                    position,
                    [100 + position],
                    text,
                    reason if position == last else None,
                    None if logprobs is None else [logprobs[position]],
                )
            ],
            prompt_tokens=5 if position == 0 else None,
        )
        for position, text in enumerate(texts)
    ]


def ends(completion_tokens: int = len(WORDS), *, prompt_tokens: int = 5, cached: int = 0) -> Terminal:
    return Terminal("worker", Usage(prompt_tokens, completion_tokens, cached))


def fails(message: str = "It failed.", **fields: Any) -> Terminal:
    return Terminal("worker", error=StreamError(message, **fields))


def story(job: GenerationJob) -> Iterable[Step]:
    """Every choice says the same words."""
    for choice in range(job.sampling.n):
        yield from says(WORDS, choice=choice)
    yield ends(len(WORDS) * job.sampling.n)


def loses(job: GenerationJob) -> Iterable[Step]:
    """The same of one choice, but its second word is lost, with a server that did not know that it had it."""
    first, _, *rest = says(WORDS)
    return [first, *rest, ends()]


@dataclass
class ScriptedWorker:
    """Claims jobs as a worker does and plays `script` for each."""

    redis: ArqRedis
    queue: JobQueue
    script: Script = story
    jobs: list[GenerationJob] = field(default_factory=list)
    """All that it has claimed."""
    stopped: dict[str, StreamEnded] = field(default_factory=dict)
    """Jobs whose stream somebody else ended."""
    finished: int = 0
    playing: "list[asyncio.Task[None]]" = field(default_factory=list)

    async def announce(self, *names: str) -> None:
        card = WorkerCard("worker-1", ROOT, "scripted", "none", 8, 1, 2)
        models = [ModelCard(name, ROOT, 1000, 1_700_000_000) for name in (ROOT, MODEL, *names)]
        await Registry(self.redis).announce(card, models, ttl=60)

    async def run(self) -> None:
        while True:
            await persist(lambda: self.queue.wait(ROOT))
            for claim in await persist(lambda: self.queue.claim(ROOT, 100, "worker-1", lease=30)):
                self.playing.append(asyncio.create_task(self.play(claim)))

    async def play(self, claim: Claim) -> None:
        definition = await self.redis.get(keys.arq_job(claim.job_id))
        job = deserialize(definition)["a"][0].decode()
        self.jobs.append(job)
        writer = Writer(job.id, claim.attempt)
        try:
            await self.queue.streams.begin(writer, "worker-1")
            for step in self.script(job):
                if isinstance(step, Terminal):
                    await self.queue.streams.seal(job.id, step, writer)
                elif isinstance(step, Delta | list):
                    await self.append(writer, step if isinstance(step, list) else [step])
                else:
                    await step
        except StreamEnded as ended:
            self.stopped[job.id] = ended
        await self.queue.finish(ROOT, claim, "worker-1")
        self.finished += 1

    async def append(self, writer: Writer, entries: Sequence[Entry]) -> None:
        """All in one round trip, so that a reader gets them together."""
        sent = [(writer.job_id, writer.next_id(), entry) for entry in entries]
        for (_, entry_id, _), reply in zip(sent, await self.queue.streams.append(sent), strict=True):
            await self.queue.streams.check_reply(writer, entry_id, reply)


@asynccontextmanager
async def working(redis: ArqRedis, streams: TokenStreams) -> AsyncIterator[ScriptedWorker]:
    """A worker that runs."""
    worker = ScriptedWorker(redis, JobQueue(redis, streams))
    await worker.announce()
    task = asyncio.create_task(worker.run())
    try:
        yield worker
    finally:
        task.cancel()
        await asyncio.wait([task, *worker.playing], timeout=2)
        for each in worker.playing:
            each.cancel()
        for outcome in await asyncio.gather(*worker.playing, return_exceptions=True):
            if isinstance(outcome, Exception) and not isinstance(outcome, RedisError | OSError):
                raise outcome


@dataclass
class RunningPod:
    """A pod that listens on a socket."""

    server: PodServer
    url: str
    http: httpx.AsyncClient
    openai: AsyncOpenAI

    @property
    def generations(self) -> set[Any]:
        running: set[Any] = self.server.config.app.state.pod.generations.running  # type: ignore[union-attr]
        return running

    async def stream(self, path: str, body: dict[str, Any]) -> list[Frame]:
        """All frames of a stream that ends by itself."""
        response = await self.http.post(path, json=body)
        assert response.status_code == 200, response.text
        return frames_of(response.text)

    async def rest(self, path: str, completion_id: str, after: str | None = None, how: str = "header") -> str:
        """What a resumed stream brings, to its end; without the `retry:` at its beginning."""
        headers = {"last-event-id": after} if after and how == "header" else {}
        query = {"starting_after": after} if after and how == "query" else {}
        url = f"{path}/{completion_id}"
        response = await self.http.get(url, params={"stream": "true", **query}, headers=headers)
        assert response.status_code == 200, response.text
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["x-request-id"] == completion_id
        assert response.text.startswith((RETRY + "id: ", RETRY + "data: "))
        assert response.text.count(RETRY) == 1
        return response.text.removeprefix(RETRY)

    @asynccontextmanager
    async def begun(self, path: str, body: dict[str, Any]) -> AsyncIterator[OpenStream]:
        """A stream whose first event has come. It is left at the end of the block, ended or not."""
        async with self.http.stream("POST", path, json=body) as response:
            stream = OpenStream(response)  # Held here: dropping it would close the connection.
            yield await stream.until(1)


@asynccontextmanager
async def serving(settings: ApiSettings) -> AsyncIterator[RunningPod]:
    """A pod under uvicorn, in this loop."""
    server = PodServer(create_app(settings), settings)
    task = asyncio.create_task(server.serve())
    try:
        await started(server, task)
        url = f"http://127.0.0.1:{server.port}"
        async with (
            httpx.AsyncClient(base_url=url, timeout=20) as http,
            AsyncOpenAI(base_url=f"{url}/v1", api_key="-", timeout=20, max_retries=2) as client,
        ):
            yield RunningPod(server, url, http, client)
    finally:
        server.should_exit = True
        await task


async def started(server: PodServer, task: "asyncio.Task[None]") -> None:
    await wait_until(lambda: server.started or task.done(), within=60)
    if task.done():
        task.result()
        raise AssertionError("the server ended before it had started")


def settings_for(redis_url: str, **fields: Any) -> ApiSettings:
    """Quick ones: a free port, no pings, a short drain."""
    defaults: dict[str, Any] = {"redis_url": redis_url, "port": 0, "ping_interval": 0, "drain_timeout": 5}
    return ApiSettings(**{**defaults, **fields})


def chat(**fields: Any) -> dict[str, Any]:
    """A chat request."""
    return {"model": MODEL, "messages": [{"role": "user", "content": "Tell me a story."}], **fields}


def streamed(path: str, **fields: Any) -> dict[str, Any]:
    """A request for a stream, at either endpoint."""
    fields = {"stream": True, **fields}
    return chat(**fields) if path == CHAT else {"model": MODEL, "prompt": "Say", **fields}
