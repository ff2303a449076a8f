"""POST /v1/responses: what may be asked."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from llmboost.jobs import Grammar, Prompt, SamplingParams
from llmboost_api.errors import ApiError
from llmboost_api.protocol import tier
from llmboost_api.protocol.metadata import Metadata
from llmboost_api.protocol.request import Neutral, RequestModel, never, only, problem
from llmboost_api.protocol.responses.items import Input, Message, for_template
from llmboost_api.protocol.sampling import Count, GenerationRequest
from llmboost_api.protocol.shape import encode_json
from llmboost_api.protocol.structured import TextFormat

LOGPROBS = "message.output_text.logprobs"

Includable = Literal[
    "message.output_text.logprobs",
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "file_search_call.results",
    "message.input_image.image_url",
    "reasoning.encrypted_content",
    "web_search_call.action.sources",
    "web_search_call.results",
]
"""What else a response may hold. All but the first belongs to items that no response of this server has."""


_ELSEWHERE = {
    "max_completion_tokens": "max_output_tokens",
    "max_tokens": "max_output_tokens",
    "messages": "input",
    "response_format": "text",
}
"""What fields of chat completions are called here."""


def _truncation(value: Any) -> Any:
    if value == "auto":
        raise problem(
            "unsupported_value",
            'is "auto", but this server drops nothing of a conversation that has grown too long. '
            'Send "disabled", or leave it out, and send less.',
        )
    return value


class TextConfig(RequestModel):
    """How the text is to be."""

    unsupported: ClassVar[Mapping[str, Neutral]] = {"verbosity": only("medium")}

    format: TextFormat = TextFormat(type="text")


def _no_reasoning(value: Any) -> bool:
    return isinstance(value, dict) and all(each in (None, "none") for each in value.values())


class ResponseRequest(GenerationRequest):
    """OpenAI's request for a response, with the sampling parameters that other servers add."""

    unsupported: ClassVar[Mapping[str, Neutral]] = {
        **{
            name: neutral
            for name, neutral in GenerationRequest.unsupported.items()
            if name not in ("metadata", "prompt_cache_key", "safety_identifier", "store", "user")
        },
        "access_programs": never,
        "background_options": never,
        "context_management": only([]),
        "conversation": never,
        "image": never,
        "max_tool_calls": never,
        "moderation": never,
        "prompt": never,
        "prompt_cache_options": never,
        "reasoning": _no_reasoning,
        "tools": only([]),
    }

    input: Input = Field(description="What the user says, or a list of messages.")
    instructions: str | None = Field(
        None, description="Comes first, as a system message; not carried over to the next response."
    )
    previous_response_id: str | None = Field(
        None, min_length=1, description="The response that this one follows in its conversation."
    )
    max_output_tokens: Count | None = Field(None, description="Default: all that the context has room for.")
    n: int = Field(1, ge=1, le=1)
    include: list[Includable] = Field([], description="What else the response is to hold.")
    top_logprobs: int = Field(0, ge=0, le=20, description=f"Needs {LOGPROBS} in `include`.")
    text: TextConfig | None = Field(None, description="How the text is to be: plain, or JSON.")
    truncation: Annotated[Literal["disabled"], BeforeValidator(_truncation)] = "disabled"
    store: bool = Field(True, description="Keep the response, to be retrieved and followed later.")
    background: bool = Field(False, description="Return at once; generate whether or not anybody reads.")
    metadata: Metadata = Field({}, description="Kept with the response.")
    tool_choice: Literal["none", "auto"] = "auto"
    parallel_tool_calls: bool = True
    # Repeated, and not looked at:
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @model_validator(mode="after")
    def _check_together(self) -> "ResponseRequest":
        if self.top_logprobs and LOGPROBS not in self.include:
            raise problem(
                "invalid_value", f"needs '{LOGPROBS}' in 'include': add it, or remove this.", "top_logprobs"
            )
        if self.background and not self.store:
            raise problem(
                "invalid_value",
                "is true, but 'store' is false: what runs in the background is fetched later, so it must be "
                "stored. Change one of them.",
                "background",
            )
        self._check_min_tokens(self.max_output_tokens, "max_output_tokens")
        return self

    @classmethod
    def closest(cls, name: str) -> str | None:
        return _ELSEWHERE.get(name) or super().closest(name)

    @property
    def messages_to_store(self) -> list[dict[str, Any]] | None:
        return [message.kept() for message in self.input] if self.store else None

    @property
    def attached(self) -> dict[str, str]:
        return self.metadata

    @property
    def repeated(self) -> bytes:
        return encode_json(
            {
                "background": self.background,
                "instructions": self.instructions,
                "max_output_tokens": self.max_output_tokens,
                "max_tool_calls": None,
                "metadata": self.metadata,
                "parallel_tool_calls": self.parallel_tool_calls,
                "previous_response_id": self.previous_response_id,
                "prompt_cache_key": self.prompt_cache_key,
                "reasoning": {"effort": None, "summary": None},
                "safety_identifier": self.safety_identifier,
                "service_tier": tier.used(self.service_tier) or "default",
                "store": self.store,
                "temperature": self.temperature,
                "text": {"format": self._format.repeated(), "verbosity": "medium"},
                "tool_choice": self.tool_choice,
                "tools": [],
                "top_logprobs": self.top_logprobs,
                "top_p": self.top_p,
                "truncation": self.truncation,
                "user": self.user,
            }
        )

    @property
    def _format(self) -> TextFormat:
        return (self.text or TextConfig()).format

    def _grammars(self) -> list[Grammar]:
        own = self._format.grammar()
        return [*([own] if own else []), *super()._grammars()]

    def prompts(self) -> list[Prompt]:
        """Raises:
        ApiError: it follows another response, whose conversation only `prompts_after` is given (400).
        """
        if self.previous_response_id is not None:
            raise ApiError(
                400,
                "'previous_response_id' can't be followed here. Send the whole conversation as 'input'.",
                code="unsupported_parameter",
                param="previous_response_id",
            )
        return self.prompts_after(())

    def prompts_after(self, history: Sequence[Message]) -> list[Prompt]:
        """What the worker is to continue, after the turns before it.

        Only what follows is new, unless the instructions are: so the prompt begins with that of the turn
        before, token by token, and a prefix cache has it.
        """
        first = [{"role": "system", "content": self.instructions}] if self.instructions else []
        said = [for_template(message) for message in [*history, *(each.kept() for each in self.input)]]
        return [Prompt(messages=[*first, *said])]

    def sampling_params(self, completion_id: str) -> SamplingParams:
        top_logprobs = self.top_logprobs if LOGPROBS in self.include else None
        return self._sampling(completion_id, self.max_output_tokens, top_logprobs)
