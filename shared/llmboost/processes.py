"""The supervisor: Redis, workers and an API pod as child processes, watched and restarted.

One thread starts and watches everything; it must be one thread, for children end with the thread that
started them (`llmboost.child`). Requests to stop reach it through a queue, so a signal handler may make
them. Order of the end: the pod first, which lets its streams finish; then the workers; then Redis.
"""

import asyncio
import atexit
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Literal

from redis.exceptions import RedisError

from llmboost.child import Child, Log, silent
from llmboost.embedded import EmbeddedRedis, EmbeddedRedisError, free_port
from llmboost.placement import PlacementError, placements
from llmboost.readiness import answers, live_workers
from llmboost.settings import ApiSettings, CommonSettings, ServeSettings, WorkerSettings, to_environment
from llmboost.temporary import TemporaryFolder

_MAX_DEATHS = 5
"""Deaths in a row after which a process is given up, and everything with it."""
_MAX_DEATHS_AT_FIRST = 3
"""The same until everything has been ready once."""
_STEADY_S = 30.0
"""A process that has lived this long had started well: its next death counts as the first."""
_LONGEST_PAUSE_S = 8.0
_TICK_S = 0.2
_SIGNALS_S = 0.5
"""How long the main thread waits at a time. The system may give a signal to another thread; its handler then
runs when the main thread is back from waiting, and from a wait without an end it would never be."""
_PATIENCE_S = 15.0
"""How long a process may take to end when it has nothing to wait for."""
_FIRST_NOTE_S, _NOTES_S = 5.0, 20.0
"""When to say what is waited for, and how often after that."""


class ProcessesError(Exception):
    """Something can't be started or kept running; `str()` says what and why.

    `log`: the last lines it wrote, for a reader who hasn't seen them go by.
    """

    def __init__(self, reason: str, log: str = "") -> None:
        super().__init__(reason)
        self.log = log


