"""What is to be refused in a JSON schema before the library sees it."""

from collections.abc import Iterator
from typing import Any

from llmboost_worker.engine.interface import GrammarError

MOST_LEVELS = 100
"""Of nesting; the library's parser has room for 127."""
MOST_COUNTED = 10_000
"""In `maxItems` and the like, which the library unrolls: 100,000 are a quarter of a second and 100 MB."""

_COUNTS = ("minItems", "maxItems", "minProperties", "maxProperties", "multipleOf")
"""`multipleOf` is a state for each remainder."""
_IGNORED = ("additionalItems", "disallow", "divisibleBy", "extends", "x-guidance")
"""What the library would pass over, though older drafts have it, or take for settings of its own."""
_BY_NAME = ("$defs", "definitions", "dependentSchemas", "patternProperties", "properties")
"""Keywords whose value is an object of schemas; its keys are names."""
_DATA = ("const", "default", "enum", "examples")


def check_schema(schema: Any) -> None:
    """
    Raises:
        GrammarError: it is nested too deeply, counts too far, or has a keyword that would be ignored.
    """
    levels = [schema]
    depth = 0
    while levels:
        depth += 1
        if depth > MOST_LEVELS:
            raise GrammarError(f"is nested more than {MOST_LEVELS} levels deep.")
        levels = [
            child
            for value in levels
            if isinstance(value, dict | list)
            for child in (value.values() if isinstance(value, dict) else value)
        ]
    for one in _schemas(schema):
        _check_keywords(one)


def _check_keywords(schema: dict[str, Any]) -> None:
    for keyword in _IGNORED:
        if keyword in schema:
            raise GrammarError(f"has the keyword '{keyword}', which this server can't enforce: remove it.")
    for keyword in _COUNTS:
        number = schema.get(keyword)
        if isinstance(number, int | float) and number > MOST_COUNTED:
            raise GrammarError(
                f"has {keyword} {number}, but this server counts to {MOST_COUNTED}: lower it, or remove it."
            )


def _schemas(schema: Any) -> Iterator[dict[str, Any]]:
    """A schema and all those in it."""
    if isinstance(schema, list):
        for each in schema:
            yield from _schemas(each)
    if not isinstance(schema, dict):
        return
    yield schema
    for keyword, value in schema.items():
        if keyword in _BY_NAME and isinstance(value, dict):
            for each in value.values():
                yield from _schemas(each)
        elif keyword not in _DATA:
            yield from _schemas(value)
