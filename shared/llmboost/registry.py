"""Who serves what: workers announce their model with each heartbeat, pods read it.

A worker that stops announcing is soon no longer counted as serving; its model's name is accepted for
longer, so that requests wait out a restart in the queue instead of failing.
"""

from collections.abc import Sequence
from typing import Any

import msgspec
from redis.asyncio import Redis

from llmboost import keys
from llmboost.lua import NOW, Script

NAME_TTL_S = 300.0
"""How long after its last worker's heartbeat a model's name is still accepted."""


class ModelCard(msgspec.Struct, frozen=True):
    """One name that clients may ask for."""

    name: str
    root: str
    """The model's own name, which is the name of its queue; differs from `name` for an alias."""
    max_model_len: int
    created: int
    """Unix time in seconds at which the worker loaded it."""


class WorkerCard(msgspec.Struct, frozen=True):
    """What a worker says of itself in a heartbeat."""

    worker: str
    model: str
    engine: str
    device: str
    max_num_seqs: int
    running: int
    """Sequences that hold a slot in the engine."""
    waiting: int
    """Sequences that wait for one in the engine."""
    output_tokens: int = 0
    """Computed since it began, those included that were dropped."""
    evictions: int = 0
    """Batch jobs that have given way to an interactive one."""
    prompt_tokens: int = 0
    """Computed, too."""
    cached_tokens: int = 0
    """Of prompts, found in the prefix cache instead of being computed."""
    blocks_used: int = 0
    """Of the key/value cache, in use by sequences."""
    blocks_total: int = 0


_ANNOUNCE = Script(
    NOW
    + """
local models, workers = KEYS[1], KEYS[2]
local worker, worker_card, ttl, name_ttl = unpack(ARGV, 1, 4)
redis.call('ZADD', workers, now + ttl, worker)
redis.call('PEXPIRE', workers, name_ttl)
redis.call('SET', KEYS[3], worker_card, 'PX', ttl)
for i = 4, #KEYS do
  local name, card = ARGV[i * 2 - 3], ARGV[i * 2 - 2]
  redis.call('ZADD', models, now + name_ttl, name)
  redis.call('SET', KEYS[i], card, 'PX', name_ttl)
end
redis.call('PEXPIRE', models, name_ttl)
redis.call('ZREMRANGEBYSCORE', models, '-inf', now)
redis.call('ZREMRANGEBYSCORE', workers, '-inf', now)
"""
)

_LIVE = Script(NOW + "return redis.call('ZRANGE', KEYS[1], '(' .. now, '+inf', 'BYSCORE')")


class Registry:
    """Models and workers, on one Redis server."""

    def __init__(self, redis: Redis) -> None:
        self.redis = redis

    # Workers

    async def announce(self, worker: WorkerCard, models: Sequence[ModelCard], ttl: float) -> None:
        """A heartbeat: this worker serves these names, and counts as alive for `ttl` seconds."""
        names = [part for card in models for part in (card.name, msgspec.json.encode(card))]
        await _ANNOUNCE(
            self.redis,
            [
                keys.MODELS,
                keys.WORKERS,
                keys.worker_card(worker.worker),
                *(keys.model_card(card.name) for card in models),
            ],
            [
                worker.worker,
                msgspec.json.encode(worker),
                int(ttl * 1000),
                int(NAME_TTL_S * 1000),
                *names,
            ],
        )

    async def withdraw(self, worker: str) -> None:
        """The worker's last word: it no longer serves."""
        await self.redis.zrem(keys.WORKERS, worker)
        await self.redis.delete(keys.worker_card(worker))

    # Pods

    async def models(self) -> list[ModelCard]:
        """Every name that is accepted now, in the order of the alphabet."""
        cards = await self._cards(keys.MODELS, keys.model_card)
        return sorted(
            (msgspec.json.decode(card, type=ModelCard) for card in cards), key=lambda card: card.name
        )

    async def model(self, name: str) -> ModelCard | None:
        """The card of a name; None if nobody serves it."""
        card = await self.redis.get(keys.model_card(name))
        return msgspec.json.decode(card, type=ModelCard) if card is not None else None

    async def workers(self) -> list[WorkerCard]:
        """Workers that are alive."""
        cards = await self._cards(keys.WORKERS, keys.worker_card)
        return [msgspec.json.decode(card, type=WorkerCard) for card in cards]

    async def _cards(self, index: str, key_of: Any) -> list[bytes]:
        names = [name.decode() for name in await _LIVE(self.redis, [index], [])]
        if not names:
            return []
        cards = await self.redis.mget([key_of(name) for name in names])
        return [card for card in cards if card is not None]
