"""Items: the messages that a response is asked with, and how they are listed."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema

from llmboost.jobs import derived_id
from llmboost_api.protocol.request import Neutral, RequestModel, always, problem
from llmboost_api.protocol.translate import shown

Message = dict[str, Any]
"""A message as it is kept: its role, and as its content the texts of its parts."""

_PARTS = {
    "input_text": ("text", frozenset[str]()),
    "output_text": ("text", frozenset({"annotations", "logprobs"})),
    "refusal": ("refusal", frozenset[str]()),
}
"""By type of a content part: the field with its text, and what else a client that sends back what it received
sends along."""


def _texts(value: Any) -> tuple[str, ...]:
    """A string, or text parts."""
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list):
        raise problem("invalid_type", f"must be a string or a list of text parts, not {shown(value)}.")
    return tuple(_text_of(part, number) for number, part in enumerate(value))


def _text_of(part: Any, number: int) -> str:
    if not isinstance(part, dict):
        raise problem("invalid_type", f"has {shown(part)} as part {number}; parts are objects.")
    kind = part.get("type")
    if not isinstance(kind, str) or kind not in _PARTS:
        raise problem(
            "unsupported_value",
            f"has part {number} of type {shown(kind)}; this server takes text only: "
            '{"type": "input_text", "text": …}.',
        )
    field, others = _PARTS[kind]
    given = {name for name, content in part.items() if content is not None}
    if extra := given - {"type", field, *others}:
        raise problem("unknown_parameter", f"has {min(extra)!r} in part {number}: remove it.")
    if not isinstance(part.get(field), str):
        raise problem("invalid_type", f"has {shown(part.get(field))} as the {field} of part {number}.")
    text: str = part[field]
    return text


Texts = Annotated[
    tuple[str, ...],
    BeforeValidator(_texts),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "properties": {
                            "type": {"enum": ["input_text", "output_text"]},
                            "text": {"type": "string"},
                            "annotations": {"type": "array"},
                            "logprobs": {"type": "array"},
                        },
                        "required": ["type", "text"],
                    },
                },
            ]
        }
    ),
]


class InputMessage(RequestModel):
    """One message: as a client writes it, or as it received it from a response or a list of items."""

    unsupported: ClassVar[Mapping[str, Neutral]] = {"phase": always}

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Texts
    id: str | None = Field(None, description="Of a message that comes from a response; not looked at.")
    status: Literal["in_progress", "completed", "incomplete"] | None = None

    def kept(self) -> Message:
        """The message as it is stored."""
        return {"role": self.role, "content": list(self.content)}


def _items(value: Any) -> list[Any]:
    """The items of an input; a string is what a user says."""
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if not isinstance(value, list):
        raise problem("invalid_type", f"must be a string or a list of items, not {shown(value)}.")
    if not value:
        raise problem("invalid_value", "is an empty list: give at least one message.")
    for number, item in enumerate(value):
        if not isinstance(item, dict):
            raise problem("invalid_type", f"has {shown(item)} as item {number}; items are objects.")
        kind = item.get("type")
        if kind not in (None, "message"):
            raise problem(
                "unsupported_value",
                f"has item {number} of type {shown(kind)}; this server takes messages only: "
                '{"role": "user", "content": …}.',
            )
    return value


Input = Annotated[
    list[InputMessage],
    BeforeValidator(_items, json_schema_input_type=str | list[InputMessage]),
]


def for_template(message: Message) -> dict[str, str]:
    """A kept message as a chat template takes it; `developer` is OpenAI's newer word for `system`."""
    role = message["role"]
    return {"role": "system" if role == "developer" else role, "content": "\n".join(message["content"])}


def listed(response_id: str, kept: Sequence[Message]) -> list[dict[str, Any]]:
    """Kept messages as the items that they are listed as, in order. Ids are the same each time."""
    return [
        {
            "id": derived_id("msg_", response_id, "input", number),
            "type": "message",
            "role": message["role"],
            "status": "completed",
            "content": [
                text_part(text) if message["role"] == "assistant" else {"type": "input_text", "text": text}
                for text in message["content"]
            ],
        }
        for number, message in enumerate(kept)
    ]


def text_part(text: str, logprobs: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    """What a model wrote, as part of a message."""
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": list(logprobs)}