class Processes:
    """Everything that `settings` describe, as child processes.

    Redis unless `settings.redis_url` names one; `settings.dp` workers; with `api`, an API pod.
    `log` gets every line the children write, their name before it; it is called from several threads.
    """

    def __init__(self, settings: ServeSettings, *, api: bool = True, log: Log = silent) -> None:
        self.settings = settings
        self.model = ""
        """The name to ask for, once everything is ready."""
        self.redis_url = settings.redis_url or ""
        """Where Redis is, once everything is ready. It may hold a password: not for logs."""
        self.failure: ProcessesError | None = None
        """Why it ended, if not because it was told to."""
        self._with_api = api
        self._port = settings.port
        self._log = log
        self._requests: queue.SimpleQueue[Literal["stop", "kill", "look"]] = queue.SimpleQueue()
        self._started: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._stopping = self._killing = False
        self._files: TemporaryFolder | None = None
        self._redis: _Kept | None = None
        self._api: _Kept | None = None
        self._workers: list[_Kept] = []
        self._older_workers: frozenset[str] = frozenset()
        self._thread = threading.Thread(target=self._run, name="llmboost-processes", daemon=True)

    # For the owner

    @property
    def url(self) -> str:
        """Where the API is, without a path."""
        host = "localhost" if self.settings.host in ("0.0.0.0", "::") else self.settings.host
        return f"http://[{host}]:{self._port}" if ":" in host else f"http://{host}:{self._port}"

    def start(self) -> bool:
        """Starts everything and waits until the first token can be had; false if told to stop before that.

        Raises:
            ProcessesError: something can't be started. Nothing is left running.
        """
        atexit.register(self.stop)  # on Linux the leash would do; elsewhere nothing else does
        self._thread.start()
        try:
            if self._has_started():
                return True
        except BaseException:  # Ctrl-C, where nobody has taken it over
            self.request_kill()
            self.wait()
            raise
        self.stop()
        if self.failure:
            raise self.failure
        return False

    def wait(self) -> None:
        """Waits until everything has ended, by request or because of a `failure`."""
        while self._thread.is_alive():
            self._thread.join(_SIGNALS_S)

    def stop(self) -> None:
        """Lets running responses finish, stops everything and waits until it is gone. May be called twice."""
        atexit.unregister(self.stop)
        self.request_stop()
        if self._thread.ident is not None:
            self.wait()

    def request_stop(self) -> None:
        """Begins to stop. A signal handler may call this."""
        self._requests.put("stop")

    def request_kill(self) -> None:
        """Ends everything at once. A signal handler may call this."""
        self._requests.put("kill")

    def _has_started(self) -> bool:
        """Waits until it has, or has ended instead."""
        while True:
            with suppress(queue.Empty):
                return self._started.get(timeout=_SIGNALS_S)

    def __enter__(self) -> "Processes":
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    # The thread

    def _run(self) -> None:
        try:
            self._start_redis()
            self._start_others()
            for kept in self._kept:
                kept.settled = True
            if not self._stopping:
                self._started.put(True)
            while not self._stopping:
                self._tend()
        except ProcessesError as error:
            self.failure = error
        except (EmbeddedRedisError, PlacementError) as error:
            self.failure = ProcessesError(str(error))
        except Exception as error:  # a defect of this module: say so, or `start` would wait for ever
            self.failure = ProcessesError(f"the supervisor failed with {type(error).__name__}: {error}")
        finally:
            self._stop_all()
            if self._files:
                self._files.close()
            self._started.put(False)

    def _start_redis(self) -> None:
        if self.redis_url:
            return
        # Its log is shown when it fails; until then it says nothing that a user of llmboost needs.
        log = self._log if self.settings.log_level == "debug" else silent
        redis = EmbeddedRedis(self.settings.data_dir, log=log, on_exit=self._look)
        redis.spawn()
        self._redis = _Kept(redis.child, redis.spawn)
        self._redis.began = time.monotonic()
        while not redis.ready():
            self._take_request(0.01)
            if self._stopping:
                return
        self.redis_url = redis.url

    def _start_others(self) -> None:
        if self._stopping:
            return
        # Workers known already are others', or belong to a run that was killed a moment ago.
        with suppress(RedisError, OSError):
            self._older_workers = frozenset(card.worker for card in asyncio.run(live_workers(self.redis_url)))
        self._workers = [
            self._child(f"worker-{index}", "worker", WorkerSettings, environment)
            for index, environment in enumerate(placements(self.settings))
        ]
        if self._with_api:
            self._port = self._port or free_port(self.settings.host)
            environment = {"LLMBOOST_PORT": str(self._port), **self._files_environment()}
            self._api = self._child("api", "api", ApiSettings, environment)
        begun = time.monotonic()
        next_note = begun + _FIRST_NOTE_S
        while not self._stopping:
            self._tend()
            missing = self._missing()
            if not missing:
                return
            if time.monotonic() >= next_note:
                next_note += _NOTES_S
                self._say(f"waiting for {missing} ({time.monotonic() - begun:.0f} s)")

    def _files_environment(self) -> dict[str, str]:
        """Files are kept for as long as Redis is kept that knows of them."""
        if self.settings.files_url:
            return {}
        if self.settings.data_dir:
            return {"LLMBOOST_FILES_URL": str(self.settings.data_dir.absolute() / "files")}
        if self.settings.redis_url:
            return {}
        try:
            self._files = TemporaryFolder("llmboost-files-")
        except OSError as error:
            raise ProcessesError(f"no temporary folder can be made for files: {error}") from None
        return {"LLMBOOST_FILES_URL": str(self._files.path)}

    def _child(
        self, name: str, command: str, takes: type[CommonSettings], environment: Mapping[str, str]
    ) -> "_Kept":
        settings = to_environment(self.settings.model_copy(update={"redis_url": self.redis_url}), takes)
        child = Child(
            name,
            # -P: a file in the user's folder must not stand in for a module of ours.
            [sys.executable, "-P", "-m", "llmboost", command],
            env={**_compiler_cache(), **os.environ, "PYTHONUNBUFFERED": "1", **settings, **environment},
            log=self._log,
            on_exit=self._look,
        )
        return _Kept(child, child.start)

    def _missing(self) -> str:
        """What isn't ready yet, in words; empty when the first token can be had."""
        try:
            cards = asyncio.run(live_workers(self.redis_url))
        except (RedisError, OSError) as error:
            return f"Redis ({error})"
        ours = [card for card in cards if card.worker not in self._older_workers]
        if len(ours) < len(self._workers):
            count = len(self._workers) - len(ours)
            return f"{count} worker{'s' if count > 1 else ''} to load {self.settings.model}"
        self.model = ours[0].model
        if self._api:
            host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.settings.host, self.settings.host)
            if not answers(host, self._port, "/ready"):
                return "the API"
        return ""

    @property
    def _kept(self) -> "list[_Kept]":
        return [kept for kept in (self._redis, *self._workers, self._api) if kept]

    def _tend(self) -> None:
        """Waits a moment for something to happen, takes requests, restarts what has died."""
        self._take_request(_TICK_S)
        for kept in self._kept:
            kept.tend(self._say)

    def _take_request(self, timeout: float) -> None:
        with suppress(queue.Empty):
            request = self._requests.get(timeout=timeout)
            self._stopping |= request in ("stop", "kill")
            self._killing |= request == "kill"

    def _look(self) -> None:
        self._requests.put("look")

    def _say(self, line: str) -> None:
        with suppress(OSError, ValueError):
            self._log(f"[serve] {line}")

    def _stop_all(self) -> None:
        """The pod, then the workers, then Redis; whatever is still needed is kept running until its turn."""
        drain = self.settings.drain_timeout + _PATIENCE_S
        if self.failure:
            drain = _PATIENCE_S
        for stage, patience in (
            ([self._api], drain),
            (self._workers, _PATIENCE_S),
            ([self._redis], _PATIENCE_S),
        ):
            self._stop_stage([kept for kept in stage if kept], patience)

    def _stop_stage(self, stage: "Sequence[_Kept]", patience: float) -> None:
        deadline = time.monotonic() + patience
        for kept in stage:
            kept.wanted = False
            kept.child.terminate()
        while any(kept.child.running for kept in stage):
            if self._killing or time.monotonic() > deadline:
                for kept in stage:
                    kept.child.kill()
            try:
                self._tend()
            except Exception:
                self._killing = True  # what the streams need can't be had any more: nothing to wait for


