"""What all requests of one API process share: Redis, the tailer, and the tasks beside them."""

import asyncio
import os
import secrets
import socket
from contextlib import AsyncExitStack
from types import TracebackType

from fastapi import Request

from llmboost.connection import connect
from llmboost.queue import JobQueue
from llmboost.reaper import reap_forever
from llmboost.registry import Registry
from llmboost.settings import ApiSettings, default_files_url
from llmboost.streams import TokenStreams
from llmboost.tailer import Tailer
from llmboost_api.directory import ModelDirectory
from llmboost_api.files.files import Files
from llmboost_api.files.storage import FileStorage
from llmboost_api.generation import Generations
from llmboost_api.stored import StoredAnswers
from llmboost_api.tasks import discard
from llmboost_api.webhooks.delivery import Webhooks


class Pod:
    """One API process; `async with Pod(settings):` runs it. Lives on while Redis is away.

    Raises:
        ValueError: no Redis URL was given, or it is none; or files or webhooks can't be as they are set.
    """

    def __init__(self, settings: ApiSettings) -> None:
        if settings.redis_url is None:
            raise ValueError(
                "An API pod needs a Redis server: give --redis-url or LLMBOOST_REDIS_URL, "
                "or start everything with `llmboost serve`."
            )
        self.settings = settings
        self.id = f"pod-{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"
        self.redis = connect(settings.redis_url, client_name=self.id)
        self.streams = TokenStreams(self.redis, settings.retention)
        self.queue = JobQueue(self.redis, self.streams)
        self.registry = Registry(self.redis)
        self.models = ModelDirectory(self.registry)
        self.tailer = Tailer(self.streams, redis_url=settings.redis_url, grace=settings.grace)
        self.stored = StoredAnswers(self.redis, settings.response_ttl)
        self.generations = Generations(self.queue, self.tailer, settings, self.id)
        self.files = Files(self.redis, FileStorage(settings.files_url or default_files_url()))
        self.webhooks = Webhooks(self.redis, self.streams, settings)
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> "Pod":
        self._stack.push_async_callback(self.redis.aclose)
        await self._stack.enter_async_context(self.tailer)
        await self._stack.enter_async_context(self.generations)
        await self._stack.enter_async_context(self.files)
        await self._stack.enter_async_context(self.webhooks)
        reaper = asyncio.create_task(reap_forever(self.queue, self.id))
        self._stack.push_async_callback(discard, reaper)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()


def pod_of(request: Request) -> Pod:
    """The pod that serves this request."""
    pod: Pod = request.app.state.pod
    return pod
