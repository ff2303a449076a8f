"""Ends that webhooks tell of, and a receiver of these."""

from collections.abc import AsyncIterator

import pytest

from llmboost import keys
from llmboost.entries import ChoiceDelta, Delta, FollowUp, StreamError, Terminal, Usage
from llmboost.jobs import GenerationJob, Prompt, SamplingParams, new_id, now
from llmboost.queue import JobQueue
from llmboost.streams import Writer
from llmboost_api.webhooks import delivery
from llmboost_api.webhooks.delivery import Webhooks
from tests.waiting import wait_until

from .api_pod import settings_for
from .receiver import SECRET, Receiver, receiving


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery, "POLL_S", 0.01)
    monkeypatch.setattr(delivery, "pause", lambda tries: 0.02)


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with receiving() as running:
        yield running


class Ends:
    """Requests that are accepted, and come to their end."""

    def __init__(self, queue: JobQueue, redis_url: str) -> None:
        self.queue = queue
        self.redis_url = redis_url

    def webhooks(
        self, *urls: str, secrets: tuple[str, ...] = (SECRET,), allow_private: bool = True
    ) -> Webhooks:
        """A pod's."""
        settings = settings_for(
            self.redis_url,
            webhook_url=urls,
            webhook_secret=secrets,
            webhook_allow_private=allow_private,
        )
        return Webhooks(self.queue.redis, self.queue.streams, settings)

    async def response(
        self, webhooks: Webhooks, *, reason: str = "stop", error: StreamError | None = None, lost: int = 0
    ) -> str:
        """A response that was asked for, has said something, and is sealed.

        `lost`: so many tokens of it are not there any more, those before what it says.
        """
        response_id = new_id("resp_")
        await self.accept(response_id, webhooks.follow_up(response_id))
        writer = Writer(response_id, 1)
        await self.queue.streams.begin(writer, "worker")
        said = Delta([ChoiceDelta(0, lost, [1], "Once", reason)])
        await self.queue.streams.append([(response_id, writer.next_id(), said)])
        await self.seal(response_id, error)
        return response_id

    async def accept(self, response_id: str, follow_up: FollowUp) -> None:
        job = GenerationJob(
            id=response_id,
            model="llama",
            prompt=Prompt(text="a"),
            sampling=SamplingParams(),
            needs_audience=False,
            created=now(),
            deadline=now() + 60,
        )
        await self.queue.submit(job, follow_up=follow_up)
        await self.queue.discard(response_id)

    async def seal(self, response_id: str, error: StreamError | None = None) -> None:
        await self.queue.streams.seal(response_id, Terminal("worker", None if error else Usage(1, 1), error))

    async def batch(self, webhooks: Webhooks, status: str) -> str:
        """As the script does that ends a batch."""
        batch_id = new_id("batch_")
        job = webhooks.batch_event(batch_id, status)
        assert job is not None
        async with self.queue.redis.pipeline(transaction=True) as pipe:
            pipe.set(keys.arq_job(job.id), job.definition, ex=86400)
            pipe.zadd(job.queue, {job.id: int(now() * 1000)})
            await pipe.execute()
        return batch_id

    async def settled(self) -> None:
        """Nothing is left to do."""
        await wait_until(self._none_left)

    async def _none_left(self) -> bool:
        return bool(await self.queue.redis.zcard(keys.WEBHOOKS) == 0)


@pytest.fixture
def ends(queue: JobQueue, redis_url: str) -> Ends:
    return Ends(queue, redis_url)
