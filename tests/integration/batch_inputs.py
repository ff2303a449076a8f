"""Batches as tests want them: their input, and what came out."""

import json
from collections.abc import AsyncIterable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from openai import AsyncOpenAI
from openai.types import Batch

from llmboost.jobs import new_id, now
from llmboost_api.batches.record import ID_PREFIX, BatchRecord
from llmboost_api.batches.store import BatchStore
from llmboost_api.pod import Pod
from tests.waiting import wait_until

from .api_pod import CHAT, chat

ENDED = ("failed", "completed", "expired", "cancelled")


def line(custom_id: str, body: dict[str, Any] | None = None, /, **fields: Any) -> str:
    """One request of a batch; `fields` change the envelope, and None leaves one out."""
    envelope = {"custom_id": custom_id, "method": "POST", "url": CHAT, "body": body or chat(), **fields}
    return json.dumps({name: value for name, value in envelope.items() if value is not None})


def lines(count: int, body: Callable[[int], dict[str, Any]] | None = None) -> list[str]:
    """Numbered requests, `line-1` and so on."""
    return [line(f"line-{number}", body and body(number)) for number in range(1, count + 1)]


async def upload(client: AsyncOpenAI, content: Sequence[str] | bytes, purpose: str = "batch") -> str:
    """Returns the file's id."""
    data = content if isinstance(content, bytes) else "".join(f"{each}\n" for each in content).encode()
    file = await client.files.create(file=("input.jsonl", data), purpose=purpose)  # type: ignore[arg-type]
    return file.id


async def begin(
    client: AsyncOpenAI,
    content: Sequence[str] | bytes,
    *,
    endpoint: Any = CHAT,
    window: Any = "24h",
    **more: Any,
) -> Batch:
    """A batch of these lines."""
    file_id = await upload(client, content)
    return await client.batches.create(
        input_file_id=file_id, endpoint=endpoint, completion_window=window, **more
    )


async def begin_at(pod: Pod, content: AsyncIterable[bytes]) -> BatchRecord:
    """A batch of these lines that no runner has taken yet, made by the pod itself."""
    file = await pod.files.create("", "input.jsonl", "batch", content)
    record = BatchRecord(
        id=new_id(ID_PREFIX),
        owner="",
        input_file_id=file.id,
        endpoint=CHAT,
        completion_window="1h",
        created=now(),
        deadline=now() + 3600,
        output_life=3600,
    )
    await BatchStore(pod.redis, pod.settings.response_ttl).create(record, None)
    return record


async def ended(client: AsyncOpenAI, batch_id: str, *, within: float = 30.0) -> Batch:
    """The batch, once it has ended."""
    seen: list[Batch] = []

    async def has_ended() -> bool:
        seen[:] = [await client.batches.retrieve(batch_id)]
        return seen[0].status in ENDED

    await wait_until(has_ended, within=within, every=0.02)
    return seen[0]


@dataclass
class Outcome:
    """What a batch has written."""

    batch: Batch
    output: dict[str, dict[str, Any]]
    """Rows by custom id, as those of `errors`."""
    errors: dict[str, dict[str, Any]]

    @property
    def counts(self) -> tuple[int, int, int]:
        counts = self.batch.request_counts
        assert counts is not None
        return counts.total, counts.completed, counts.failed

    def text(self, custom_id: str) -> str:
        return str(self.output[custom_id]["response"]["body"]["choices"][0]["message"]["content"])


async def outcome(client: AsyncOpenAI, batch_id: str, *, within: float = 30.0) -> Outcome:
    """What came out of a batch, once it has ended: no line twice."""
    batch = await ended(client, batch_id, within=within)
    output = await rows(client, batch.output_file_id)
    errors = await rows(client, batch.error_file_id)
    assert not output.keys() & errors.keys()
    return Outcome(batch, output, errors)


async def rows(client: AsyncOpenAI, file_id: str | None) -> dict[str, dict[str, Any]]:
    """Of one of its files, by custom id."""
    if file_id is None:
        return {}
    content = await client.files.content(file_id)
    found = [json.loads(row) for row in content.text.splitlines()]
    assert content.text.endswith("\n")
    by_id = {row["custom_id"]: row for row in found}
    assert len(by_id) == len(found), "a line is there twice"
    assert len({row["id"] for row in found}) == len(found)
    return by_id
