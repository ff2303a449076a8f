"""Outputs that are held to a grammar are of it, whatever the model would rather say."""

import json
import re
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmboost.jobs import Grammar
from llmboost_worker.engine.grammar import Grammars
from llmboost_worker.engine.grammar.compiler import KEPT
from llmboost_worker.engine.grammar.matcher import MOST_BLANKS
from llmboost_worker.engine.interface import GrammarError
from tests.unit.grammars import (
    END,
    allowed,
    compiled,
    drawn,
    grammars_of,
    of_choices,
    of_schema,
    said,
    tokenizer_of,
)

Schema = dict[str, Any]
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


# What is refused


def refusal(grammar: Grammar, family: str = "byte_level") -> str:
    with pytest.raises(GrammarError) as refused:
        compiled(grammar, family)
    message = str(refused.value)
    assert "\n" not in message
    assert len(message) < 300
    return message


def nested(levels: int) -> Schema:
    schema: Schema = {"type": "integer"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize(
    ("schema", "names"),
    [
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"properties": {"a": {"properties": {"b": {"not": {}}}}}}, "not"),
        ({"if": {}, "then": {}}, "then"),
        ({"type": "object", "propertyNames": {"pattern": "a"}}, "propertyNames"),
        ({"type": "array", "items": {}, "additionalItems": False}, "additionalItems"),
        ({"properties": {"a": {"type": "string", "format": "path"}}}, "path"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "anyOf"),
        ({"$ref": "https://example.com/schema"}, "example.com"),
        ({"$ref": "#/$defs/missing"}, "missing"),
        ({"type": "integer", "minimum": 5, "maximum": 4}, "5"),
        ({"type": "number", "exclusiveMinimum": 0, "maximum": 0.5}, "exclusively"),
        ({"type": "number", "minimum": -1.5, "exclusiveMaximum": -1}, "exclusively"),
        ({"enum": [90071992.66015625]}, "90071992.66015625"),
        ({"enum": ["a", [2**53 + 1]]}, "9007199254740993"),
        ({"type": "text"}, "text"),
        ({"type": "string", "pattern": "(?=a)"}, "look-around"),
        ({"type": "array", "maxItems": 1_000_000}, "maxItems"),
        ({"type": "integer", "multipleOf": 1_000_003}, "multipleOf"),
        ({"type": "number", "multipleOf": 9999.9999}, "multipleOf"),
        ({"allOf": [{"type": "integer", "multipleOf": 9973}, {"multipleOf": 9967}]}, "9967"),
        ({"type": "object", "patternProperties": {f"^{i}_": {} for i in range(100)}}, "patternProperties"),
        ({"type": "string", "pattern": "(ab)?" * 4000}, "characters"),
        ({"x-guidance": {"lenient": True}, "uniqueItems": True}, "x-guidance"),
        ({"type": "object", "required": ["a"], "properties": {"a": False}}, "nsatisfiable"),
        (nested(101), "100 levels"),
        ({"enum": [f"{'x' * 40} {i}" for i in range(30_000)]}, "smaller"),
    ],
)
def test_a_schema_that_cannot_be_enforced_is_refused_by_what_it_has(schema: Schema, names: str) -> None:
    assert names in refusal(of_schema(schema))


@pytest.mark.parametrize("multiple", [0.01, 5, 3_600, 9_973, 0.5])
def test_round_multiples_are_enforced(multiple: float) -> None:
    check({"type": "number", "multipleOf": multiple, "minimum": 0, "maximum": multiple * 20}, 1)


def test_names_that_look_like_keywords_are_names() -> None:
    names = ["additionalItems", "not", "uniqueItems", "maxItems", "x-guidance"]
    properties = {name: {"type": "null"} for name in names}
    schema = {"type": "object", "properties": properties, "additionalProperties": False}
    compiled(of_schema({**schema, "$defs": properties}))
    compiled(of_schema({"type": "number", "default": 3.141592653589793, "examples": [2**60]}))
    compiled(of_schema({"const": {"maxItems": 10**6, "extends": 1}}))


