"""The jobs of one completion, from submission to their last entry. Whoever submits them and whoever comes
later to read them follow the same streams."""

import asyncio
import logging
from collections.abc import Coroutine, Sequence
from contextlib import AsyncExitStack
from functools import partial
from types import TracebackType
from typing import Any

from redis.exceptions import RedisError

from llmboost.entries import GAP, NO_FOLLOW_UP, FollowUp, Once, StreamError, Terminal
from llmboost.jobs import GenerationJob, now
from llmboost.queue import DEADLINE_ERROR, JobQueue, QueueFull
from llmboost.settings import ApiSettings
from llmboost.streams import StreamGone, persist
from llmboost.tailer import Tailer, TailerClosed
from llmboost.transcript import StreamGap
from llmboost_api import errors
from llmboost_api.errors import ApiError
from llmboost_api.jobs import job_ids
from llmboost_api.merge import Merge, Step
from llmboost_api.patience import no_redis
from llmboost_api.protocol.form import Form
from llmboost_api.tasks import discard

logger = logging.getLogger(__name__)

SUBMIT_PATIENCE_S = 3.0
"""How long an unknown outcome is asked about again before the request gets 503."""
SUBMITS_AT_ONCE = 32
"""Each takes a connection while it lasts."""
WITHDRAW_TIMEOUT_S = 30.0
DEADLINE_SLACK_S = 5.0
"""The reaper seals at the deadline; this much later the pod stops waiting for Redis to say so."""

GONE = StreamError("The stream expired or was lost with its server.", code="stream_gone", status=410)
LOST_REDIS = StreamError("The queue's server failed while the answer was being read.", code="stream_lost")
NOT_ACCEPTED = StreamError("The request was not accepted, so it was withdrawn.", code="withdrawn", status=503)


class Generation:
    """Follows the jobs of one completion: an async context manager, and an async iterator over `Step`s.

    Leaving it early seals nothing: the stream's audience lapses, and its worker ends it after the grace.

    Raises:
        ApiError: from iteration, the answer ended in an error.
    """

    def __init__(self, parent: "Generations", completion_id: str, form: Form, *, again: bool) -> None:
        """`again`: for a request that may be sent again, and then has the same completion."""
        self.id = completion_id
        self.form = form
        self.again = again
        self._parent = parent
        self._merge = Merge()
        self._stack = AsyncExitStack()
        self._loop = asyncio.get_running_loop()
        self._deadline = self._loop.time() + form.deadline - now()
        self._timer: asyncio.TimerHandle | None = None
        self._waits_since: float | None = None
        """The loop's time at which the wait for the next step began, if it is being waited for."""

    async def __aenter__(self) -> "Generation":
        async with AsyncExitStack() as stack:
            for index, job_id in enumerate(job_ids(self.id, self.form.jobs)):
                tail = self._parent.tailer.tail(job_id, self._merge.news)
                self._merge.add(index, await stack.enter_async_context(tail))
            self._stack = stack.pop_all()
        self._end_at(self._deadline + DEADLINE_SLACK_S)
        self._parent.add(self)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._parent.running.discard(self)
        if self._timer is not None:
            self._timer.cancel()
        await self._stack.aclose()

    def __aiter__(self) -> "Generation":
        return self

    async def __anext__(self) -> Step:
        self._waits_since = self._loop.time()
        try:
            return await self._merge.next()
        except StreamGone:
            raise errors.from_stream(GONE) from None
        except StreamGap as gap:
            logger.error("gap: job_id=%s %s", self.id, gap)
            raise errors.from_stream(GAP) from None
        except (RedisError, OSError, TailerClosed) as error:
            logger.error("tailing failed: job_id=%s %s: %s", self.id, type(error).__name__, error)
            lost = errors.from_stream(LOST_REDIS)
            if self.again:
                lost.headers = {"retry-after": "1"}
            raise lost from error
        finally:
            self._waits_since = None

    def end(self, verdict: ApiError) -> None:
        """Makes iteration raise at its next wait, or the one under way."""
        self._merge.interrupt(verdict)

    def _end_at(self, due: float) -> None:
        self._timer = self._loop.call_at(due, self._end_if_late)

    def _end_if_late(self) -> None:
        """What has ended is still read after its deadline, if slowly: the slack is of the wait for a step."""
        time = self._loop.time()
        due = (
            time if self._waits_since is None else max(self._deadline, self._waits_since)
        ) + DEADLINE_SLACK_S
        if time < due:
            self._end_at(due)
        else:
            self.end(errors.from_stream(DEADLINE_ERROR))


