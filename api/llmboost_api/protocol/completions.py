"""POST /v1/completions, the older endpoint: plain prompts, text in the choices, flat logprobs."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator

from llmboost.entries import TokenLogprob, Usage
from llmboost.jobs import Prompt, SamplingParams
from llmboost_api.protocol.request import Neutral, always, only, problem
from llmboost_api.protocol.sampling import INT32, MAX_CHOICES, GenerationRequest
from llmboost_api.protocol.shape import Choice, encode_json, finite, usage_object
from llmboost_api.protocol.structured import FormattedRequest
from llmboost_api.protocol.translate import shown

DEFAULT_MAX_TOKENS = 16
"""OpenAI's default on this endpoint."""

_FORMS = "a string, a list of strings, a list of token ids, or a list of lists of token ids"


def _prompts(value: Any) -> tuple[str | list[int], ...]:
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list):
        raise problem("invalid_type", f"must be {_FORMS}, not {shown(value)}.")
    if not value:
        raise problem("invalid_value", f"is an empty list: give {_FORMS}.")
    if type(value[0]) is int:
        return (_token_ids(value, "holds"),)
    return tuple(
        prompt if isinstance(prompt, str) else _token_ids(prompt, f"holds in prompt {number}")
        for number, prompt in enumerate(value)
    )


def _token_ids(value: Any, where: str) -> list[int]:
    if not isinstance(value, list):
        raise problem("invalid_type", f"{where} {shown(value)}: it must be {_FORMS}.")
    if not value:
        raise problem("invalid_value", f"{where} no token ids: give at least one.")
    for token_id in value:
        if type(token_id) is not int or not 0 <= token_id <= INT32:
            raise problem("invalid_value", f"{where} {shown(token_id)}, which is not a token id.")
    return value


Prompts = Annotated[
    tuple[str | list[int], ...],
    BeforeValidator(_prompts),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "string"}, "minItems": 1},
                {"type": "array", "items": {"type": "integer"}, "minItems": 1},
                {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}, "minItems": 1},
            ]
        }
    ),
]


class CompletionRequest(FormattedRequest, GenerationRequest):
    """OpenAI's legacy completion request, with the sampling parameters that other servers add."""

    unsupported: ClassVar[Mapping[str, Neutral]] = {
        **GenerationRequest.unsupported,
        "best_of": always,  # unless it differs from `n`: see `_check_best_of`
        "suffix": only(""),
    }

    prompt: Prompts
    echo: bool = Field(False, description="Begin each choice with the prompt.")
    max_tokens: int = Field(
        DEFAULT_MAX_TOKENS, ge=0, le=INT32, description="0 only with `echo`: the prompt alone."
    )
    logprobs: int | None = Field(
        None,
        ge=0,
        le=20,
        description="That many likeliest tokens, and the drawn one. With `echo`, of the prompt too.",
    )

    @model_validator(mode="before")
    @classmethod
    def _check_best_of(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("best_of") is not None:
            best_of, n = data["best_of"], data.get("n") or 1
            if type(best_of) is not int or best_of != n:
                raise problem(
                    "unsupported_parameter",
                    f"is {shown(best_of)} where 'n' is {shown(n)}: this server returns all that it "
                    "generates. Remove it.",
                    "best_of",
                )
        return data

    @model_validator(mode="after")
    def _check_together(self) -> "CompletionRequest":
        if self.max_tokens == 0 and not self.echo:
            raise problem(
                "invalid_value", "is 0, but it must be at least 1 unless 'echo' is true.", "max_tokens"
            )
        if len(self.prompt) * self.n > MAX_CHOICES:
            raise problem(
                "invalid_value",
                f"asks for {len(self.prompt)} prompts with {self.n} choices each; a request may have "
                f"{MAX_CHOICES} choices in all. Split it.",
                "prompt",
            )
        self._check_min_tokens(self.max_tokens, "max_tokens")
        return self

    def prompts(self) -> list[Prompt]:
        return [
            Prompt(text=prompt) if isinstance(prompt, str) else Prompt(token_ids=prompt)
            for prompt in self.prompt
        ]

    @property
    def echoes(self) -> bool:
        return self.echo

    def sampling_params(self, completion_id: str) -> SamplingParams:
        of_prompt = self.logprobs if self.echo else None
        return self._sampling(completion_id, self.max_tokens, self.logprobs, of_prompt)


class CompletionShape:
    """Legacy chunks and completions; the two are one kind of object."""

    def __init__(
        self,
        completion_id: str,
        created: int,
        model: str,
        *,
        logprobs: bool,
        usage_null: bool,
        service_tier: str | None = None,
    ) -> None:
        """`usage_null`: every chunk but the last says that it carries no usage. `service_tier`: what the
        answer names, if any."""
        self._logprobs = logprobs
        self._object = {
            "id": completion_id,
            "object": "text_completion",
            "created": created,
            "model": model,
            "system_fingerprint": None,
            **({} if service_tier is None else {"service_tier": service_tier}),
        }
        self._offsets: defaultdict[int, int] = defaultdict(int)
        self._head = encode_json(self._object)[:-1] + b',"choices":['
        self._end = b'],"usage":null}' if usage_null else b"]}"

    def content(self, index: int, text: str, logprobs: Sequence[TokenLogprob], first: bool) -> bytes:
        return self._chunk(index, encode_json(text), logprobs, b"null")

    def finish(self, index: int, reason: str, logprobs: Sequence[TokenLogprob]) -> bytes:
        return self._chunk(index, b'""', logprobs, encode_json(reason))

    def _chunk(self, index: int, text: bytes, logprobs: Sequence[TokenLogprob], reason: bytes) -> bytes:
        flat = b"null"
        if self._logprobs and logprobs:
            flat = encode_json(_logprobs_object(logprobs, self._offsets[index]))
            self._offsets[index] += sum(map(_width, logprobs))
        return b'%b{"index":%d,"text":%b,"logprobs":%b,"finish_reason":%b}%b' % (
            self._head,
            index,
            text,
            flat,
            reason,
            self._end,
        )

    def usage(self, usage: Usage) -> bytes:
        return self._head + b'],"usage":' + encode_json(usage_object(usage)) + b"}"

    def whole(self, choices: Sequence[Choice], usage: Usage) -> bytes:
        answers = [
            {
                "index": index,
                "text": choice.text,
                "logprobs": _logprobs_object(choice.logprobs, 0) if self._logprobs else None,
                "finish_reason": choice.finish_reason,
            }
            for index, choice in enumerate(choices)
        ]
        return encode_json({**self._object, "choices": answers, "usage": usage_object(usage)})


def _logprobs_object(logprobs: Sequence[TokenLogprob], offset: int) -> dict[str, Any]:
    """`offset`: characters of this choice before the first of the tokens."""
    offsets = []
    for token in logprobs:
        offsets.append(offset)
        offset += _width(token)
    return {
        "tokens": [token.token for token in logprobs],
        "token_logprobs": [finite(token.logprob) for token in logprobs],
        "top_logprobs": [_top(token) for token in logprobs],
        "text_offset": offsets,
    }


def _top(token: TokenLogprob) -> dict[str, float | None] | None:
    """The token itself is always among them, however unlikely it was. None for the first of a prompt."""
    if token.logprob is None:
        return None
    return {each.token: finite(each.logprob) for each in (*token.top, token)}


def _width(token: TokenLogprob) -> int:
    return len(token.token) if token.width is None else token.width
