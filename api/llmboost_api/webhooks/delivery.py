"""Deliveries, as arq jobs that any pod runs: whoever accepted the request may be gone.

An end enqueues one job in the very script that makes it the end. That job finds out what has ended how, and
enqueues one delivery for each target, which is tried until the target has taken it, with growing pauses.
Both have ids made of what has ended, so doing either twice changes nothing. A delivery that was taken while
its pod died is made again, with the same `webhook-id`: receivers that must not act twice go by that.
"""

import asyncio
import logging
import random
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from datetime import timedelta
from functools import partial
from types import TracebackType
from typing import Any

import msgspec
from arq.connections import ArqRedis
from arq.worker import Retry, RetryJob, Worker, func
from redis.exceptions import RedisError

from llmboost import keys, webhooks
from llmboost.connection import deserialize, serialize
from llmboost.entries import NO_FOLLOW_UP, ArqJob, FollowUp
from llmboost.jobs import now
from llmboost.settings import ApiSettings
from llmboost.streams import TokenStreams, persist
from llmboost_api.protocol.responses.object import Progress
from llmboost_api.tasks import discard
from llmboost_api.webhooks.events import Event
from llmboost_api.webhooks.sender import WITHIN_S, DeliveryFailed, Sender
from llmboost_api.webhooks.targets import Target, TargetRefused

logger = logging.getLogger(__name__)

POLL_S = 0.5
MAX_TRIES = 15
"""With the pauses below: over three days."""
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 5.0, 12 * 3600.0
_EXPIRES = timedelta(days=5)
_REMEMBERED = timedelta(days=1)
"""How long a delivery that has ended can't be enqueued again: as long as what enqueues it may wait."""
_AT_ONCE = 64
"""Most of them wait for a slow target."""
_JOB_TIMEOUT_S = WITHIN_S + 5.0
"""arq takes a job up again so long (and 10 s) after its pod died."""
_REDIS_WITHIN_S = _JOB_TIMEOUT_S / 4
_FINISH_WITHIN_S = 10.0
_GOODBYE_S = 2.0


class DeliveryWorker(Worker):
    """arq's worker, which diverges in one thing: that a job has ended is written down as soon as Redis takes
    it. arq tries once, and then what was delivered would be delivered again."""

    async def finish_job(self, *args: Any) -> None:
        finish = super().finish_job
        async with asyncio.timeout(_FINISH_WITHIN_S):
            await persist(lambda: finish(*args))


