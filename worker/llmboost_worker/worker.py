"""The worker process: loads a model, then claims and runs its jobs until it is told to go."""

import asyncio
import logging
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import uvloop
from arq.worker import RetryJob, func
from redis.exceptions import RedisError

from llmboost import garbage, logs
from llmboost.connection import connect
from llmboost.jobs import FUNCTION, OpaqueJob
from llmboost.queue import JobQueue
from llmboost.reaper import reap_forever
from llmboost.registry import ModelCard, Registry, WorkerCard
from llmboost.settings import WorkerSettings
from llmboost.streams import StreamFenced, TokenStreams, persist
from llmboost_worker.audience import AudienceWatch
from llmboost_worker.engine.interface import Engine, EngineError, EngineInfo, StepOutput
from llmboost_worker.generation import GaveWay, Generator
from llmboost_worker.leased import LeasedWorker, current_claim
from llmboost_worker.models import follow, load_model
from llmboost_worker.publisher import Publisher
from llmboost_worker.text import Tokenizer, TokenizerError

logger = logging.getLogger(__name__)

GOODBYE_S = 1.0
"""How long a worker that ends waits for its engine's current step, and for Redis to take note."""
EXIT_WITHIN_S = 10.0
"""After a signal: the process ends then, whatever holds it up."""

OPENMP = {"GOMP_SPINCOUNT": "4000"}
"""For torch's threads, read when it is loaded: how long they spin before they sleep while they wait for each
other; this is some tens of microseconds. A step has hundreds of products, and little between them. By
default they spin for milliseconds, and so hold up the one they wait for as soon as anything else wants a
core, such as Redis and the pod. Measured with 16 sequences on two cores, in ms a step, alone and beside one
process that never rests: sleeping at once 32 and 38, this 22 and 53, by default 20 and 150."""

T = TypeVar("T")
Load = Callable[[WorkerSettings], tuple[Engine, Tokenizer]]


class WorkerProcess:
    """Everything that one worker is made of."""

    def __init__(
        self, settings: WorkerSettings, load: Load | None = None, *, handle_signals: bool = False
    ) -> None:
        """`load` makes the engine, not yet started, and its tokenizer; tests give their own."""
        if settings.redis_url is None:
            raise ValueError("a worker needs --redis-url")
        self.settings = settings
        self.id = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(2)}"
        self.names = settings.served_model_name or (settings.model,)
        self.redis = connect(settings.redis_url, client_name=f"llmboost-worker-{os.getpid()}")
        self.streams = TokenStreams(self.redis, settings.retention)
        self.queue = JobQueue(self.redis, self.streams)
        self.registry = Registry(self.redis)
        self.publisher = Publisher(self.streams, settings.stream_interval)
        self._load = load or load_model
        self.engine: Engine | None = None
        self.generator: Generator | None = None
        self.cards: list[ModelCard] = []
        self._watch: AudienceWatch | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self.arq = LeasedWorker(
            self.queue,
            model=self.names[0],
            owner=self.id,
            lease=settings.lease,
            max_tries=settings.max_tries,
            max_jobs=settings.max_num_seqs,
            redis_pool=self.redis,
            functions=[func(self.generate, name=FUNCTION)],
            on_startup=self.start,
            on_shutdown=self.stop,
            handle_signals=handle_signals,
        )

    # arq calls these

    async def start(self, ctx: dict[Any, Any]) -> None:
        """Loads the model, then says that it is served.

        Raises:
            EngineError, TokenizerError: it can't be; says why.
        """
        loop = asyncio.get_running_loop()
        # From the beginning, so that a lone worker that was restarted may reclaim once it has loaded.
        self._tasks = [loop.create_task(self._renew_leases())]
        engine, tokenizer = await _in_thread(lambda: self._load(self.settings))
        self.engine = engine

        def on_step(step: StepOutput) -> None:
            loop.call_soon_threadsafe(self._deliver, step)

        def on_failure(error: BaseException) -> None:
            loop.call_soon_threadsafe(self._engine_failed, error)

        info = await _in_thread(lambda: engine.start(on_step, on_failure))
        self.arq.max_jobs = info.max_num_seqs  # an engine knows best what it has slots for
        self.generator = Generator(engine, info, tokenizer, self.streams, self.publisher, self.id)
        self.cards = [
            ModelCard(name, self.names[0], info.max_model_len, int(time.time())) for name in self.names
        ]
        watch = self._watch = AudienceWatch(
            self.streams,
            self.settings.grace,
            self.id,
            running=lambda: [generation.job for generation in self._generator.running.values()],
            end=self._generator.end,
        )
        generator = self.generator
        self.arq.produced_for = lambda claim: generator.produced_for(claim.job_id, claim.attempt)
        self.arq.on_lost = lambda job_id: self._generator.end(
            job_id, StreamFenced(f"{job_id}: the lease was lost")
        )
        await persist(lambda: self._announce(info))
        self._tasks += [
            loop.create_task(self.publisher.run()),
            loop.create_task(watch.run()),
            loop.create_task(self._heartbeat(info)),
            loop.create_task(reap_forever(self.queue, self.id)),
        ]
        for task in self._tasks:
            task.add_done_callback(self._on_task_end)
        garbage.settle()
        logger.info(
            "serving %s with %s on %s in %s: %d sequences, context %d",
            ", ".join(self.names),
            info.engine,
            info.device,
            info.dtype,
            info.max_num_seqs,
            info.max_model_len,
        )

    async def stop(self, ctx: dict[Any, Any]) -> None:
        """Says goodbye and frees the model; the jobs have been handed over by now."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, self._say_goodbye(), self._close_engine(), return_exceptions=True)

    async def _say_goodbye(self) -> None:
        try:
            async with asyncio.timeout(GOODBYE_S):
                await self.registry.withdraw(self.id)
                # A wake token that this worker popped while it was told to go must wake another.
                await self.queue.wake(self.names[0])
                await self.redis.delete(self.arq.health_check_key)
        except (RedisError, OSError) as error:
            logger.warning("can't say goodbye: %s", str(error) or "no answer in time")

    async def _close_engine(self) -> None:
        if self.generator is None or self.engine is None:
            return  # it still loads, and is not to be waited for
        try:
            async with asyncio.timeout(GOODBYE_S):
                await _in_thread(self.engine.close)
        except TimeoutError:
            logger.info("the engine is in the middle of a long step; not waiting for it")

    async def generate(self, ctx: dict[Any, Any], opaque: OpaqueJob) -> None:
        """arq's function: runs one job."""
        job = opaque.decode()
        if self._watch is not None:
            self._watch.add(job)
        try:
            await self._generator.run(job, current_claim.get().attempt)
        except GaveWay:
            raise RetryJob from None

    @property
    def _generator(self) -> Generator:
        assert self.generator is not None, "the engine has not been started"
        return self.generator

    # The engine calls these, on the event loop

    def _deliver(self, step: StepOutput) -> None:
        self._generator.deliver(step)

    def _engine_failed(self, error: BaseException) -> None:
        logger.critical("the engine has ended: %r", error)
        self._fail()

    def _on_task_end(self, task: "asyncio.Task[None]") -> None:
        """Without any of its tasks a worker would hold its jobs and do nothing for them."""
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.critical("the worker has failed", exc_info=error)
            self._fail()

    def _fail(self) -> None:
        # Other workers take the jobs over when their leases lapse. One of them may be what killed this one:
        # `llmboost.leases` finds out which.
        os._exit(os.EX_SOFTWARE)

    # Heartbeat

    async def _renew_leases(self) -> None:
        """By itself, and with a limit for each call: nothing else may hold the renewals up."""
        lease = self.settings.lease
        while True:
            try:
                async with asyncio.timeout(lease / 4):
                    await self.arq.renew()
            except (RedisError, OSError) as error:
                logger.warning("can't renew the leases: %s", str(error) or "no answer in time")
            except Exception:  # a defect here must not end every job
                logger.exception("can't renew the leases")
            await asyncio.sleep(lease / 5)

    async def _heartbeat(self, info: EngineInfo) -> None:
        """Says that it is alive, and returns the jobs of those who are not."""
        settings = self.settings
        while True:
            try:
                async with asyncio.timeout(settings.lease):
                    await self._announce(info)
                    for job_id in await self.queue.reclaim(
                        self.names[0], self.id, settings.lease, settings.max_tries
                    ):
                        logger.warning("%s: its worker's lease has lapsed; back in the queue", job_id)
            except (RedisError, OSError) as error:
                logger.warning("no heartbeat: %s", str(error) or "no answer in time")
            await asyncio.sleep(settings.lease / 5)

    async def _announce(self, info: EngineInfo) -> None:
        assert self.engine is not None
        stats = self.engine.stats()
        card = WorkerCard(
            self.id,
            self.names[0],
            info.engine,
            info.device,
            info.max_num_seqs,
            stats.running,
            stats.waiting,
            stats.output_tokens,
            self._generator.evictions,
            stats.prompt_tokens,
            stats.cached_tokens,
            stats.blocks_used,
            stats.blocks_total,
        )
        await self.registry.announce(card, self.cards, self.settings.lease)


