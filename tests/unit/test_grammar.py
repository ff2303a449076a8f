"""Outputs that are held to a grammar are of it, whatever the model would rather say."""

import json
import re
from concurrent.futures import Future
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmboost.jobs import Grammar
from llmboost_worker.engine.grammar.compiler import KEPT
from llmboost_worker.engine.grammar.matcher import MOST_BLANKS
from llmboost_worker.engine.interface import GrammarError
from tests.unit.grammars import (
    END,
    Schema,
    allowed,
    compiled,
    drawn,
    grammars_of,
    of_choices,
    of_schema,
    said,
    tokenizer_of,
)

FAMILIES = list(END)


def check(schema: Schema, seed: int, family: str = "byte_level") -> None:
    try:
        ids = drawn(of_schema(schema), seed, family)
    except GrammarError as refused:
        if "exclusively" not in str(refused):
            raise
        return  # of what the strategy makes, all that can't be enforced
    if ids is not None:
        jsonschema.validate(json.loads(said(ids, family)), schema, jsonschema.Draft202012Validator)


# What conforms

NAMES = st.sampled_from(["a", "name", "größe", 'in "quotes"', "a b", "😀"])
FRACTIONS = st.floats(-1e9, 1e9).map(lambda number: round(number, 5))
WHOLE = st.integers(-(2**53), 2**53)
bounds = st.tuples(st.integers(-1000, 1000), st.integers(0, 500)).map(lambda pair: (pair[0], sum(pair)))
SCALARS = st.one_of(
    bounds.map(lambda b: {"type": "integer", "minimum": b[0], "maximum": b[1]}),
    bounds.map(lambda b: {"type": "number", "minimum": b[0] / 8, "exclusiveMaximum": b[1] / 8 + 0.5}),
    st.integers(0, 5).map(lambda least: {"type": "string", "minLength": least, "maxLength": least + 5}),
    st.lists(NAMES | WHOLE | FRACTIONS | st.booleans() | st.none(), min_size=1).map(
        lambda each: {"enum": each}
    ),
    st.sampled_from(
        [
            {"type": "boolean"},
            {"type": "null"},
            {"const": {"a": [1, None]}},
            {"type": "string", "pattern": "^[a-f]{2,4}$"},
            {"type": "string", "format": "date"},
            {"type": ["integer", "null"], "multipleOf": 7, "minimum": 0, "maximum": 70},
        ]
    ),
)


def containers(inner: st.SearchStrategy[Schema]) -> st.SearchStrategy[Schema]:
    objects = st.dictionaries(NAMES, inner, max_size=3).flatmap(
        lambda properties: (
            st.lists(st.sampled_from(sorted(properties)), unique=True).map(
                lambda required: {
                    "type": "object",
                    "properties": properties,
                    "required": required,
                    "additionalProperties": False,
                }
            )
            if properties
            else st.just({"type": "object", "additionalProperties": False})
        )
    )
    arrays = st.tuples(inner, st.integers(0, 2)).map(
        lambda pair: {"type": "array", "items": pair[0], "minItems": pair[1], "maxItems": pair[1] + 2}
    )
    either = st.lists(inner, min_size=1, max_size=3).map(lambda each: {"anyOf": each})
    return objects | arrays | either


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.recursive(SCALARS, containers, max_leaves=6), st.integers(0, 2**32), st.sampled_from(FAMILIES))
def test_json_conforms_to_any_schema(schema: Schema, seed: int, family: str) -> None:
    check(schema, seed, family)


LIST = {
    "$ref": "#/$defs/node",
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "value": {"type": "integer", "minimum": 0, "maximum": 9},
                "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
            },
            "required": ["value", "next"],
            "additionalProperties": False,
        }
    },
}
KINDS = {
    "oneOf": [
        {
            "type": "object",
            "properties": {"kind": {"const": kind}, "value": value},
            "required": ["kind", "value"],
            "additionalProperties": False,
        }
        for kind, value in (("a", {"type": "boolean"}), ("b", {"type": "null"}))
    ]
}
TUPLE = {
    "type": "array",
    "prefixItems": [{"type": "boolean"}, {"enum": ["x"]}],
    "items": False,
    "minItems": 2,
}
BOTH = {
    "allOf": [
        {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]},
        {"properties": {"b": {"type": "null"}}, "required": ["b"], "maxProperties": 2},
    ]
}


@pytest.mark.parametrize("schema", [LIST, KINDS, TUPLE, BOTH])
def test_json_conforms_to_references_and_combinations(schema: Schema) -> None:
    for seed in range(5):
        check(schema, seed)


@pytest.mark.parametrize("multiple", [0.01, 5, 3_600, 9_973, 0.5])
def test_round_multiples_are_enforced(multiple: float) -> None:
    check({"type": "number", "multipleOf": multiple, "minimum": 0, "maximum": multiple * 20}, 1)


def test_properties_come_in_the_schemas_order() -> None:
    properties = {name: {"type": "null"} for name in ("z", "a", "m")}
    schema = {"type": "object", "properties": properties, "required": ["m", "a", "z"]}
    ids = drawn(of_schema({**schema, "additionalProperties": False}), 1)
    assert ids is not None
    assert list(json.loads(said(ids))) == ["z", "a", "m"]


def test_json_without_a_schema_is_an_object() -> None:
    found = [drawn(Grammar("json"), seed, most=300) for seed in range(12)]
    whole = [json.loads(said(ids)) for ids in found if ids is not None]
    assert whole
    assert all(isinstance(each, dict) for each in whole)