class Webhooks:
    """The webhooks of a pod; while it is entered, it delivers. Without targets there is nothing of all this.

    Raises:
        ValueError: the settings can't be.
    """

    def __init__(self, redis: ArqRedis, streams: TokenStreams, settings: ApiSettings) -> None:
        webhooks.check(settings)
        self._redis = redis
        self._streams = streams
        self._targets = {each.fingerprint: each for each in map(Target, settings.webhook_url)}
        self._secrets = settings.webhook_secret
        self._allow_private = settings.webhook_allow_private
        self._stack = AsyncExitStack()

    # For whoever accepts what will end

    def follow_up(self, response_id: str, follow_up: FollowUp = NO_FOLLOW_UP) -> FollowUp:
        """What else the seal of a background response entails: that its end is told."""
        if not self._targets:
            return follow_up
        definition = _definition("announce_response", response_id)
        return replace(follow_up, job=ArqJob(keys.WEBHOOKS, f"sealed:{response_id}", definition))

    def batch_event(self, batch_id: str, status: str) -> ArqJob | None:
        """What the script that ends a batch enqueues with it; None: nobody is to be told.

        `status`: completed, failed, expired or cancelled.
        """
        if not self._targets:
            return None
        return ArqJob(keys.WEBHOOKS, f"ended:{batch_id}", _definition("announce_batch", batch_id, status))

    # The worker

    async def __aenter__(self) -> "Webhooks":
        if self._targets:
            sender = Sender(self._secrets, allow_private=self._allow_private)
            await self._stack.enter_async_context(sender)
            running = asyncio.create_task(self._run(sender))
            self._stack.push_async_callback(discard, running)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    async def _run(self, sender: Sender) -> None:
        """Works until it is cancelled. Any Redis error ends arq's worker, and leaves its counters wrong: the
        next one is a new one."""
        while True:
            worker = self._worker(sender)
            try:
                await persist(self._redis.ping)
                await _work(worker)
            except (RedisError, OSError) as error:
                logger.warning("webhooks wait for Redis: %s", error)
            except Exception:  # a defect here must not end all deliveries
                logger.exception("webhooks begin anew")
            await asyncio.sleep(POLL_S * random.uniform(0.5, 1.5))

    def _worker(self, sender: Sender) -> Worker:
        async def deliver(ctx: dict[str, Any], fingerprint: str, *event: Any) -> None:
            await self._deliver(sender, ctx["job_try"], fingerprint, Event(*event))

        return DeliveryWorker(
            functions=[
                func(self._announce_response, name="announce_response", max_tries=sys.maxsize),
                func(self._announce_batch, name="announce_batch", max_tries=sys.maxsize),
                func(deliver, name="deliver", keep_result=_REMEMBERED),
            ],
            queue_name=keys.WEBHOOKS,
            redis_pool=self._redis,
            handle_signals=False,
            max_jobs=_AT_ONCE,
            max_tries=MAX_TRIES,
            job_timeout=_JOB_TIMEOUT_S,
            keep_result=0,
            poll_delay=POLL_S,
            health_check_interval=30,
            log_results=False,
            job_serializer=serialize,
            job_deserializer=deserialize,
        )

    # arq calls these

    async def _announce_response(self, ctx: dict[str, Any], response_id: str) -> None:
        """Tells how a response ended."""
        async with _again_if_redis_fails():
            log = await persist(lambda: self._streams.read(response_id))
        if not log:
            logger.info("no webhook for %s: it was deleted", response_id)
        else:
            status = Progress.of(log).status
            await self._enqueue(Event.of("response", status, response_id, ctx["score"] // 1000))

    async def _announce_batch(self, ctx: dict[str, Any], batch_id: str, status: str) -> None:
        """Tells that a batch has ended so."""
        await self._enqueue(Event.of("batch", status, batch_id, ctx["score"] // 1000))

    async def _enqueue(self, event: Event) -> None:
        """One delivery per target, each with tries of its own."""
        async with _again_if_redis_fails():
            for fingerprint in self._targets:
                await persist(partial(self._enqueue_delivery, fingerprint, event))

    async def _enqueue_delivery(self, fingerprint: str, event: Event) -> None:
        await self._redis.enqueue_job(
            "deliver",
            fingerprint,
            *msgspec.structs.astuple(event),
            _job_id=f"{event.id}:{fingerprint}",
            _queue_name=keys.WEBHOOKS,
            _expires=_EXPIRES,
        )

    async def _deliver(self, sender: Sender, job_try: int, fingerprint: str, event: Event) -> None:
        """One try.

        Raises:
            Retry: it failed, and is to be tried again.
        """
        target = self._targets.get(fingerprint)
        about = f"event={event.id} type={event.type} subject={event.subject} target="
        about += f"{target.name if target else fingerprint} try={job_try}/{MAX_TRIES}"
        try:
            if target is None:
                raise DeliveryFailed("this pod's --webhook-url does not name the target")
            status = await sender.send(event, target)
        except TargetRefused as refused:
            logger.error("webhook refused: %s: %s", about, refused)
        except DeliveryFailed as failure:
            if failure.final or job_try >= MAX_TRIES:
                logger.error("webhook given up: %s: %s", about, failure)
                return
            seconds = pause(job_try)
            logger.warning("webhook failed: %s next_in=%.0fs: %s", about, seconds, failure)
            raise Retry(defer=seconds) from None
        else:
            logger.info("webhook delivered: %s status=%d", about, status)


def pause(tries: int) -> float:
    """Seconds until the next try: 5, 15, 45, ... 12 hours; with jitter, for many may have failed together."""
    longest: float = min(_FIRST_PAUSE_S * 3 ** (tries - 1), _LONGEST_PAUSE_S)
    return longest * random.uniform(0.8, 1.2)


@asynccontextmanager
async def _again_if_redis_fails() -> AsyncIterator[None]:
    """arq takes a job that fails, or lasts too long, for done; one that Redis failed is not."""
    try:
        async with asyncio.timeout(_REDIS_WITHIN_S):
            yield
    except (RedisError, OSError) as error:
        raise RetryJob(str(error)) from error


def _definition(function: str, *args: str) -> bytes:
    return serialize({"t": None, "f": function, "a": args, "k": {}, "et": int(now() * 1000)})


async def _work(worker: Worker) -> None:
    """arq's loop. When Redis fails it, what is under way may come to its end; when it is cancelled, that is
    handed over, for arq puts a job that is cancelled back into its queue."""
    tasks = worker.tasks
    try:
        await worker.main()
    except asyncio.CancelledError:
        for task in tasks.values():
            task.cancel()
        if tasks:
            await asyncio.wait(tasks.values(), timeout=_GOODBYE_S)
        raise
    except Exception:
        await asyncio.gather(*tasks.values(), return_exceptions=True)
        raise
