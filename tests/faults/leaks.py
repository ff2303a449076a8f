"""What must be gone once every request has ended, whatever had happened to it: everything but its stream."""

from fnmatch import fnmatch

from arq.constants import health_check_key_suffix
from redis.asyncio import Redis

from llmboost import keys
from llmboost.registry import Registry
from llmboost.streams import SEAL_ID
from tests.waiting import wait_until

CLEAN_S = 60.0
"""A lease may have to lapse, a reaper to come round, and the machine may be crowded."""

GONE = (
    keys.OPEN,
    keys.AUDIENCE,
    "llmboost:queue:*",  # both classes, and whatever else there is
    keys.leases("*"),
    keys.claim("*"),
    keys.arq_job("*"),
    keys.arq_retry("*"),
    keys.BATCHES,
    keys.batch_lines("*"),
    keys.batch_parts("*"),
)
"""Patterns of keys that only requests and batches under way have. (arq's health check is beside a queue.)"""

EMPTIED = (keys.FILES_DUE, keys.files("*"))
"""Patterns of keys without a TTL that are gone when what they name is."""

FOREVER = -1
"""PTTL of a key without one."""


async def check(redis: Redis) -> None:
    """Waits until nothing is left; fails with all that is."""
    left: list[str] = []

    async def clean() -> bool:
        left[:] = await leaks(redis)
        return not left

    try:
        await wait_until(clean, within=CLEAN_S, every=0.05)
    except AssertionError:
        raise AssertionError(f"left behind after {CLEAN_S:g} s: {left}") from None


async def leaks(redis: Redis) -> list[str]:
    """Everything that is left now, in words."""
    names = [key.decode() async for key in redis.scan_iter(count=1000)]
    pipe = redis.pipeline(transaction=False)
    for name in names:
        pipe.pttl(name)
    found = [
        f"no TTL: {name}"
        for name, ttl in zip(names, await pipe.execute(), strict=True)
        if ttl == FOREVER and not any(fnmatch(name, pattern) for pattern in EMPTIED)
    ]
    found += [
        f"key {name}"
        for name in names
        if any(fnmatch(name, pattern) for pattern in GONE) and not name.endswith(health_check_key_suffix)
    ]
    logs = [name for name in names if fnmatch(name, keys.stream("*"))]
    for name in logs:
        pipe.xrevrange(name, count=1)
    for name, newest in zip(logs, await pipe.execute(), strict=True):
        if newest and newest[0][0].decode() != SEAL_ID:
            found.append(f"open: {name}")
    found += [
        f"worker {worker.worker} has {worker.running} sequences running and {worker.waiting} waiting"
        for worker in await Registry(redis).workers()
        if worker.running + worker.waiting
    ]
    return found
