"""The response object: all that there is to say of a response, at any moment of its life."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

from llmboost.entries import (
    CANCELLED_TYPE,
    Delta,
    Entry,
    ReadEntry,
    Started,
    StreamError,
    Terminal,
    TokenLogprob,
    Usage,
)
from llmboost.jobs import derived_id
from llmboost_api.protocol.responses.items import text_part
from llmboost_api.protocol.shape import Choice, finite

Status = Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]

_ERROR_CODES = {400: "invalid_prompt", 429: "rate_limit_exceeded"}
"""By HTTP status. OpenAI has a closed list of codes; the message says more."""


def _status(started: bool, finish_reason: str | None, terminal: Terminal | None) -> Status:
    if terminal is None:
        return "in_progress" if started else "queued"
    if terminal.error is not None:
        return "cancelled" if terminal.error.type == CANCELLED_TYPE else "failed"
    return "incomplete" if finish_reason == "length" else "completed"


@dataclass(slots=True)
class Progress:
    """What a response's log says so far."""

    choice: Choice = field(default_factory=Choice)
    started: bool = False
    terminal: Terminal | None = None

    @classmethod
    def of(cls, log: Iterable[ReadEntry]) -> "Progress":
        """What a log says, from its beginning."""
        progress = cls()
        for _, entry in log:
            progress.take(entry)
        return progress

    def take(self, entry: Entry) -> None:
        """The next entry."""
        match entry:
            case Delta():
                for delta in entry.choices:
                    self.choice.add(delta)
            case Started():
                self.started = True
            case Terminal():
                self.terminal = entry

    @property
    def status(self) -> Status:
        return _status(self.started, self.choice.finish_reason, self.terminal)

    @property
    def begun(self) -> bool:
        """Whether there is a message, which may be empty."""
        return self.choice.finish_reason is not None or any(self.choice.texts)


class ResponseObject:
    """Writes one response down, as it was asked for."""

    def __init__(self, response_id: str, created: int, model: str, repeated: bytes) -> None:
        """`repeated`: what it repeats of its request, as JSON."""
        self.id = response_id
        self.item_id = derived_id("msg_", response_id, "output")
        self._created = created
        self._model = model
        self._repeated: dict[str, Any] = msgspec.json.decode(repeated)

    @property
    def background(self) -> bool:
        """Whether it runs without its client."""
        return bool(self._repeated["background"])

    def at(self, progress: Progress, status: Status | None = None) -> dict[str, Any]:
        """The object when the log has come so far. `status`: what to say instead of what the log says."""
        terminal = progress.terminal
        status = progress.status if status is None else status
        usage = terminal.usage if terminal is not None else None
        error = terminal.error if terminal is not None and status == "failed" else None
        return {
            "id": self.id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "completed_at": _seconds(terminal) if status == "completed" else None,
            "error": error and _error(error),
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "model": self._model,
            "output": [self.item(progress)] if progress.begun else [],
            "usage": usage and _usage(usage),
            **self._repeated,
        }

    def item(self, progress: Progress) -> dict[str, Any]:
        """The message that the model writes."""
        said = progress.choice
        return self.message(_ITEM_STATUS[progress.status], [text_part(said.text, logprobs(said.logprobs))])

    def message(self, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
        """The message with other content than there is by now."""
        return {
            "id": self.item_id,
            "type": "message",
            "status": status,
            "role": "assistant",
            "content": content,
        }


_ITEM_STATUS: dict[Status, str] = {
    "queued": "in_progress",
    "in_progress": "in_progress",
    "completed": "completed",
    "incomplete": "incomplete",
    "failed": "incomplete",
    "cancelled": "incomplete",
}


def _seconds(terminal: Terminal | None) -> int | None:
    return None if terminal is None or terminal.at is None else int(terminal.at)


def _error(error: StreamError) -> dict[str, Any]:
    code = _ERROR_CODES.get(error.status, "server_error")
    return {"code": code, "message": error.message, "type": error.type, "param": error.param}


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def logprobs(tokens: Sequence[TokenLogprob]) -> list[dict[str, Any]]:
    """Logprobs as a message and its events hold them."""
    return [{**_token(token), "top_logprobs": [_token(other) for other in token.top]} for token in tokens]


def _token(token: TokenLogprob) -> dict[str, Any]:
    return {"token": token.token, "bytes": token.bytes or [], "logprob": finite(token.logprob)}
