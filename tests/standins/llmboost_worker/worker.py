"""A worker that only announces itself, without torch. Its model's name says how it behaves:

`unknown`: it exits with a reason, as for a model that does not exist; `crash`: it is ended by a signal.
"""

import asyncio
import os
import signal
import sys
import time
from contextlib import suppress

from redis.exceptions import RedisError

from llmboost.connection import connect
from llmboost.registry import ModelCard, Registry, WorkerCard
from llmboost.settings import WorkerSettings


def run(settings: WorkerSettings) -> None:
    print(f"threads={settings.threads} gpus={os.environ.get('CUDA_VISIBLE_DEVICES', 'unset')}", flush=True)
    if settings.model == "unknown":
        sys.exit("llmboost worker: error: there is no model 'unknown'")
    if settings.model == "crash":
        os.kill(os.getpid(), signal.SIGKILL)
    asyncio.run(_announce(settings))


async def _announce(settings: WorkerSettings) -> None:
    assert settings.redis_url
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    registry = Registry(connect(settings.redis_url))
    names = settings.served_model_name or (settings.model,)
    models = [ModelCard(name, names[0], 128, int(time.time())) for name in names]
    card = WorkerCard(f"standin-{os.getpid()}", names[0], "none", "cpu", settings.max_num_seqs, 0, 0)
    while not stop.is_set():
        with suppress(RedisError, OSError):  # Redis may be away; it will be back
            await registry.announce(card, models, ttl=1.0)
        with suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), 0.1)
    await registry.withdraw(card.worker)
