"""Requests as the tests send them, and what came back."""

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
from openai import AsyncOpenAI

from llmboost.entries import GAP, Started
from llmboost.streams import TokenStreams
from llmboost.transcript import Transcript
from tests.e2e.system import MODEL

STORY = "Write a short story about AI, in 100 words."
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def chat(text: Any = STORY, **fields: Any) -> dict[str, Any]:
    """A chat request."""
    return {"model": MODEL, "messages": [{"role": "user", "content": text}], **fields}


def long_story(tokens: int, **fields: Any) -> dict[str, Any]:
    """A chat request that takes exactly so many tokens."""
    return chat(max_tokens=tokens, ignore_eos=True, **fields)


def completion(prompt: Any = "Once upon a time", **fields: Any) -> dict[str, Any]:
    """A request to the older endpoint."""
    return {"model": MODEL, "prompt": prompt, **fields}


def path_of(body: dict[str, Any]) -> str:
    return CHAT if "messages" in body else COMPLETIONS


def text_of(answer: dict[str, Any], index: int = 0) -> str:
    """Text of one choice of a whole answer."""
    choice = answer["choices"][index]
    text: str = choice["message"]["content"] if "message" in choice else choice["text"]
    return text


async def ask(http: httpx.AsyncClient, body: dict[str, Any]) -> dict[str, Any]:
    """The whole answer."""
    response = await http.post(path_of(body), json=body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


@dataclass
class Heard:
    """What the official client gave of one choice of a stream."""

    id: str = ""
    pieces: list[str] = field(default_factory=list)
    finish_reason: str | None = None

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    def take(self, chunk: Any) -> None:
        self.id = chunk.id
        for choice in chunk.choices:
            assert self.finish_reason is None, f"more after the finish reason: {chunk}"
            piece = choice.text if hasattr(choice, "text") else choice.delta.content
            if piece:
                self.pieces.append(piece)
            self.finish_reason = choice.finish_reason


async def hear(client: AsyncOpenAI, body: dict[str, Any]) -> Heard:
    """A stream of one choice, to its end, by the official client."""
    heard = Heard()
    async for chunk in await create(client, {**body, "stream": True}):
        heard.take(chunk)
    return heard


async def hear_all(client: AsyncOpenAI, bodies: Iterable[dict[str, Any]]) -> list[Heard]:
    """Streams, all at once."""
    return await asyncio.gather(*(hear(client, body) for body in bodies))


async def create(client: AsyncOpenAI, body: dict[str, Any]) -> Any:
    """The official client's call for a request; what OpenAI doesn't know goes into `extra_body`."""
    return await _endpoint(client, body)(**for_openai(body))


def _endpoint(client: Any, body: dict[str, Any]) -> Any:
    return client.chat.completions.create if "messages" in body else client.completions.create


def create_sync(client: Any, body: dict[str, Any]) -> Any:
    return _endpoint(client, body)(**for_openai(body))


OURS = (
    "top_k",
    "min_p",
    "repetition_penalty",
    "min_tokens",
    "ignore_eos",
    "stop_token_ids",
    "include_stop_str_in_output",
)


def for_openai(body: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of the official client."""
    extra = {name: value for name, value in body.items() if name in OURS}
    plain = {name: value for name, value in body.items() if name not in OURS}
    return {**plain, "extra_body": extra}


async def transcript(streams: TokenStreams, job_id: str) -> Transcript:
    """All that the log says of a request; refuses one with a gap."""
    whole = Transcript()
    for entry_id, entry in await streams.read(job_id):
        whole.apply(entry_id, entry)
    assert whole.terminal is None or whole.terminal.error != GAP, f"{job_id} has a gap"
    return whole


async def attempts(streams: TokenStreams, job_id: str) -> list[str]:
    """Ids of the workers that have had the request, in order."""
    return [entry.worker for _, entry in await streams.read(job_id) if isinstance(entry, Started)]


async def token_ids(streams: TokenStreams, job_id: str, choice: int = 0) -> list[int]:
    """Ids of one choice's tokens, as the worker wrote them."""
    return (await transcript(streams, job_id)).choices[choice].token_ids


def bytes_of(logprobs: Sequence[dict[str, Any]]) -> bytes:
    """The bytes of a chat's logprobs, which tell tokens that are parts of characters."""
    return b"".join(bytes(token["bytes"] or b"") for token in logprobs)