class Generations:
    """All generations of a pod, and the way into the queue."""

    def __init__(self, queue: JobQueue, tailer: Tailer, settings: ApiSettings, pod_id: str) -> None:
        self.queue = queue
        self.tailer = tailer
        self.running: set[Generation] = set()
        self._settings = settings
        self._pod_id = pod_id
        self._drained = False
        self._slots = asyncio.Semaphore(SUBMITS_AT_ONCE)
        self._background: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> "Generations":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in list(self._background):
            await discard(task)

    def follow(self, completion_id: str, form: Form, *, again: bool = False) -> Generation:
        """A reader of a completion's jobs, which were submitted; while it is entered, they have an audience.

        `again`: for a request that may be sent again, and then has the same completion.
        """
        return Generation(self, completion_id, form, again=again)

    def add(self, generation: Generation) -> None:
        """One more that runs."""
        self.running.add(generation)
        if self._drained:
            generation.end(_shutdown_error(generation, self._settings.grace))

    def end_all(self) -> None:
        """The time to drain is over: what still runs, or is about to, ends in an error. Its jobs go on."""
        self._drained = True
        self.tailer.hold_promises()
        for generation in self.running:
            generation.end(_shutdown_error(generation, self._settings.grace))
        left = [job_id for each in self.running for job_id in job_ids(each.id, each.form.jobs)]
        self._in_background(self._promise(left))

    async def _promise(self, left: Sequence[str]) -> None:
        """Whoever goes on elsewhere has the whole grace for it, and not what is left of the last promise."""
        try:
            await persist(lambda: self.queue.streams.renew_audience(left, self._settings.grace))
        except (RedisError, OSError) as error:
            logger.warning("no audience was promised: %s", type(error).__name__)

    async def submit(
        self,
        jobs: Sequence[GenerationJob],
        form: Form,
        follow_up: FollowUp = NO_FOLLOW_UP,
        once: Once | None = None,
        *,
        again: bool = False,
    ) -> None:
        """Enqueues all of the jobs, with how to write down their answer, or withdraws those that it had.

        A request with a name may be sent again, and another's jobs joined, before its outcome is known. So
        what may have been accepted under one is not withdrawn.

        `again`: some of the jobs may be there already, of another try of the same request.

        Raises:
            SubmittedBefore: by the name `once`, which goes with the first job.
            ApiError: the queue is full (429), or can't be reached (503).
        """
        for number, job in enumerate(jobs, start=1):
            enqueue = partial(
                self.queue.submit,
                job,
                audience=self._settings.grace,
                max_queued=self._settings.max_queued,
                form=form.encode(),
                follow_up=follow_up,
                once=once if number == 1 else None,
            )
            try:
                async with asyncio.timeout(SUBMIT_PATIENCE_S), self._slots:
                    await persist(enqueue)
            except QueueFull as full:
                if not again:
                    self._withdraw(jobs[: number - 1], once)
                raise ApiError(
                    429,
                    f"{full}. Try again in a few seconds, or have the operator add workers or raise "
                    "--max-queued.",
                    type="rate_limit_error",
                    code="queue_full",
                    headers={"retry-after": "1"},
                ) from None
            except (TimeoutError, RedisError, OSError) as error:
                # The job may be in the queue all the same, and a client may send the request again.
                if once is None and not again:
                    self._withdraw(jobs[:number], None)
                raise no_redis(error) from error

    def _withdraw(self, jobs: Sequence[GenerationJob], once: Once | None) -> None:
        if jobs:
            self._in_background(self._cancel(jobs, once))

    async def _cancel(self, jobs: Sequence[GenerationJob], once: Once | None) -> None:
        """As well as can be: where it fails, the audience lapses and the worker seals."""
        terminal = Terminal(self._pod_id, error=NOT_ACCEPTED)
        try:
            async with asyncio.timeout(WITHDRAW_TIMEOUT_S):
                for job in jobs:
                    await persist(partial(self.queue.cancel, job.id, terminal))
                # Not before: the seal has an effect on the name, which may be another request's by then.
                if once is not None:
                    await persist(partial(self.queue.forget, once))
        except (TimeoutError, RedisError, OSError) as error:
            logger.warning("not withdrawn: job_id=%s %s", jobs[0].id, type(error).__name__)

    def _in_background(self, coroutine: "Coroutine[Any, Any, None]") -> None:
        task = asyncio.create_task(coroutine)
        self._background.add(task)
        task.add_done_callback(self._background.discard)


def _shutdown_error(generation: Generation, grace: float) -> ApiError:
    return ApiError(
        503,
        "The server is shutting down; the answer goes on without it. Within "
        f"{grace:g} s, GET {generation.form.endpoint.path}/{generation.id} fetches it from another one: "
        "whole, or with ?stream=true, and the last id received as Last-Event-ID, the rest of the stream.",
        type="server_error",
        code="server_shutdown",
        # Who asks again for the same completion generates nothing twice, and another server will answer.
        headers={"retry-after": "1"} if generation.again else errors.NO_RETRY,
    )
