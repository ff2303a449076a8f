"""The fields of a request that say what the whole answer is to be: OpenAI's, and those that vLLM adds."""

import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator

from llmboost.jobs import Grammar, GrammarKind
from llmboost_api.protocol.request import Neutral, RequestModel, always, never, only, problem
from llmboost_api.protocol.translate import shown

LONGEST = 128 * 1024
"""Characters of a schema, or of all choices. OpenAI's schemas may have 120,000."""
LONGEST_PATTERN = 16 * 1024
"""Characters of a pattern or a grammar, to compile which takes more time."""


def _schema(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise problem("invalid_type", f"must be an object, a JSON schema, not {shown(value)}.")
    try:
        size = len(json.dumps(value, ensure_ascii=False))
    except RecursionError:
        raise problem("invalid_value", "is nested too deeply.") from None
    _check_size(size)
    return value


def _schema_or_text(value: Any) -> dict[str, Any]:
    if isinstance(value, str):
        try:
            value = msgspec.json.decode(value)
        except (msgspec.DecodeError, RecursionError) as error:
            raise problem("invalid_value", f"is a string, but not one of JSON: {error}.") from None
    return _schema(value)


def _choices(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(choice, str) for choice in value):
        raise problem("invalid_type", f"must be a list of strings, not {shown(value)}.")
    if not value or "" in value:
        raise problem("invalid_value", "must hold at least one string, and no empty one.")
    _check_size(sum(map(len, value)))
    return tuple(value)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise problem("invalid_type", f"must be a string, not {shown(value)}.")
    if not value:
        raise problem("invalid_value", "is an empty string: give it a value or leave it out.")
    _check_size(len(value), LONGEST_PATTERN)
    return value


def _check_size(size: int, limit: int = LONGEST) -> None:
    if size > limit:
        raise problem("invalid_value", f"has {size} characters; at most {limit} are allowed.")


Schema = Annotated[dict[str, Any], BeforeValidator(_schema)]
SchemaOrText = Annotated[
    dict[str, Any],
    BeforeValidator(_schema_or_text),
    WithJsonSchema({"anyOf": [{"type": "object"}, {"type": "string"}]}),
]
Choices = Annotated[
    tuple[str, ...],
    BeforeValidator(_choices),
    WithJsonSchema({"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1}),
]
Text = Annotated[str, BeforeValidator(_text)]
Name = Annotated[str, Field(pattern="^[a-zA-Z0-9_-]{1,64}$")]
FormatType = Literal["text", "json_object", "json_schema"]


class JSONSchema(RequestModel):
    """A schema and its name. It holds whether or not it is `strict`."""

    name: Name
    schema_: Schema = Field(alias="schema")
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(RequestModel):
    """OpenAI's field of completions."""

    type: FormatType
    json_schema: JSONSchema | None = None

    @model_validator(mode="after")
    def _check_schema(self) -> "ResponseFormat":
        if (self.json_schema is not None) != (self.type == "json_schema"):
            raise _schema_problem(self.type, "json_schema", self.json_schema is not None)
        return self

    def grammar(self) -> Grammar | None:
        """What it asks of the answer."""
        if self.json_schema is not None:
            return _of_schema(self.json_schema.schema_, "response_format.json_schema.schema")
        return Grammar("json", param="response_format") if self.type == "json_object" else None


class TextFormat(RequestModel):
    """The same of responses, where it is flat."""

    type: FormatType
    name: Name | None = None
    schema_: Schema | None = Field(default=None, alias="schema")
    description: str | None = None
    strict: bool | None = None

    @model_validator(mode="after")
    def _check_schema(self) -> "TextFormat":
        for field, given in (("schema", self.schema_ is not None), ("name", self.name is not None)):
            if given != (self.type == "json_schema"):
                raise _schema_problem(self.type, field, given)
        return self

    def grammar(self) -> Grammar | None:
        """What it asks of the answer."""
        if self.schema_ is not None:
            return _of_schema(self.schema_, "text.format.schema")
        return Grammar("json", param="text.format") if self.type == "json_object" else None

    def repeated(self) -> dict[str, Any]:
        """As the response has it."""
        if self.schema_ is None:
            return {"type": self.type}
        return {
            "type": self.type,
            "name": self.name,
            "schema": self.schema_,
            "description": self.description,
            "strict": bool(self.strict),
        }


def _schema_problem(kind: str, field: str, given: bool) -> Exception:
    if given:
        return problem("invalid_value", f"is only for the type 'json_schema', not '{kind}'.", field)
    return problem("missing_required_parameter", "is missing: the type 'json_schema' needs it.", field)


class StructuredOutputs(RequestModel):
    """vLLM's newer field: one of these."""

    unsupported: ClassVar[Mapping[str, Neutral]] = {
        "disable_additional_properties": only(False),
        "disable_any_whitespace": only(False),
        "disable_fallback": always,
        "structural_tag": never,
        "whitespace_pattern": never,
    }

    json_: SchemaOrText | None = Field(None, alias="json")
    regex: Text | None = None
    choice: Choices | None = None
    grammar: Text | None = None
    json_object: bool = False


class StructuredRequest(RequestModel):
    """The fields that all endpoints have in common."""

    unsupported: ClassVar[Mapping[str, Neutral]] = {
        "guided_decoding_backend": always,
        "guided_whitespace_pattern": never,
    }

    guided_json: SchemaOrText | None = Field(None, description="A JSON schema that the answer conforms to.")
    guided_regex: Text | None = Field(None, description="A pattern that the whole answer matches.")
    guided_choice: Choices | None = Field(None, description="The answer is one of these.")
    guided_grammar: Text | None = Field(None, description="A grammar of the answer, in GBNF or Lark.")
    structured_outputs: StructuredOutputs | None = Field(None, description="The same in vLLM's newer form.")

    @model_validator(mode="after")
    def _one_form_at_most(self) -> "StructuredRequest":
        grammars = self._grammars()
        if len(grammars) > 1:
            one, other = grammars[0].param, grammars[1].param
            raise problem("invalid_value", f"can't be together with '{one}': send one of them.", other)
        if self.structured_outputs is not None and not any(
            grammar.param.startswith("structured_outputs.") for grammar in grammars
        ):
            raise problem("invalid_value", "needs one of json, regex, choice, grammar.", "structured_outputs")
        return self

    def _grammars(self) -> list[Grammar]:
        """All that are asked for."""
        return [
            *_of_fields(
                "guided_", self.guided_json, self.guided_regex, self.guided_choice, self.guided_grammar
            ),
            *_of_structured_outputs(self.structured_outputs),
        ]

    def grammar(self) -> Grammar | None:
        """What the whole answer is to be."""
        return next(iter(self._grammars()), None)


class FormattedRequest(StructuredRequest):
    """With OpenAI's own field, as completions have it."""

    response_format: ResponseFormat | None = Field(
        None, description="What the answer is to be: text or JSON."
    )

    def _grammars(self) -> list[Grammar]:
        own = self.response_format and self.response_format.grammar()
        return [*([own] if own else []), *super()._grammars()]


def _of_structured_outputs(asked: StructuredOutputs | None) -> list[Grammar]:
    if asked is None:
        return []
    prefix = "structured_outputs."
    grammars = _of_fields(prefix, asked.json_, asked.regex, asked.choice, asked.grammar)
    return [*grammars, Grammar("json", param=f"{prefix}json_object")] if asked.json_object else grammars


def _of_fields(
    prefix: str,
    schema: dict[str, Any] | None,
    regex: str | None,
    choices: tuple[str, ...] | None,
    grammar: str | None,
) -> list[Grammar]:
    found = []
    if schema is not None:
        found.append(_of_schema(schema, f"{prefix}json"))
    texts: list[tuple[GrammarKind, str | None]] = [
        ("regex", regex),
        ("choice", None if choices is None else json.dumps(choices, ensure_ascii=False)),
        ("grammar", grammar),
    ]
    return found + [Grammar(kind, text, prefix + kind) for kind, text in texts if text is not None]


def _of_schema(schema: dict[str, Any], param: str) -> Grammar:
    return Grammar("json_schema", json.dumps(schema, ensure_ascii=False), param)
