"""What each request's answer is when nothing fails, and what it may be when something does: the same."""

import asyncio
import json
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import httpx

from llmboost.entries import GAP, Delta, Terminal
from llmboost.streams import TokenStreams, persist
from llmboost.transcript import Transcript
from tests.faults.fleet import Fleet
from tests.faults.reader import ChoiceSeen, Reader
from tests.faults.ties import Answer, judge

TIMEOUT_S = 180.0


@dataclass
class Logged:
    """One choice, as its stream has it."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None


@dataclass
class Log:
    """One stream, read from Redis at its end."""

    choices: dict[int, Logged]
    attempts: int
    terminal: Terminal


@dataclass
class Known:
    """An answer without faults."""

    seen: dict[int, ChoiceSeen]
    token_ids: dict[int, list[int]]

    def answer(self, other: Answer) -> Answer:
        """To the same question."""
        seen = self.seen[other.choice]
        return Answer(other.body, other.choice, self.token_ids[other.choice], seen.text, seen.finish_reason)


async def log_of(streams: TokenStreams, job_id: str) -> Log:
    """Raises:
    AssertionError: it has a gap or a repetition, or not one terminal entry at its end.
    """
    entries = await persist(lambda: streams.read(job_id))
    whole = Transcript()
    texts: dict[int, list[str]] = {}
    for entry_id, entry in entries:
        whole.apply(entry_id, entry)
        if isinstance(entry, Delta):
            for delta in entry.choices:
                texts.setdefault(delta.index, []).append(delta.text)
    terminals = [entry for _, entry in entries if isinstance(entry, Terminal)]
    assert len(terminals) == 1, f"{job_id} has {len(terminals)} terminal entries"
    assert entries[-1][1] is terminals[0], f"{job_id} goes on after its terminal entry"
    assert terminals[0].error != GAP, f"{job_id} has a gap"
    return Log(
        {
            index: Logged("".join(texts[index]), choice.token_ids, choice.finish_reason)
            for index, choice in whole.choices.items()
        },
        len({entry_id.partition("-")[0] for entry_id, _ in entries}) - 2,  # less the queue's and the seal's
        terminals[0],
    )


class Oracle:
    """Answers are learnt from a fleet to which nothing happens meanwhile, once per request."""

    def __init__(self) -> None:
        self._known: dict[str, Known] = {}
        self.ties = 0
        """Answers that were excused."""

    async def learn(self, fleet: Fleet, bodies: Iterable[dict[str, Any]]) -> None:
        """Asks for those that it doesn't know yet."""
        missing = {key: body for body in bodies if (key := _key(body)) not in self._known}
        if not missing:
            return
        redis = fleet.redis()
        limits = httpx.Limits(max_connections=None)
        async with asyncio.timeout(TIMEOUT_S), httpx.AsyncClient(timeout=None, limits=limits) as http:
            readers = [
                Reader(body, lambda: fleet.live_urls, number) for number, body in enumerate(missing.values())
            ]
            await asyncio.gather(*(reader.read(http) for reader in readers))
        for key, reader in zip(missing, readers, strict=True):
            assert reader.done, reader.error
            log = await log_of(fleet.streams(redis), reader.id)
            assert log.attempts == 1, "the answer is to be one without faults"
            self._known[key] = Known(
                reader.choices, {index: choice.token_ids for index, choice in log.choices.items()}
            )
        await redis.aclose()

    def tokens(self, body: dict[str, Any]) -> int:
        """Of all choices of an answer."""
        return sum(map(len, self._known[_key(body)].token_ids.values()))

    def fault(self, reader: Reader) -> str:
        """What is wrong with a stream of which something is: in a word, for a table."""
        if reader.error is not None:
            return str(reader.error["code"])
        seen = "".join(choice.text for _, choice in sorted(reader.choices.items()))
        known = "".join(choice.text for _, choice in sorted(self._known[_key(reader.body)].seen.items()))
        if not reader.done:
            return "broken"
        return "lost" if len(seen) < len(known) else "repeated" if len(seen) > len(known) else "wrong"

    def answers(self) -> list[Answer]:
        """All that were learnt."""
        return [
            Answer(json.loads(body), index, ids, known.seen[index].text, known.seen[index].finish_reason)
            for body, known in self._known.items()
            for index, ids in known.token_ids.items()
        ]

    async def check(self, readers: Sequence[Reader], streams: TokenStreams) -> None:
        """Every stream has ended well, has been read whole, and is what it is without faults."""
        doubtful: list[Answer] = []
        for reader in readers:
            assert reader.id, f"never begun, but ended in {reader.error}: {reader.body}, {reader.trail}"
            doubtful += self._check_one(reader, await log_of(streams, reader.id))
        known = [self._known[_key(answer.body)].answer(answer) for answer in doubtful]
        verdicts = await judge(doubtful + known)
        for answer, plain, *both in zip(
            doubtful, known, verdicts[: len(known)], verdicts[len(known) :], strict=True
        ):
            wrong = [verdict.wrong for verdict in both if verdict.wrong]
            assert not wrong, f"{wrong}: {answer}, without faults {plain}"
            fork = next(
                place
                for place, (one, other) in enumerate(
                    zip_longest(answer.token_ids, plain.token_ids, fillvalue=-1)
                )
                if one != other
            )
            assert any(fork in verdict.ties for verdict in both), (
                f"no tie at token {fork}: {answer}, without faults {plain}"
            )
            self.ties += 1
            excuse = f"excused a tie at token {fork} of choice {answer.choice} of {answer.body}"
            warnings.warn(excuse, stacklevel=2)

    def _check_one(self, reader: Reader, log: Log) -> list[Answer]:
        """Returns what differs from the answer without faults."""
        name = f"{reader.id} ({reader.body}; {', '.join(reader.trail)})"
        assert reader.done, f"{name} ended in {reader.error}, by {log.terminal.by}"
        assert log.terminal.error is None, f"{name} ended in {log.terminal}"
        tokens = sum(len(choice.token_ids) for choice in log.choices.values())
        assert log.terminal.usage is not None
        assert log.terminal.usage.completion_tokens == tokens, (
            f"{name} ended well with {tokens} tokens, but says that it has {log.terminal.usage}"
        )
        assert reader.choices.keys() == log.choices.keys()
        known = self._known[_key(reader.body)]
        doubtful = []
        for index, choice in log.choices.items():
            seen = reader.choices[index]
            assert (seen.text, seen.finish_reason) == (choice.text, choice.finish_reason), (
                f"{name}: the client did not see what the log has of choice {index}"
            )
            if choice.token_ids != known.token_ids[index]:
                doubtful.append(
                    Answer(reader.body, index, choice.token_ids, choice.text, choice.finish_reason)
                )
            else:
                assert seen == known.seen[index], f"{name}: not what it is without faults"
        if reader.body.get("stream_options"):
            assert reader.usage is not None, f"{name} has no usage"
            assert reader.usage["completion_tokens"] == tokens
        return doubtful


def _key(body: dict[str, Any]) -> str:
    return json.dumps({**body, "stream": True})  # as it is: an answer has its schema's order