REGEXES = [
    r"[a-z]{2,5}-\d{3}",
    r"(\d{1,3}\.){3}\d{1,3}",
    r"^\w+@(example|test)\.(com|org)$",
    r"(?i)yes|no",
    r"a*(b|cd)+e?",
    r"[^\n/]{1,8}/\"quoted\" and 'so'",
    r"(größe|naïve|😀){2}",
    r".{0,6}x",
    r"\s+\.",
    r" [a-c]{3}",
]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pattern", REGEXES)
def test_the_whole_output_matches_a_pattern(pattern: str, family: str) -> None:
    for seed in range(4):
        ids = drawn(Grammar("regex", pattern), seed, family)
        assert ids is not None
        assert re.fullmatch(pattern, said(ids, family))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_output_is_one_of_the_choices_and_may_be_any(family: str) -> None:
    choices = ["yes", "yesterday", 'say "no"', "back\\slash", "two\nlines", "größe 😀", "a/b"]
    found = {said(drawn(of_choices(*choices), seed, family) or [], family) for seed in range(200)}
    assert found == set(choices)


@pytest.mark.parametrize(
    "grammar",
    ['root ::= "a" item+ "b"\nitem ::= [0-9] | "x"', 'start: "a" item+ "b"\nitem: /[0-9]/ | "x"'],
)
def test_the_output_is_of_a_grammar_in_gbnf_or_lark(grammar: str) -> None:
    for seed in range(4):
        ids = drawn(Grammar("grammar", grammar), seed)
        assert ids is not None
        assert re.fullmatch("a[0-9x]+b", said(ids))


# What may come next


@pytest.mark.parametrize("family", FAMILIES)
def test_only_text_is_allowed_inside_and_only_the_end_after_it(family: str) -> None:
    """No special token, and no id that only the model has; where nothing else may follow, the end must."""
    one = compiled(Grammar("regex", r"(.|\n){3}"), family)
    tokens = tokenizer_of(family).token_bytes()
    matcher = one.matcher(start=0, holds_end=False)
    matcher.read([])
    assert all(tokens[token] for token in allowed(matcher))
    assert not matcher.must_end
    x = tokens.index(b"x")
    matcher.read([x] * 3)
    assert list(allowed(matcher)) == one.vocabulary.end_ids
    assert matcher.must_end


@pytest.mark.parametrize("family", FAMILIES)
def test_each_text_has_one_token_and_it_is_the_tokenizers_own(family: str) -> None:
    """A byte's token stands for a character only where that has none: it is what the model has learned."""
    tokenizer = tokenizer_of(family)
    tokens = [token for token in tokenizer.token_bytes() if token]
    assert len(tokens) == len(set(tokens))
    ids = tokenizer.encode("Hello, world", add_special_tokens=False)
    assert b"".join(tokenizer.token_bytes()[token] for token in ids).strip() == b"Hello, world"


def test_the_end_can_be_held_as_long_as_there_is_something_else() -> None:
    one = compiled(Grammar("regex", "a?b*"))
    ends, a, b = one.vocabulary.end_ids, *map(one.vocabulary.tokens.index, (b"a", b"b"))
    held, free = one.matcher(start=0, holds_end=True), one.matcher(start=0, holds_end=False)
    for ids in ([], [a], [a, b]):
        held.read(ids)
        free.read(ids)
        assert set(allowed(free)) == {*allowed(held), *ends}


def test_whitespace_in_json_has_an_end() -> None:
    """A model that likes it best comes to its end all the same; inside strings there is no limit."""
    schema = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}
    one = compiled(of_schema({**schema, "additionalProperties": False}))
    matcher = one.matcher(start=0, holds_end=False)
    ids: list[int] = []
    while not matcher.must_end:
        matcher.read(ids)
        ids.append(min(allowed(matcher), key=lambda token: _taste(one.vocabulary.tokens[token])))
        assert len(ids) < 300
    longest = max(map(len, re.findall(r"\s+", said(ids))))
    assert MOST_BLANKS <= longest < MOST_BLANKS + 40
    text = b'{"a":"\\"' + b" " * 200
    matcher = one.matcher(start=0, holds_end=False)
    matcher.read([one.vocabulary.tokens.index(bytes([byte])) for byte in text])
    assert one.vocabulary.tokens.index(b" ") in allowed(matcher)


def _taste(text: bytes) -> int:
    """Whitespace first, then what ends a string."""
    return (b"\n", b"\t", b'"').index(text[:1]) if text[:1] in (b"\n", b"\t", b'"') else 3


def test_a_state_depends_on_the_ids_alone() -> None:
    """Read one by one, all at once, or from any place on: the same tokens are allowed."""
    grammar = of_schema(LIST)
    ids = drawn(grammar, 3)
    assert ids is not None
    one = compiled(grammar)
    step_by_step = one.matcher(start=2, holds_end=False)
    for length in range(len(ids) - 1):
        step_by_step.read([5, 6, *ids[:length]])
        at_once = one.matcher(start=2, holds_end=False)
        at_once.read([5, 6, *ids[:length]])
        assert (at_once.mask == step_by_step.mask).all()


# What is kept


def test_a_grammar_is_compiled_once_and_the_oldest_go() -> None:
    grammars = grammars_of("byte_level")
    first = of_choices("kept", "first")
    kept: Future[Any] = grammars.compile(first)
    assert grammars.compile(Grammar("choice", first.value, "another name")) is kept
    for number in range(KEPT - 1):
        grammars.compile(of_choices(str(number))).result()
    assert grammars.compile(first) is kept  # used last, so it stays longest
    for number in range(KEPT):
        grammars.compile(of_choices(f"more {number}")).result()
    assert grammars.compile(first) is not kept
