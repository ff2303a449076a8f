"""Webhooks from the seal to the receiver, whoever is there in between."""

import asyncio
import signal
from contextlib import suppress

import pytest
from arq.connections import ArqRedis
from redis.exceptions import RedisError

from llmboost import keys
from llmboost.connection import connect
from llmboost.entries import NO_FOLLOW_UP, StreamError
from llmboost.jobs import new_id, now
from llmboost.streams import TokenStreams
from llmboost_api.ending import CANCELLED
from llmboost_api.webhooks import delivery
from llmboost_api.webhooks.delivery import Webhooks
from tests.commands import llmboost
from tests.waiting import wait_until

from .api_pod import serving, settings_for
from .receiver import SECRET, Receiver, receiving
from .webhook_ends import Ends, ends, quick, receiver

__all__ = ["ends", "quick", "receiver"]

OTHER_SECRET = "whsec_AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"


@pytest.mark.parametrize(
    ("status", "reason", "error"),
    [
        ("completed", "stop", None),
        ("incomplete", "length", None),
        ("failed", "stop", StreamError("It failed.")),
        ("cancelled", "stop", CANCELLED),
    ],
)
async def test_the_end_of_a_response_is_told(
    ends: Ends, receiver: Receiver, status: str, reason: str, error: StreamError | None
) -> None:
    webhooks = ends.webhooks(receiver.url("/hook?token=1"))
    before = int(now())
    async with webhooks:
        response_id = await ends.response(webhooks, reason=reason, error=error)
        await ends.settled()
    (call,) = receiver.calls
    event = call.event()
    assert (event.type, event.data.id) == (f"response.{status}", response_id)
    assert before <= event.created_at <= now()
    assert call.target == "/hook?token=1"
    assert call.headers["host"] == f"127.0.0.1:{receiver.port}"
    assert call.headers["content-type"] == "application/json"
    assert call.headers["webhook-id"] == event.id


async def test_a_response_that_has_lost_a_part_has_failed(ends: Ends, receiver: Receiver) -> None:
    """Though whoever sealed it took it for complete."""
    async with ends.webhooks(receiver.url()) as webhooks:
        await ends.response(webhooks, lost=1)
        await ends.settled()
    assert [call.event().type for call in receiver.calls] == ["response.failed"]


@pytest.mark.parametrize("status", ["completed", "failed", "expired", "cancelled"])
async def test_the_end_of_a_batch_is_told(ends: Ends, receiver: Receiver, status: str) -> None:
    webhooks = ends.webhooks(receiver.url())
    async with webhooks:
        batch_id = await ends.batch(webhooks, status)
        await ends.settled()
    (event,) = [call.event() for call in receiver.calls]
    assert (event.type, event.data.id) == (f"batch.{status}", batch_id)


async def test_a_delivery_is_tried_until_it_is_taken(ends: Ends, receiver: Receiver) -> None:
    """Always in the same words and under the same id, signed anew each time."""
    receiver.statuses = [500, 503, 404, 429]
    webhooks = ends.webhooks(receiver.url(), secrets=(OTHER_SECRET, SECRET))
    async with webhooks:
        await ends.response(webhooks)
        await ends.settled()
    assert len(receiver.calls) == 5
    assert len(receiver.taken) == 1
    assert len({call.headers["webhook-id"] for call in receiver.calls}) == 1
    assert len({call.body for call in receiver.calls}) == 1
    for call in receiver.calls:
        assert call.event(SECRET) == call.event(OTHER_SECRET)


async def test_every_target_is_told_once_by_however_many_pods(ends: Ends, receiver: Receiver) -> None:
    """One that fails costs the others nothing."""
    async with receiving() as dead:
        dead.statuses = [500] * 100
        urls = (receiver.url("/a"), receiver.url("/b"), dead.url())
        pods = [ends.webhooks(*urls) for _ in range(3)]
        async with pods[0], pods[1], pods[2]:
            told = {await ends.response(pods[n % 3]) for n in range(10)}
            told |= {await ends.batch(pods[0], "completed")}
            await wait_until(lambda: len(receiver.taken) >= 2 * len(told))
            for response_id in told:  # which the deliveries were made of by now
                again = pods[0].follow_up(response_id).job
                assert again is not None
                await ends.queue.redis.set(keys.arq_job(again.id), again.definition, ex=60)
                await ends.queue.redis.zadd(again.queue, {again.id: int(now() * 1000)})
            await wait_until(lambda: not any_left(dead))
            await ends.settled()
    for path in ("/a", "/b"):
        assert sorted(call.event().data.id for call in receiver.calls if call.target == path) == sorted(told)
    assert sorted({call.event().data.id for call in dead.taken}) == sorted(told)
    assert len(dead.taken) == len(told)


def any_left(receiver: Receiver) -> bool:
    return bool(receiver.statuses)