@pytest.mark.parametrize(
    ("grammar", "names"),
    [
        (Grammar("regex", "(a"), "unclosed group"),
        (Grammar("regex", "(?=a)b"), "look-ahead"),
        (Grammar("regex", r"(a)\1"), "backreferences"),
        (Grammar("regex", r"\bword\b"), "WordUnicode"),
        (Grammar("regex", r"[^\s\S]"), "no text of that form"),
        (Grammar("grammar", "start: unknown"), "unknown"),
        (Grammar("grammar", "root ::= ("), "neither GBNF nor Lark"),
        (Grammar("grammar", 'start: %json {"type": "number", "multipleOf": 9999.9999}'), "%json"),
        (Grammar("grammar", '%llguidance {"allow_invalid_utf8": true}\nstart: /a/'), "%llguidance"),
    ],
)
def test_other_grammars_are_refused_with_the_reason(grammar: Grammar, names: str) -> None:
    assert names in refusal(grammar)


@pytest.mark.parametrize("family", ["unigram", "word_piece", "slow"])
def test_a_tokenizer_without_bytes_can_hold_no_output_to_a_grammar(family: str) -> None:
    assert "tokenizer" in refusal(Grammar("json"), family)


def test_a_model_without_an_end_can_hold_no_output_to_a_grammar() -> None:
    with pytest.raises(GrammarError, match="end-of-sequence"):
        Grammars(tokenizer_of("byte_level").token_bytes, 500, ()).compile(Grammar("json")).result()


def chain(link: Callable[[Schema], Schema], length: int) -> Grammar:
    """A schema in which each definition refers to the next."""
    names = [f"{number}" for number in range(length)]
    definitions = {name: link({"$ref": f"#/$defs/{int(name) + 1}"}) for name in names}
    return of_schema({"$ref": "#/$defs/0", "$defs": {**definitions, f"{length}": {"type": "object"}}})


HOSTILE = [
    chain(lambda next: {"type": "array", "items": next}, 2200),
    chain(lambda next: {"type": "object", "properties": {"": next}, "required": [""]}, 1500),
    chain(lambda next: {"anyOf": [next, {}]}, 2500),
    chain(lambda next: {"allOf": [next, {}]}, 2500),
    Grammar("grammar", "start: a0\n" + "\n".join(f"a{i}: a{i + 1}" for i in range(1100)) + '\na1100: "a"'),
    Grammar("grammar", "start: A\nA: " + "(" * 8000 + '"a"' + ")" * 8000),
    Grammar("regex", "(" * 8000 + "a" + ")" * 8000),
    Grammar("regex", r"(((a{100}){100}){100})"),
    Grammar("regex", r"(((a{1000}){1000}){1000})"),
    Grammar("regex", r"((((ab|c){1,1000}){1,1000}){1,1000})"),
    Grammar("regex", r".*a.{500}b.*"),
    Grammar("regex", r"(x+x+)+y"),
    Grammar("regex", ".*".join("abcdefghijklmnopqrstuvwxyz")),
    Grammar("regex", r"\p{L}{1,5000}-\w{3000}"),
    of_schema({"type": "array", "maxItems": 10_000, "items": nested(90)}),
    of_schema({"type": "integer", "multipleOf": 9973}),
    of_schema({"allOf": [{"type": "string", "pattern": f"{c}.{{9}}"} for c in "abcdefghij"]}),
    of_schema({"properties": {f"p{i}": {"type": "string"} for i in range(3000)}}),
    of_schema({"anyOf": [{"type": "array", "maxItems": 9_000 + i} for i in range(100)]}),
    Grammar("grammar", 'start: start{1,60000} A | A B?\nA: "a"|"b"\nB: "ab"'),
    Grammar("grammar", 'start: (((A|B){1,60000} C){1,60000})\nA: "a"\nB: "ab"\nC: /c{60000}/'),
]


@pytest.mark.parametrize("grammar", HOSTILE)
def test_a_hostile_grammar_takes_little_time(grammar: Grammar) -> None:
    """It is refused, or goes on, or ends with an error of its own: at no step does it hold anybody up."""
    steps = []
    began = time.process_time()
    try:
        matcher = compiled(grammar).matcher(start=0, holds_end=False)
    except GrammarError:
        matcher = None
    steps.append(time.process_time() - began)
    ids: list[int] = []
    while matcher is not None and matcher.error is None and not matcher.must_end and len(ids) < 30:
        began = time.process_time()
        matcher.read(ids)
        steps.append(time.process_time() - began)
        if matcher.error is None:
            ids.append(int(allowed(matcher)[0]))
    assert max(steps) < 3


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
