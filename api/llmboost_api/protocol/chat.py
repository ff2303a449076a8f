"""POST /v1/chat/completions: what may be asked, and how the answer is written down."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator

from llmboost.entries import TokenLogprob, Usage
from llmboost.jobs import Prompt, SamplingParams
from llmboost_api.protocol.metadata import check_metadata
from llmboost_api.protocol.request import Neutral, RequestModel, never, only, problem
from llmboost_api.protocol.sampling import Count, GenerationRequest
from llmboost_api.protocol.shape import Choice, encode_json, finite, usage_object
from llmboost_api.protocol.structured import FormattedRequest
from llmboost_api.protocol.translate import shown


def _text(value: Any) -> str:
    """A string, or text parts, joined by line breaks."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise problem("invalid_type", f"must be a string or a list of text parts, not {shown(value)}.")
    texts = []
    for number, part in enumerate(value):
        if not isinstance(part, dict):
            raise problem("invalid_type", f"has {shown(part)} as part {number}; parts are objects.")
        if part.get("type") != "text":
            raise problem(
                "unsupported_value",
                f"has part {number} of type {shown(part.get('type'))}; this server takes text parts only: "
                '{"type": "text", "text": …}.',
            )
        if extra := part.keys() - {"type", "text"}:
            raise problem("unknown_parameter", f"has {min(extra)!r} in part {number}: remove it.")
        if not isinstance(part.get("text"), str):
            raise problem("invalid_type", f"has {shown(part.get('text'))} as the text of part {number}.")
        texts.append(part["text"])
    return "\n".join(texts)


Text = Annotated[
    str,
    BeforeValidator(_text),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
                        "required": ["type", "text"],
                    },
                },
            ]
        }
    ),
]


class FunctionCall(RequestModel):
    """A call that the assistant made earlier in the conversation."""

    name: str
    arguments: str = Field(description="JSON, as the model wrote it.")


class ToolCall(RequestModel):
    """One of the calls in an assistant's message."""

    id: str
    type: Literal["function"]
    function: FunctionCall


class Message(RequestModel):
    """One message of the conversation. Which roles may follow which is the template's affair."""

    unsupported: ClassVar[Mapping[str, Neutral]] = {
        # A client that sends back the message it received sends these.
        "refusal": never,
        "audio": never,
        "function_call": never,
        "annotations": only([]),
    }

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _check_role(self) -> "Message":
        if self.content is None and not self.tool_calls:
            raise problem("missing_required_parameter", "is missing: give the message's text.", "content")
        if self.tool_calls and self.role != "assistant":
            raise problem("invalid_value", "belongs into a message of the assistant.", "tool_calls")
        if self.tool_call_id is not None and self.role != "tool":
            raise problem("invalid_value", "belongs into a message of role 'tool'.", "tool_call_id")
        return self

    def for_template(self) -> dict[str, Any]:
        """The message as a chat template takes it: `developer` is OpenAI's newer word for `system`."""
        message = self.model_dump(exclude_none=True)
        message["content"] = self.content or ""
        if self.role == "developer":
            message["role"] = "system"
        return message


