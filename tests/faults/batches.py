"""A batch of many lines, with what it is held against: the same batch, when nothing happens meanwhile."""

import json
import warnings
from dataclasses import dataclass
from functools import cache
from itertools import zip_longest
from typing import Any

from openai import APIConnectionError, AsyncOpenAI, InternalServerError

from llmboost import keys
from tests.e2e.asking import CHAT, chat
from tests.faults.fleet import Fleet
from tests.faults.requests import THINGS
from tests.faults.ties import Answer, judge
from tests.waiting import wait_until

ENDED_S = 150.0
"""Within which it has ended. Far beyond what it takes, on a crowded machine too."""
ENDED = ("completed", "failed", "expired", "cancelled")


def body(number: int) -> dict[str, Any]:
    """Short, and greedy or seeded in turn; its tokens are known by their logprobs."""
    sampling = {"temperature": 0} if number % 2 else {"temperature": 1.0, "seed": number}
    question = f"Tell me about {THINGS[number % len(THINGS)]} and the number {number}."
    return chat(question, max_tokens=5 + number % 4, ignore_eos=True, logprobs=True, **sampling)


@dataclass
class Row:
    """What the output file says of one line."""

    body: dict[str, Any]
    tokens: list[tuple[str, tuple[int, ...]]]
    """Text and bytes of each."""
    text: str
    finish_reason: str

    @property
    def answer(self) -> Answer:
        ids = [_token_ids()[token] for token in self.tokens]
        return Answer(self.body, 0, ids, self.text, self.finish_reason)


class RunningBatch:
    """A batch of numbered lines on a fleet."""

    def __init__(self, fleet: Fleet, lines: int) -> None:
        self.fleet = fleet
        self.lines = lines
        self.id = ""
        self._asked = 0

    async def begin(self) -> None:
        """Uploads and makes it."""
        envelopes = (
            {"custom_id": str(number), "method": "POST", "url": CHAT, "body": body(number)}
            for number in range(self.lines)
        )
        content = "".join(json.dumps(each) + "\n" for each in envelopes).encode()
        async with self._client() as client:
            file = await client.files.create(file=("input.jsonl", content), purpose="batch")
            batch = await client.batches.create(
                input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
            )
        self.id = batch.id

    async def done(self) -> int:
        """Lines that are, by now."""
        counts = (await self._batch()).request_counts
        assert counts is not None
        assert counts.failed == 0
        return int(counts.completed)

    async def reached(self, count: int) -> None:
        """Waits until so many lines are done."""

        async def so_many() -> bool:
            return await self.done() >= count

        await wait_until(so_many, within=ENDED_S, every=0.05)

    async def runner(self) -> str:
        """The pod that runs it."""
        async with self.fleet.redis() as redis:
            holder: bytes = await redis.hget(keys.batch(self.id), "holder")  # type: ignore[misc]
        return self.fleet.name_of(holder.decode().removeprefix("pod-"))

    async def rows(self) -> dict[int, Row]:
        """What it has written, once it has ended: each line once, and nothing else."""
        batch = await wait_until(self._ended, within=ENDED_S, every=0.05)
        assert batch.status == "completed", batch
        assert batch.request_counts is not None
        if batch.error_file_id is not None:
            async with self._client() as client:
                raise AssertionError((await client.files.content(batch.error_file_id)).text[:2000])
        assert batch.request_counts.completed == batch.request_counts.total == self.lines, batch
        assert batch.output_file_id is not None
        async with self._client() as client:
            content = (await client.files.content(batch.output_file_id)).text
        rows = [json.loads(line) for line in content.splitlines()]
        assert len(rows) == self.lines
        found = {int(row["custom_id"]): _row(row) for row in rows}
        assert found.keys() == set(range(self.lines)), "a line is missing, and another is there twice"
        return found

    async def _ended(self) -> Any:
        """The batch, if it has."""
        batch = await self._batch()
        return batch if batch.status in ENDED else None

    async def _batch(self) -> Any:
        """From any pod that answers, another one each time; once Redis does, too."""

        async def answer() -> Any:
            async with self._client() as client:
                try:
                    return await client.batches.retrieve(self.id)
                except (APIConnectionError, InternalServerError):
                    return None

        return await wait_until(answer, within=60, every=0.05)

    def _client(self) -> AsyncOpenAI:
        self._asked += 1
        urls = self.fleet.live_urls
        # Its own timeouts: a pod may be killed under it.
        return AsyncOpenAI(
            base_url=f"{urls[self._asked % len(urls)]}/v1", api_key="-", timeout=20, max_retries=0
        )


def _row(row: dict[str, Any]) -> Row:
    assert row["error"] is None
    assert row["response"]["status_code"] == 200
    (choice,) = row["response"]["body"]["choices"]
    tokens = [(each["token"], tuple(each["bytes"] or ())) for each in choice["logprobs"]["content"]]
    return Row(body(int(row["custom_id"])), tokens, choice["message"]["content"], choice["finish_reason"])


async def compare(rows: dict[int, Row], known: dict[int, Row]) -> int:
    """Fails unless each answer is the known one, up to a tie that is proved to be one; returns how many were
    excused."""
    different = [number for number, row in rows.items() if row != known[number]]
    answers = [rows[number].answer for number in different]
    plain = [known[number].answer for number in different]
    verdicts = await judge(answers + plain)
    for answer, other, *both in zip(
        answers, plain, verdicts[: len(plain)], verdicts[len(plain) :], strict=True
    ):
        assert not any(verdict.wrong for verdict in both), f"{both}: {answer}, without faults {other}"
        fork = next(
            place
            for place, (one, two) in enumerate(zip_longest(answer.token_ids, other.token_ids))
            if one != two
        )
        assert any(fork in verdict.ties for verdict in both), f"no tie: {answer}, without faults {other}"
        warnings.warn(f"excused a tie at token {fork} of {answer.body}", stacklevel=2)
    return len(different)


@cache
def _token_ids() -> dict[tuple[str, tuple[int, ...]], int]:
    """Tokens of the demo model by their text and bytes."""
    from llmboost_worker.models import DEMO_FOLDER
    from llmboost_worker.text import Tokenizer

    tokenizer = Tokenizer.load(str(DEMO_FOLDER))
    found = {}
    for token_id in range(tokenizer.vocab_size):
        text, raw = tokenizer.token_string(token_id)
        found[text, tuple(raw or ())] = token_id
    return found
