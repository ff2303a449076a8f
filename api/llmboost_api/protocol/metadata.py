"""OpenAI's metadata: a few short strings that a client attaches to what is kept for it."""

from typing import Annotated, Any

from pydantic import BeforeValidator, WithJsonSchema

from llmboost_api.protocol.request import problem
from llmboost_api.protocol.translate import shown

PAIRS, KEY_LENGTH, VALUE_LENGTH = 16, 64, 512
"""OpenAI's limits."""


def check_metadata(value: Any, param: str = "") -> dict[str, str]:
    """The value, if it is metadata. `param`: as in `problem`."""
    if not isinstance(value, dict):
        raise problem("invalid_type", f"must be an object of strings, not {shown(value)}.", param)
    if len(value) > PAIRS:
        raise problem("invalid_value", f"has {len(value)} pairs; at most {PAIRS} are allowed.", param)
    for key, text in value.items():
        if not isinstance(text, str):
            raise problem("invalid_type", f"gives {shown(text)} for {shown(key)}; values are strings.", param)
        if len(key) > KEY_LENGTH:
            raise problem(
                "invalid_value",
                f"has the key {shown(key)}; keys have at most {KEY_LENGTH} characters.",
                param,
            )
        if len(text) > VALUE_LENGTH:
            raise problem(
                "invalid_value",
                f"gives {len(text)} characters for {shown(key)}; values have at most {VALUE_LENGTH}.",
                param,
            )
    return value


Metadata = Annotated[
    dict[str, str],
    BeforeValidator(check_metadata),
    WithJsonSchema(
        {
            "type": "object",
            "maxProperties": PAIRS,
            "propertyNames": {"maxLength": KEY_LENGTH},
            "additionalProperties": {"type": "string", "maxLength": VALUE_LENGTH},
        }
    ),
]
