"""What is to be refused in a JSON schema before the library sees it: what it would get wrong, and what would
cost too much."""

import math
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

from llmboost_worker.engine.interface import GrammarError

MOST_LEVELS = 100
"""Of nesting; the library's parser has room for 127."""
MOST_COUNTED = 10_000
"""In `maxItems` and the like, which the library unrolls: 100,000 are a quarter of a second and 100 MB."""
MOST_REMAINDERS = 10_000
"""Of all `multipleOf` together, where each is a state: `9999.9999` has 10^8, and took 3 GB."""
MOST_COMPARED = 5_000
"""Pairs of patterns and names of one object's properties, which must exclude each other: 0.2 ms for each."""
LONGEST_PATTERN = 16 * 1024
"""Characters. The time grows with the square: 0.2 s for this many, and 4 s for 60,000."""
MOST_DIGITS = 15
"""Of a fraction. The library reads longer ones with an error in the last place, and integers above 2^53 as
doubles."""

_COUNTS = ("minItems", "maxItems", "minProperties", "maxProperties")
_NUMBERS = ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum", "multipleOf", "enum", "const")
_IGNORED = ("additionalItems", "disallow", "divisibleBy", "extends", "x-guidance")
"""What the library would pass over, though older drafts have it, or take for settings of its own."""
_BY_NAME = ("$defs", "definitions", "dependentSchemas", "patternProperties", "properties")
"""Keywords whose value is an object of schemas; its keys are names."""
_DATA = ("const", "default", "enum", "examples")


def check_schema(schema: Any) -> None:
    """
    Raises:
        GrammarError: something in it would be enforced wrongly or not at all, or be too much work.
    """
    _check_depth(schema)
    schemas = list(_schemas(schema))
    for one in schemas:
        _check_keywords(one)
        _check_numbers(one)
        _check_work(one)
    _check_multiples([one["multipleOf"] for one in schemas if _number(one, "multipleOf")])


def _check_depth(schema: Any) -> None:
    level, depth = [schema], 0
    while level:
        depth += 1
        if depth > MOST_LEVELS:
            raise GrammarError(f"is nested more than {MOST_LEVELS} levels deep.")
        level = [child for value in level for child in _children(value)]


def _check_keywords(schema: dict[str, Any]) -> None:
    for keyword in _IGNORED:
        if keyword in schema:
            raise GrammarError(f"has the keyword '{keyword}', which this server can't enforce: remove it.")


def _check_numbers(schema: dict[str, Any]) -> None:
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


def _check_work(schema: dict[str, Any]) -> None:
    for keyword in _COUNTS:
        if (number := _number(schema, keyword)) and number > MOST_COUNTED:
            raise GrammarError(
                f"has {keyword} {number}, but this server counts to {MOST_COUNTED}: lower it, or remove it."
            )
    patterns = schema.get("patternProperties")
    patterns = list(patterns) if isinstance(patterns, dict) else []
    properties = schema.get("properties")
    names = len(properties) if isinstance(properties, dict) else 0
    if len(patterns) * (len(patterns) + names) > MOST_COMPARED:
        raise GrammarError(f"has {len(patterns)} patterns in one patternProperties: use fewer.")
    pattern = schema.get("pattern")
    if any(len(each) > LONGEST_PATTERN for each in (pattern, *patterns) if isinstance(each, str)):
        raise GrammarError(f"has a pattern of more than {LONGEST_PATTERN} characters: make it shorter.")


def _check_multiples(numbers: list[float]) -> None:
    """All at once: where schemas are to hold together their multiples are, and which do is hard to say."""
    each = [Decimal(repr(number)).normalize() for number in numbers if number > 0]
    places = max([0, *[-int(number.as_tuple().exponent) for number in each]])
    common = math.lcm(*[int(number.scaleb(places)) for number in each])
    while places and common % 10 == 0:
        common, places = common // 10, places - 1
    if common > MOST_REMAINDERS:
        some = ", ".join(map(str, numbers[:3]))
        raise GrammarError(f"has multipleOf {some}, which is too much to count: use rounder numbers.")


def _number(schema: dict[str, Any], keyword: str) -> float | None:
    value = schema.get(keyword)
    return value if isinstance(value, int | float) else None


def _numbers(value: Any) -> Iterator[float]:
    """All in it."""
    if isinstance(value, int | float):
        yield value
    for each in _children(value):
        yield from _numbers(each)


def _children(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


def _is_rounded(number: float) -> bool:
    if isinstance(number, int):
        return abs(number) > 2**53
    return len(Decimal(repr(number)).normalize().as_tuple().digits) > MOST_DIGITS


def _admitted(schema: dict[str, Any]) -> float | None:
    """A bound that the library takes for an inclusive one: a whole number, less than 1 from the other."""
    above, below = _number(schema, "exclusiveMinimum"), _number(schema, "exclusiveMaximum")
    lows = [bound for bound in (above, _number(schema, "minimum")) if bound is not None]
    highs = [bound for bound in (below, _number(schema, "maximum")) if bound is not None]
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
