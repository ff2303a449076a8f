"""A Redis server as a function of (state, request): what it answers and how it stands afterwards.

Each distinct pair is put to a real server once; then the answer is known. So a search over millions of
interleavings costs some thousands of round trips, and every script in it is the product's own.
"""

import socket
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import hiredis
from redis._parsers.base import BaseParser

from llmboost import entries, keys, leases, queue, streams
from llmboost.entries import FIELD, ReadEntry, decode
from llmboost.lua import Script

DATABASE = 9

_SNAPSHOT = Script("""
local found = {}
for _, key in ipairs(redis.call('KEYS', '*')) do
  local kind = redis.call('TYPE', key).ok
  local content = ''
  if kind == 'stream' then content = redis.call('XRANGE', key, '-', '+')
  elseif kind == 'zset' then content = redis.call('ZRANGE', key, 0, -1, 'WITHSCORES')
  elseif kind == 'hash' then content = redis.call('HGETALL', key)
  elseif kind == 'string' then content = redis.call('GET', key)
  end
  if kind ~= 'list' then  -- wake tokens: how many there are changes nothing but who looks first
    found[#found + 1] = {key, kind, redis.call('PTTL', key), content, redis.call('DUMP', key)}
  end
end
return found
""")


@dataclass(frozen=True)
class Keyspace:
    """One state of the server. Times are only "past" or "to come", scores of a queue only an order."""

    id: int
    restore: bytes = field(repr=False)
    """Requests that bring the server into this state."""
    logs: dict[str, list[ReadEntry]]
    """By job id."""
    sets: dict[str, list[tuple[str, bool]]]
    """Sorted sets by key: member, and whether its score is a time in the past (0)."""
    hashes: dict[str, dict[str, str]]
    kinds: dict[str, str]
    """Type of every key."""
    lasting: tuple[str, ...]
    """Keys without a TTL."""

    @cached_property
    def waiting(self) -> set[str]:
        """Ids of the jobs in a queue."""
        return {job for key, of in self.sets.items() if ":queue:" in key for job, _ in of}

    @cached_property
    def leased(self) -> dict[str, bool]:
        """Ids of the jobs under a lease, and whether it has lapsed."""
        return {job: past for key, of in self.sets.items() if ":leases:" in key for job, past in of}

    @cached_property
    def open(self) -> dict[str, bool]:
        """Ids of the streams in the index of open ones, and whether the deadline has passed."""
        return dict(self.sets.get(keys.OPEN, []))

    def claim(self, job: str) -> dict[str, str]:
        """The job's claim; empty if there is none."""
        return self.hashes.get(keys.claim(job), {})

    def sealed(self, job: str) -> bool:
        return any(isinstance(entry, entries.Terminal) for _, entry in self.logs.get(job, ()))


class Server:
    """`with Server(port) as server:`, from an empty database on."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port))
        self._reader = hiredis.Reader(replyError=BaseParser.parse_error)
        self._states: dict[tuple[Any, ...], int] = {}
        self.keyspaces: list[Keyspace] = []
        self._known: dict[tuple[int, bytes], tuple[int, int]] = {}
        self.replies: list[list[Any]] = []
        """By number; equal ones have the same."""
        self._reply_numbers: dict[str, int] = {}
        self._now: int | None = None
        """The state that the server is in."""
        self._snapshot = pack("EVAL", _SNAPSHOT.source, 0)
        self._ask(pack("SELECT", DATABASE))
        for module in (streams, queue, leases):
            for script in vars(module).values():
                if isinstance(script, Script):
                    self._ask(pack("SCRIPT", "LOAD", script.source))
        self._ask(pack("FLUSHDB"))
        self.empty = self._look(self._ask(self._snapshot)[0])

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *error: object) -> None:
        self._ask(pack("FLUSHDB"))
        self._socket.close()

    def apply(self, state: int, request: bytes) -> tuple[int, int]:
        """The number of the reply to one or more commands, and the state afterwards."""
        known = self._known.get((state, request))
        if known is None:
            restore = b"" if self._now == state else self.keyspaces[state].restore
            self._now = None
            skip = count(restore)
            answers = self._ask(restore + request + self._snapshot)[skip:]
            reply = self._intern(answers[:-1])
            self._now = self._look(answers[-1])
            known = self._known[state, request] = reply, self._now
        return known

    def _ask(self, requests: bytes) -> list[Any]:
        self._socket.sendall(requests)
        answers: list[Any] = []
        wanted = count(requests)
        while len(answers) < wanted:
            answer = self._reader.gets()
            if answer is False:
                self._reader.feed(self._socket.recv(1 << 20))
            else:
                answers.append(answer)
        return answers

    def _intern(self, reply: list[Any]) -> int:
        key = repr(reply)
        if key not in self._reply_numbers:
            self._reply_numbers[key] = len(self.replies)
            self.replies.append(reply)
        return self._reply_numbers[key]

    def _look(self, found: Any) -> int:
        if isinstance(found, Exception):
            raise found
        restore = [pack("FLUSHDB")]
        logs: dict[str, list[ReadEntry]] = {}
        sets: dict[str, list[tuple[str, bool]]] = {}
        hashes: dict[str, dict[str, str]] = {}
        kinds: dict[str, str] = {}
        lasting = []
        canonical: list[Any] = []
        for raw_key, raw_kind, ttl, content, dump in sorted(found):
            key, kind = raw_key.decode(), raw_kind.decode()
            restore.append(pack("RESTORE", key, max(ttl, 0), dump))
            kinds[key] = kind
            if ttl < 0:
                lasting.append(key)
            match kind:
                case "stream":
                    log = decode([(id_, {FIELD: fields[1]}) for id_, fields in content])
                    logs[key.partition("{")[2].removesuffix("}")] = log
                    seen: Any = repr(log)
                case "zset":
                    pairs = zip(content[::2], content[1::2], strict=True)
                    sets[key] = seen = [(member.decode(), float(score) == 0) for member, score in pairs]
                    if not key.startswith("llmboost:queue:"):
                        seen = sorted(seen)
                    seen = tuple(seen)
                case "hash":
                    parts = [part.decode() for part in content]
                    hashes[key] = dict(zip(parts[::2], parts[1::2], strict=True))
                    seen = tuple(sorted(hashes[key].items()))
                case _:
                    # Since when a worker has been in contact is a time like any other.
                    seen = content if key != keys.contact(key.rpartition(":")[2]) else ""
            canonical.append((key, kind, ttl < 0, seen))
        identity = tuple(canonical)
        if identity not in self._states:
            number = self._states[identity] = len(self.keyspaces)
            keyspace = Keyspace(number, b"".join(restore), logs, sets, hashes, kinds, tuple(lasting))
            self.keyspaces.append(keyspace)
        return self._states[identity]


def pack(*parts: str | bytes | int) -> bytes:
    """One command as it is sent."""
    return hiredis.pack_command(tuple(parts))


def count(requests: bytes) -> int:
    """Commands in what is sent."""
    return len(commands(requests))


def commands(requests: bytes) -> list[list[bytes]]:
    """The commands in what is sent."""
    reader = hiredis.Reader()
    reader.feed(requests)
    found = []
    while (command := reader.gets()) is not False:
        found.append(command)
    return found
