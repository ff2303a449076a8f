"""What is to be refused in a JSON schema before the library sees it."""

from collections.abc import Iterator
from decimal import Decimal
from typing import Any

from llmboost_worker.engine.interface import GrammarError

MOST_LEVELS = 100
"""Of nesting; the library's parser has room for 127."""
MOST_COUNTED = 10_000
"""In `maxItems` and the like, which the library unrolls: 100,000 are a quarter of a second and 100 MB."""

MOST_DIGITS = 15
"""Of a fraction. The library reads longer ones with an error in the last place, and integers above 2^53 as
doubles."""

_COUNTS = ("minItems", "maxItems", "minProperties", "maxProperties", "multipleOf")
"""`multipleOf` is a state for each remainder."""
_NUMBERS = ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum", "multipleOf", "enum", "const")
_IGNORED = ("additionalItems", "disallow", "divisibleBy", "extends", "x-guidance")
"""What the library would pass over, though older drafts have it, or take for settings of its own."""
_BY_NAME = ("$defs", "definitions", "dependentSchemas", "patternProperties", "properties")
"""Keywords whose value is an object of schemas; its keys are names."""
_DATA = ("const", "default", "enum", "examples")


def check_schema(schema: Any) -> None:
    """
    Raises:
        GrammarError: it is nested too deeply, counts too far, or has a number that would be rounded or a
            keyword that would be ignored.
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

    for keyword in _NUMBERS:
        for number in _numbers(schema.get(keyword)):
            if _is_rounded(number):
                raise GrammarError(
                    f"has the number {number} in {keyword}, which this server would round: remove it."
                )
    if (bound := _admitted(schema)) is not None:
        raise GrammarError(
            f"has an interval that is shorter than 1 and begins or ends with {bound} exclusively, which this "
            "server can't enforce: use an inclusive bound."
        )


def _numbers(value: Any) -> Iterator[float]:
    """All in it."""
    if isinstance(value, int | float):
        yield value
    elif isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _numbers(each)


def _is_rounded(number: float) -> bool:
    if isinstance(number, int):
        return abs(number) > 2**53
    return len(Decimal(repr(number)).normalize().as_tuple().digits) > MOST_DIGITS


def _admitted(schema: dict[str, Any]) -> float | None:
    """A bound that the library takes for an inclusive one: a whole number, less than 1 from the other."""
    least, above, most, below = (
        value if isinstance(value := schema.get(keyword), int | float) else None
        for keyword in ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum")
    )
    lows = [bound for bound in (least, above) if bound is not None]
    highs = [bound for bound in (most, below) if bound is not None]
    if not lows or not highs or min(highs) - max(lows) >= 1:
        return None
    return next((bound for bound in (above, below) if bound is not None and bound == int(bound)), None)


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
