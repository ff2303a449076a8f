"""What can't be enforced, or would take too long, is refused with the reason; and what isn't, goes on."""

import time
from collections.abc import Callable

import pytest

from llmboost.jobs import Grammar
from llmboost_worker.engine.grammar import Grammars
from llmboost_worker.engine.interface import GrammarError
from tests.unit.grammars import (
    Schema,
    allowed,
    compiled,
    of_schema,
    tokenizer_of,
)


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
        (Grammar("regex", r"\bword\b"), r"an assertion, such as \b"),
        (Grammar("regex", r"(a$)b"), "an assertion"),
        (Grammar("regex", r"[^\s\S]"), "no text of that form"),
        (Grammar("grammar", 'start: a\na: "a" unknown'), 'unknown name: "unknown" (line 2).'),
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