async def test_it_is_told_though_the_pod_that_accepted_the_request_has_gone(
    ends: Ends, receiver: Receiver
) -> None:
    """Also if there is no pod at all when the response ends."""
    async with ends.webhooks(receiver.url()) as first:
        response_id = new_id("resp_")
        await ends.accept(response_id, first.follow_up(response_id))
    await ends.seal(response_id)
    assert not receiver.calls
    async with ends.webhooks(receiver.url()):
        await ends.settled()
    assert [call.event().data.id for call in receiver.calls] == [response_id]


async def test_a_pod_that_goes_hands_its_deliveries_over(
    ends: Ends, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once, which is no failure of the target's."""
    monkeypatch.setattr(delivery, "pause", lambda tries: 60)
    receiver.statuses = [None]
    async with ends.webhooks(receiver.url()) as first:
        response_id = await ends.response(first)
        await wait_until(lambda: receiver.calls)
    async with ends.webhooks(receiver.url()):
        await ends.settled()
    assert [call.event().data.id for call in receiver.calls] == [response_id] * 2
    assert len(receiver.taken) == 1


async def test_a_delivery_is_made_though_the_pod_that_made_it_is_killed(
    ends: Ends, receiver: Receiver, redis_url: str
) -> None:
    """By another, under the same id, when arq takes the killed one for dead."""
    receiver.statuses = [None]
    pod = ends.webhooks(receiver.url())
    arguments = ["--redis-url", redis_url, "--port", "0", "--webhook-url", receiver.url()]
    secret = {"LLMBOOST_WEBHOOK_SECRET": SECRET, "LLMBOOST_WEBHOOK_ALLOW_PRIVATE": "true"}
    with llmboost("api", *arguments, env=secret) as killed:
        response_id = await ends.response(pod)
        await wait_until(lambda: receiver.calls, within=60)
        killed.signal(signal.SIGKILL)
        await asyncio.to_thread(killed.wait)
        assert SECRET not in killed.log
    held = [key async for key in ends.queue.redis.scan_iter("arq:in-progress:*")]
    assert [await ends.queue.redis.pttl(key) <= 30_000 for key in held] == [True]
    await ends.queue.redis.pexpire(held[0], 1)
    async with pod:
        await ends.settled()
    assert [call.event().data.id for call in receiver.calls] == [response_id] * 2
    assert len({call.headers["webhook-id"] for call in receiver.calls}) == 1


async def test_deliveries_outlive_a_loss_of_redis(
    ends: Ends, receiver: Receiver, redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """arq's worker ends at any Redis error."""
    client = connect(redis_url)
    webhooks = ends.webhooks(receiver.url())
    async with webhooks:
        told = set()
        for _ in range(5):
            await client.client_kill_filter(_type="normal", skipme=True)
            with suppress(RedisError):
                told.add(await ends.response(webhooks))
        # A job that was cut off as it began waits for 30 s, and each end takes two.
        await wait_until(lambda: {call.event().data.id for call in receiver.taken} >= told, within=120)
        await ends.settled()
    await client.aclose()
    assert told
    assert "webhooks wait for Redis" in caplog.text


async def test_a_target_that_is_gone_is_not_asked_again(
    ends: Ends, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    receiver.statuses = [500, 410]
    webhooks = ends.webhooks(receiver.url("/token"))
    async with webhooks:
        response_id = await ends.response(webhooks)
        await ends.settled()
    assert len(receiver.calls) == 2
    (failed, given_up) = [
        record.getMessage() for record in caplog.records if record.name == delivery.__name__
    ]
    about = f"type=response.completed subject={response_id} target=http://127.0.0.1:{receiver.port} try="
    assert about + "1/15 next_in=0s: status 500" in failed
    assert about + "2/15: status 410" in given_up
    assert "token" not in caplog.text
    assert SECRET not in caplog.text


async def test_a_delivery_is_given_up_after_its_tries(
    ends: Ends, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    receiver.statuses = [500] * 100
    webhooks = ends.webhooks(receiver.url())
    async with webhooks:
        await ends.response(webhooks)
        await ends.settled()
    assert len(receiver.calls) == delivery.MAX_TRIES
    assert "webhook given up" in caplog.records[-1].getMessage()


async def test_without_a_url_there_is_nothing_of_all_this(redis: ArqRedis, redis_url: str) -> None:
    async with serving(settings_for(redis_url)) as pod:
        webhooks: Webhooks = pod.server.config.app.state.pod.webhooks  # type: ignore[union-attr]
        assert webhooks.follow_up("resp_1") is NO_FOLLOW_UP
        assert webhooks.batch_event("batch_1", "completed") is None
        assert not [task for task in asyncio.all_tasks() if "Webhooks" in repr(task)]


async def test_a_pod_delivers(ends: Ends, receiver: Receiver, redis_url: str, streams: TokenStreams) -> None:
    settings = settings_for(
        redis_url, webhook_url=(receiver.url(),), webhook_secret=(SECRET,), webhook_allow_private=True
    )
    async with serving(settings) as pod:
        webhooks: Webhooks = pod.server.config.app.state.pod.webhooks  # type: ignore[union-attr]
        response_id = await ends.response(webhooks)
        await ends.settled()
    assert [call.event().data.id for call in receiver.calls] == [response_id]