class ChatRequest(FormattedRequest, GenerationRequest):
    """OpenAI's chat completion request, with the sampling parameters that other servers add."""

    unsupported: ClassVar[Mapping[str, Neutral]] = {
        **GenerationRequest.unsupported,
        "audio": never,
        "function_call": only("none", "auto"),
        "functions": only([]),
        "modalities": only(["text"]),
        "parallel_tool_calls": never,
        "prediction": never,
        "reasoning_effort": never,
        "tool_choice": only("none", "auto"),
        "tools": only([]),
        "verbosity": never,
        "web_search_options": never,
    }

    messages: list[Message] = Field(min_length=1)
    max_tokens: Count | None = Field(None, description="Older name of max_completion_tokens.")
    max_completion_tokens: Count | None = Field(
        None, description="Default: all that the context has room for."
    )
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    store: bool = Field(False, description="Keep the answer, to be retrieved and listed later.")
    metadata: dict[str, Any] | None = Field(None, description="Kept with a stored answer; else ignored.")

    @model_validator(mode="after")
    def _check_together(self) -> "ChatRequest":
        one, other = self.max_tokens, self.max_completion_tokens
        if one is not None and other is not None and one != other:
            raise problem(
                "invalid_value",
                f"is {one} but 'max_completion_tokens' is {other}: send one of them.",
                "max_tokens",
            )
        if self.top_logprobs is not None and not self.logprobs:
            raise problem(
                "invalid_value", "needs 'logprobs' to be true: set it, or remove this.", "top_logprobs"
            )
        if self.store and self.metadata:
            check_metadata(self.metadata, "metadata")
        self._check_min_tokens(
            self.most_tokens, "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"
        )
        return self

    @property
    def most_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def messages_to_store(self) -> list[dict[str, Any]] | None:
        return [message.model_dump(exclude_none=True) for message in self.messages] if self.store else None

    @property
    def attached(self) -> dict[str, str]:
        return self.metadata or {}

    def prompts(self) -> list[Prompt]:
        return [Prompt(messages=[message.for_template() for message in self.messages])]

    def sampling_params(self, completion_id: str) -> SamplingParams:
        top_logprobs = (self.top_logprobs or 0) if self.logprobs else None
        return self._sampling(completion_id, self.most_tokens, top_logprobs)


class ChatShape:
    """Chat chunks and completions. All of a chunk but its text is encoded once per stream."""

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
        self._common = {"id": completion_id, "created": created, "model": model}
        self._tier = {} if service_tier is None else {"service_tier": service_tier}
        head = encode_json(self._object("chat.completion.chunk"))[:-1] + b',"choices":['
        self._start = head + b'{"index":'
        self._starts: dict[int, bytes] = {}
        self._end = b'],"usage":null}' if usage_null else b"]}"
        self._content_end = b'},"finish_reason":null}' + self._end
        self._usage = head + b'],"usage":'

    def _object(self, kind: str) -> dict[str, Any]:
        common = self._common
        return {
            "id": common["id"],
            "object": kind,
            "created": common["created"],
            "model": common["model"],
            "system_fingerprint": None,
            **self._tier,
        }

    def content(self, index: int, text: str, logprobs: Sequence[TokenLogprob], first: bool) -> bytes:
        if first:
            start = b'%b%d,"delta":{"role":"assistant","content":' % (self._start, index)
            self._starts[index] = b'%b%d,"delta":{"content":' % (self._start, index)
        else:
            start = self._starts[index]
        if self._logprobs:
            end = b'},"logprobs":%b,"finish_reason":null}%b' % (_logprobs_json(logprobs), self._end)
        else:
            end = self._content_end
        return b"".join((start, encode_json(text), end))

    def finish(self, index: int, reason: str, logprobs: Sequence[TokenLogprob]) -> bytes:
        middle = b',"logprobs":' + _logprobs_json(logprobs) if self._logprobs else b""
        reason_json = encode_json(reason)
        # Empty, but not absent: clients print `delta.content` as it is, and would print None at the end.
        return b'%b%d,"delta":{"content":""}%b,"finish_reason":%b}%b' % (
            self._start,
            index,
            middle,
            reason_json,
            self._end,
        )

    def usage(self, usage: Usage) -> bytes:
        return self._usage + encode_json(usage_object(usage)) + b"}"

    def whole(self, choices: Sequence[Choice], usage: Usage) -> bytes:
        completion = self._object("chat.completion")
        completion["choices"] = [
            {
                "index": index,
                "message": {"role": "assistant", "content": choice.text, "refusal": None},
                "logprobs": _logprobs_object(choice.logprobs) if self._logprobs else None,
                "finish_reason": choice.finish_reason,
            }
            for index, choice in enumerate(choices)
        ]
        completion["usage"] = usage_object(usage)
        return encode_json(completion)


def _logprobs_json(logprobs: Sequence[TokenLogprob]) -> bytes:
    return encode_json(_logprobs_object(logprobs)) if logprobs else b"null"


def _logprobs_object(logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
    content = [
        {**_token(token), "top_logprobs": [_token(alternative) for alternative in token.top]}
        for token in logprobs
    ]
    return {"content": content, "refusal": None}


def _token(token: TokenLogprob) -> dict[str, Any]:
    return {"token": token.token, "logprob": finite(token.logprob), "bytes": token.bytes}
