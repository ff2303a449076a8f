"""What a request may say of its answer's form: one thing at most, and each refusal names its field."""

from typing import Any

import pytest

from llmboost.jobs import Grammar
from llmboost_api.protocol.chat import ChatRequest
from llmboost_api.protocol.completions import CompletionRequest
from llmboost_api.protocol.request import RequestModel
from llmboost_api.protocol.responses.request import ResponseRequest
from tests.unit.test_api_protocol import USER, refusal

BODIES: dict[type[RequestModel], dict[str, Any]] = {
    ChatRequest: {"model": "m", "messages": [USER]},
    CompletionRequest: {"model": "m", "prompt": "Hi"},
    ResponseRequest: {"model": "m", "input": "Hi"},
}
SCHEMA = {"type": "object", "properties": {"größe": {"type": "integer"}}}
AS_TEXT = '{"type": "object", "properties": {"größe": {"type": "integer"}}}'


def grammar(model: Any, **fields: Any) -> Grammar | None:
    found: Grammar | None = model.model_validate({**BODIES[model], **fields}).sampling_params("id").grammar
    return found


def named(schema: Any = SCHEMA, **fields: Any) -> dict[str, Any]:
    return {"name": "answer", "schema": schema, **fields}


EVERYWHERE = [
    ({"guided_json": SCHEMA}, Grammar("json_schema", AS_TEXT, "guided_json")),
    ({"guided_json": AS_TEXT}, Grammar("json_schema", AS_TEXT, "guided_json")),
    ({"guided_regex": "a+"}, Grammar("regex", "a+", "guided_regex")),
    ({"guided_choice": ["ja", "nö"]}, Grammar("choice", '["ja", "nö"]', "guided_choice")),
    ({"guided_grammar": "root ::= x"}, Grammar("grammar", "root ::= x", "guided_grammar")),
    ({"structured_outputs": {"json": SCHEMA}}, Grammar("json_schema", AS_TEXT, "structured_outputs.json")),
    ({"structured_outputs": {"regex": "a+"}}, Grammar("regex", "a+", "structured_outputs.regex")),
    ({"structured_outputs": {"choice": ["a"]}}, Grammar("choice", '["a"]', "structured_outputs.choice")),
    ({"structured_outputs": {"grammar": "x"}}, Grammar("grammar", "x", "structured_outputs.grammar")),
    ({"structured_outputs": {"json_object": True}}, Grammar("json", "", "structured_outputs.json_object")),
    ({"guided_decoding_backend": "xgrammar", "guided_regex": None}, None),
]


@pytest.mark.parametrize("model", BODIES)
@pytest.mark.parametrize(("fields", "expected"), EVERYWHERE)
def test_every_endpoint_takes_vllms_fields(model: Any, fields: Any, expected: Grammar | None) -> None:
    assert grammar(model, **fields) == expected


@pytest.mark.parametrize("model", [ChatRequest, CompletionRequest])
def test_completions_take_response_format(model: Any) -> None:
    assert grammar(model, response_format={"type": "text"}) is None
    assert grammar(model, response_format={"type": "json_object"}) == Grammar("json", "", "response_format")
    for strict in (True, False, None):
        asked = {"type": "json_schema", "json_schema": named(strict=strict, description="An answer.")}
        expected = Grammar("json_schema", AS_TEXT, "response_format.json_schema.schema")
        assert grammar(model, response_format=asked) == expected
    assert grammar(model, response_format={"type": "text"}, guided_regex="a") is not None


def test_responses_take_a_flat_format_and_repeat_it() -> None:
    body = BODIES[ResponseRequest]
    for given, expected, repeated in (
        ({"type": "json_object"}, Grammar("json", "", "text.format"), b'"format":{"type":"json_object"}'),
        (
            {"type": "json_schema", **named(strict=True)},
            Grammar("json_schema", AS_TEXT, "text.format.schema"),
            b'"name":"answer"',
        ),
    ):
        request = ResponseRequest.model_validate({**body, "text": {"format": given}})
        assert request.sampling_params("id").grammar == expected
        assert repeated in request.repeated


def format_of(kind: str, **fields: Any) -> dict[str, Any]:
    return {"response_format": {"type": kind, **fields}}


WRONG: list[tuple[dict[str, Any], str]] = [
    (format_of("xml"), "response_format.type"),
    ({"response_format": "json"}, "response_format"),
    (format_of("json_schema"), "response_format.json_schema"),
    (format_of("json_object", json_schema=named()), "response_format.json_schema"),
    (format_of("json_schema", json_schema=named(None)), "response_format.json_schema.schema"),
    (format_of("json_schema", json_schema={"name": "a"}), "response_format.json_schema.schema"),
    (format_of("json_schema", json_schema={"schema": SCHEMA}), "response_format.json_schema.name"),
    (format_of("json_schema", json_schema=named(name="a b")), "response_format.json_schema.name"),
    (format_of("json_schema", json_schema=named(colour=1)), "response_format.json_schema.colour"),
    ({"guided_json": [SCHEMA]}, "guided_json"),
    ({"guided_json": "{"}, "guided_json"),
    ({"guided_json": "[]"}, "guided_json"),
    ({"guided_json": '{"const": "\\ud800"}'}, "guided_json"),
    ({"guided_json": {"enum": ["x" * 140_000]}}, "guided_json"),
    ({"guided_regex": ""}, "guided_regex"),
    ({"guided_regex": 5}, "guided_regex"),
    ({"guided_regex": "a" * 17_000}, "guided_regex"),
    ({"guided_choice": "a"}, "guided_choice"),
    ({"guided_choice": []}, "guided_choice"),
    ({"guided_choice": ["a", ""]}, "guided_choice"),
    ({"guided_choice": ["a", 5]}, "guided_choice"),
    ({"guided_grammar": {}}, "guided_grammar"),
    ({"guided_whitespace_pattern": " *"}, "guided_whitespace_pattern"),
    ({"structured_outputs": {}}, "structured_outputs"),
    ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs.choice"),
    ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag"),
    ({"structured_outputs": {"whitespace_pattern": "x"}}, "structured_outputs.whitespace_pattern"),
    ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice"),
    ({**format_of("json_object"), "guided_json": SCHEMA}, "guided_json"),
    ({"guided_regex": "a", "structured_outputs": {"json": SCHEMA}}, "structured_outputs.json"),
]


@pytest.mark.parametrize("model", [ChatRequest, CompletionRequest])
@pytest.mark.parametrize(("fields", "param"), WRONG)
def test_what_is_malformed_or_said_twice_is_refused_by_name(model: Any, fields: Any, param: str) -> None:
    error = refusal(model, {**BODIES[model], **fields})
    assert (error.status, error.param) == (400, param)
    assert f"'{param}'" in error.message
    assert len(error.message) < 300


def test_a_schema_too_deep_for_json_is_refused() -> None:
    schema: dict[str, Any] = {}
    for _ in range(100_000):
        schema = {"not": schema}
    assert refusal(ChatRequest, {**BODIES[ChatRequest], "guided_json": schema}).param == "guided_json"
    while schema:  # taken apart piece by piece: all at once would be as deep
        schema = schema.pop("not")