async def _in_thread(call: Callable[[], T]) -> T:
    """Awaits a blocking call in a daemon thread: a signal while a model loads must not wait for it."""
    loop = asyncio.get_running_loop()
    result: asyncio.Future[T] = loop.create_future()

    def settle(value: T | None, error: BaseException | None) -> None:
        if result.done():
            return
        if error is not None:
            result.set_exception(error)
        else:
            result.set_result(value)  # type: ignore[arg-type]

    def work() -> None:
        try:
            value = call()
        except BaseException as error:
            loop.call_soon_threadsafe(settle, None, error)
        else:
            loop.call_soon_threadsafe(settle, value, None)

    threading.Thread(target=work, daemon=True).start()
    return await result


def run(settings: WorkerSettings) -> int:
    """Runs a worker until SIGTERM or SIGINT; returns the process's exit status.

    `EX_CONFIG` means that it can't serve this model and starting it again won't help.
    """
    logs.configure(settings.log_level)
    os.environ.update({name: value for name, value in OPENMP.items() if name not in os.environ})
    if settings.engine == "transformers" and settings.tp > 1 and int(os.environ.get("RANK", 0)) > 0:
        return follow(settings)
    uvloop.install()
    asyncio.set_event_loop(asyncio.new_event_loop())
    worker = WorkerProcess(settings, handle_signals=True)
    worker.arq.on_stop = lambda _: _exit_soon()
    try:
        worker.arq.run()
    except (EngineError, TokenizerError) as error:
        print(f"llmboost worker: {error}", file=sys.stderr)
        return os.EX_CONFIG
    # All is handed over and said. Python's own end waits for threads that encode a long prompt, and takes
    # torch apart piece by piece: half a second in which a rolling deploy waits for nothing.
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(os.EX_OK)


def _exit_soon() -> None:
    """Bounds a shutdown that Redis or the engine holds up; a second signal ends it at once."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().remove_signal_handler(signum)
        signal.signal(signum, lambda *_: os._exit(os.EX_TEMPFAIL))
    timer = threading.Timer(EXIT_WITHIN_S, lambda: os._exit(os.EX_TEMPFAIL))
    timer.daemon = True
    timer.start()
