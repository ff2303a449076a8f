"""Clients that send a request again, and clients that wait for no answer, while what serves them dies."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any
from uuid import uuid4

import pytest
from openai import AsyncOpenAI, DefaultAsyncHttpxClient
from redis.asyncio import Redis

from llmboost import keys
from llmboost.embedded import free_port
from llmboost.entries import Started
from llmboost.streams import persist
from tests.e2e.system import MODEL
from tests.faults.fleet import Fleet
from tests.faults.requests import THINGS
from tests.integration.receiver import SECRET, receiving
from tests.waiting import wait_until

REQUESTS = 24
RETRIES = 12
ENDED_S = 120.0
"""Within which all has come to its end. Far beyond what it takes, on a crowded machine too."""
GRACE_S = "30"
"""A pod that was killed may take so long to be there again, while its clients come back to it."""
PORT = free_port()


@pytest.fixture(scope="module")
def file_fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Its pods tell the end of background responses to this process."""
    told = ("--webhook-url", f"http://127.0.0.1:{PORT}/hook", "--webhook-secret", SECRET)
    with Fleet(
        tmp_path_factory.mktemp("fleet"),
        worker_flags=("--lease", "2", "--max-tries", "100"),
        pod_flags=("--grace", GRACE_S, *told, "--webhook-allow-private"),
    ) as fleet:
        yield fleet


@asynccontextmanager
async def clients(fleet: Fleet) -> AsyncIterator[Callable[[int], AsyncOpenAI]]:
    """OpenAI's own, as many as there are pods: the one of a number stays with its pod."""
    async with AsyncExitStack() as stack:
        made = []
        for url in fleet.urls:
            plain = DefaultAsyncHttpxClient(verify=False, timeout=None)
            client = AsyncOpenAI(base_url=f"{url}/v1", api_key="-", http_client=plain, max_retries=RETRIES)
            made.append(await stack.enter_async_context(client))
        yield lambda number: made[number % len(made)]


async def ask(client: AsyncOpenAI, name: str, number: int, **fields: Any) -> dict[str, Any]:
    """The answer to the request of that number: to a chat, or to what a response is asked for. `name` is what
    its idempotency key begins with."""
    question = f"Tell me about {THINGS[number % len(THINGS)]} and the number {number}."
    named: dict[str, Any] = {"extra_headers": {"Idempotency-Key": f"{name} {number}"}, **fields}
    sampling: dict[str, Any] = {"temperature": 1.0}  # without a seed: who generates twice, answers twice
    if number % 3 == 0 or "background" in fields:
        response = await client.responses.create(
            model=MODEL,
            input=question,
            max_output_tokens=60,
            extra_body={"ignore_eos": True},
            **sampling,
            **named,
        )
        return response.to_dict()
    completion = await client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": question}],
        max_tokens=60,
        extra_body={"ignore_eos": True},
        store=number % 2 == 0,
        **sampling,
        **named,
    )
    return completion.to_dict()


async def streams(redis: Redis) -> set[str]:
    """Ids of all there are."""
    before, _, after = keys.stream("*").partition("*")
    names = await persist(lambda: redis.keys(keys.stream("*")))
    return {name.decode().removeprefix(before).removesuffix(after) for name in names}


async def begun(redis: Redis, fleet: Fleet, before: set[str], count: int) -> None:
    """Waits for so many attempts at all that is new."""

    async def so_many() -> bool:
        logs = [await fleet.streams(redis).read(each) for each in await streams(redis) - before]
        return sum(isinstance(entry, Started) for log in logs for _, entry in log) >= count

    await wait_until(so_many, within=ENDED_S, every=0.02)


async def forget_deliveries(redis: Redis) -> None:
    """Those whose pod died before it could say that they were made, and which wait for half a minute."""
    ids = [each.decode() for each in await redis.zrange(keys.WEBHOOKS, 0, -1)]
    names = [key(each) for each in ids for key in (keys.arq_job, keys.arq_retry)]
    await redis.delete(keys.WEBHOOKS, *names)


@pytest.mark.parametrize("what", ["pods", "Redis"])
async def test_requests_sent_again_are_answered_once(fleet: Fleet, what: str) -> None:
    """Each goes to both pods, by clients that send it again when it fails; in the middle of all of them the
    pods are killed in turn, or Redis is, twice. Both clients get the answer of the same generation."""
    async with clients(fleet) as client, fleet.redis() as redis:
        before, name = await streams(redis), uuid4().hex
        asking = [
            asyncio.create_task(ask(client(pod), name, number))
            for number in range(REQUESTS)
            for pod in range(2)
        ]
        for pod, count in zip(fleet.pods, (2, REQUESTS // 2), strict=True):
            await begun(redis, fleet, before, count)
            if what == "pods":
                fleet.kill(pod)
                fleet.mend()
                await fleet.ready()
            else:
                fleet.redis_server.kill()
                fleet.redis_server.start()
        async with asyncio.timeout(ENDED_S):
            answers = await asyncio.gather(*asking)
        assert answers[0::2] == answers[1::2]
        ids = {answer["id"] for answer in answers}
        assert await streams(redis) - before == ids
        assert len(ids) == REQUESTS
        again = [await ask(client(1), name, number) for number in range(REQUESTS)]
        assert again == answers[0::2]
        assert await streams(redis) - before == ids


async def test_what_runs_in_the_background_ends_and_is_told(fleet: Fleet) -> None:
    """The pods that have accepted responses are killed, and then a worker: each response comes to its end,
    whole, and its end is told; again perhaps, but as the same event."""
    async with clients(fleet) as client, fleet.redis() as redis, receiving(port=PORT) as receiver:
        before, name = await streams(redis), uuid4().hex
        asking = [
            asyncio.create_task(ask(client(number), name, number, background=True))
            for number in range(REQUESTS)
        ]
        told: dict[str, set[str]] = {}

        def all_told(count: int) -> bool:
            for call in receiver.taken:
                told.setdefault(call.event().data.id, set()).add(call.headers["webhook-id"])
            return len(told) >= count

        for part, count in ((fleet.pods[0], 2), (fleet.pods[1], 10), (fleet.worker_names[0], 18)):
            await begun(redis, fleet, before, count)
            fleet.kill(part)
            fleet.mend()
        async with asyncio.timeout(ENDED_S):
            ids = {answer["id"] for answer in await asyncio.gather(*asking)}
        await wait_until(lambda: all_told(REQUESTS), within=ENDED_S)
        assert told.keys() == ids == await streams(redis) - before
        assert all(len(events) == 1 for events in told.values())
        await fleet.ready()
        for number, response_id in enumerate(ids):
            response = await client(number).responses.retrieve(response_id)
            assert response.status == "incomplete"  # All its tokens are there.
            assert response.usage is not None
            assert response.usage.output_tokens == 60
        types = {call.event().type for call in receiver.taken}
        assert types == {"response.incomplete"}
        await forget_deliveries(redis)