class _Kept:
    """A child that is restarted when it dies, with growing pauses, until it has died too often in a row."""

    def __init__(self, child: Child, start: Callable[[], None]) -> None:
        self.child = child
        self.wanted = True
        self.settled = False
        """Whether all was ready once."""
        self.began: float | None = None
        self._start = start
        self._deaths = 0
        self._restart_at: float | None = 0.0

    def tend(self, say: Callable[[str], None]) -> None:
        """Starts it if it is due; takes note of its death.

        Raises:
            ProcessesError: it has died too often.
        """
        if not self.wanted or self.child.running:
            return
        now = time.monotonic()
        if self.began is not None:
            lived, self.began = now - self.began, None
            self._deaths = 1 if lived > _STEADY_S else self._deaths + 1
            code = self.child.exit_code or 0
            how = f"was ended by {_signal_name(-code)}" if code < 0 else f"exited with code {code}"
            # At first an exit of its own has a reason (no such model, port in use) that trying again
            # doesn't change; a signal may be the system's, short of memory.
            limit = _MAX_DEATHS if self.settled else _MAX_DEATHS_AT_FIRST if code < 0 else 1
            if self._deaths >= limit:
                reason = f"{self.child.name} {how}"
                if self._deaths > 1:
                    reason += f", {self._deaths} times in a row"
                last_words = _last_words(self.child.tail)
                if code >= 0 and last_words:  # whom a signal ended had none
                    reason += f": {last_words}"
                raise ProcessesError(reason, self.child.tail)
            pause = 0.0 if self._deaths == 1 else min(2.0 ** (self._deaths - 2), _LONGEST_PAUSE_S)
            say(f"{self.child.name} {how}; restarting it" + (f" in {pause:g} s" if pause else ""))
            self._restart_at = now + pause
        if self._restart_at is not None and now >= self._restart_at:
            self.began, self._restart_at = now, None
            self._start()


def _signal_name(number: int) -> str:
    hint = " (out of memory?)" if number == signal.SIGKILL else ""
    with suppress(ValueError):
        return signal.Signals(number).name + hint
    return f"signal {number}"


def _last_words(log: str) -> str:
    """Why a process of ours ended: its own message, which may have several lines, or the last line."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    begins = [index for index, line in enumerate(lines) if line.startswith("llmboost ")] or [-1]
    return " ".join(lines[begins[-1] :])


def _compiler_cache() -> dict[str, str]:
    """Where torch may keep what it compiles. By itself it leaves a folder among the temporary files,
    even if it compiles nothing."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = os.path.join(home, "llmboost", "torchinductor")
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError:
        return {}
    return {"TORCHINDUCTOR_CACHE_DIR": folder}
