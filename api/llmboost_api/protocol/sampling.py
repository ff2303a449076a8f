"""The fields of a request that say how tokens are drawn; the same for every endpoint."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator

from llmboost.jobs import Prompt, SamplingParams, derived_seed
from llmboost_api.protocol.request import Neutral, RequestModel, always, only, problem
from llmboost_api.protocol.structured import StructuredRequest
from llmboost_api.protocol.tier import ServiceTier
from llmboost_api.protocol.translate import shown

INT32 = 2**31 - 1
"""No count and no token id is larger; what goes into a job must fit msgpack's integers."""
MAX_STOPS = 16
MAX_CHOICES = 128
"""Of one request, all prompts together."""

Count = Annotated[int, Field(ge=1, le=INT32)]
TokenId = Annotated[int, Field(ge=0, le=INT32)]
Penalty = Annotated[float, Field(ge=-2, le=2)]


def _stops(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise problem("invalid_type", f"must be a string or a list of strings, not {shown(value)}.")
    if len(stops) > MAX_STOPS:
        raise problem("invalid_value", f"has {len(stops)} strings; at most {MAX_STOPS} are allowed.")
    if "" in stops:
        raise problem("invalid_value", "holds an empty string, which would stop at once: remove it.")
    return tuple(stops)


def _bias(value: Any) -> dict[int, float]:
    if not isinstance(value, dict):
        raise problem("invalid_type", f"must be an object of token ids and biases, not {shown(value)}.")
    bias = {}
    for key, number in value.items():
        if not (key.isascii() and key.isdecimal() and len(key) <= 10 and int(key) <= INT32):
            raise problem("invalid_value", f'has the key {shown(key)}; keys are token ids, such as "42".')
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise problem("invalid_type", f"gives {shown(number)} for token {key}; biases are numbers.")
        if not -100 <= number <= 100:
            raise problem(
                "invalid_value", f"gives {shown(number)} for token {key}; biases go from -100 to 100."
            )
        bias[int(key)] = float(number)
    return bias


Stops = Annotated[
    tuple[str, ...],
    BeforeValidator(_stops),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "minLength": 1},
                {"type": "array", "items": {"type": "string", "minLength": 1}, "maxItems": MAX_STOPS},
            ]
        }
    ),
]
LogitBias = Annotated[
    dict[int, float],
    BeforeValidator(_bias),
    WithJsonSchema(
        {"type": "object", "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100}}
    ),
]


class StreamOptions(RequestModel):
    """What a stream carries besides its text."""

    unsupported: ClassVar[Mapping[str, Neutral]] = {"include_obfuscation": only(False)}

    include_usage: bool = Field(False, description="One more chunk with the usage, before `[DONE]`.")


class GenerationRequest(StructuredRequest, ABC):
    """The fields that all endpoints have in common; defaults are OpenAI's."""

    unsupported: ClassVar[Mapping[str, Neutral]] = {
        **StructuredRequest.unsupported,
        "user": always,
        "metadata": always,
        "safety_identifier": always,
        "prompt_cache_key": always,
        "prompt_cache_retention": always,
        "store": only(False),
    }

    model: str = Field(min_length=1, description="One of the names that GET /v1/models lists.")
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int = Field(1, ge=1, le=MAX_CHOICES, description="Choices per prompt.")
    seed: int | None = Field(
        None, ge=-(2**63), le=2**63 - 1, description="The same seed draws the same tokens."
    )
    temperature: float = Field(1.0, ge=0, le=2, description="0 takes the likeliest token.")
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1, le=INT32, description="0 or -1: off.")
    min_p: float = Field(0.0, ge=0, le=1)
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    repetition_penalty: float = Field(1.0, ge=0.01, le=100, description="Over prompt and output; 1 is off.")
    logit_bias: LogitBias = Field({}, description="Token id to bias, -100 to 100.")
    stop: Stops = Field((), description="Up to 16 strings at which generation ends.")
    stop_token_ids: list[TokenId] = Field([], max_length=128)
    include_stop_str_in_output: bool = False
    min_tokens: int = Field(0, ge=0, le=INT32)
    ignore_eos: bool = False
    service_tier: ServiceTier | None = Field(
        None, description="flex: only slots that nobody else wants; auto and default: at once."
    )

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> "GenerationRequest":
        if self.stream_options is not None and not self.stream:
            raise problem(
                "invalid_value", "is only for streams: remove it, or set 'stream' to true.", "stream_options"
            )
        return self

    @property
    def include_usage(self) -> bool:
        """Whether the client asked for usage in its stream."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def echoes(self) -> bool:
        """Whether each choice begins with the prompt."""
        return False

    @property
    def messages_to_store(self) -> list[dict[str, Any]] | None:
        """What is to be kept of the request with its answer; None if that is not to be stored."""
        return None

    @property
    def attached(self) -> dict[str, str]:
        """The metadata to be kept with it."""
        return {}

    @property
    def repeated(self) -> bytes:
        """What the answer repeats of the request, as JSON."""
        return b""

    @abstractmethod
    def prompts(self) -> list[Prompt]:
        """What the worker is to continue: one job each."""

    @abstractmethod
    def sampling_params(self, completion_id: str) -> SamplingParams:
        """How the tokens of a completion are drawn."""

    def _sampling(
        self,
        completion_id: str,
        max_tokens: int | None,
        top_logprobs: int | None,
        prompt_logprobs: int | None = None,
    ) -> SamplingParams:
        """The parameters as a job carries them. The seed is fixed here, for all attempts to draw from."""
        return SamplingParams(
            n=self.n,
            seed=derived_seed(completion_id) if self.seed is None else self.seed,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=max(self.top_k, 0),
            min_p=self.min_p,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            logit_bias=self.logit_bias,
            max_tokens=max_tokens,
            min_tokens=self.min_tokens,
            stop=self.stop,
            stop_token_ids=tuple(self.stop_token_ids),
            include_stop_str_in_output=self.include_stop_str_in_output,
            ignore_eos=self.ignore_eos,
            top_logprobs=top_logprobs,
            prompt_logprobs=prompt_logprobs,
            grammar=self.grammar(),
        )

    def _check_min_tokens(self, max_tokens: int | None, field: str) -> None:
        """`field`: what the client calls the most tokens."""
        if max_tokens is not None and self.min_tokens > max_tokens:
            raise problem(
                "invalid_value",
                f"is {self.min_tokens}, more than the {max_tokens} tokens allowed at most: "
                f"lower it, or raise '{field}'.",
                "min_tokens",
            )
