"""The form of an answer: how it was asked for. Kept in its stream, so that any pod writes the same bytes."""

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from llmboost.entries import Terminal, Usage
from llmboost.jobs import GenerationJob, stem
from llmboost_api.protocol import tier
from llmboost_api.protocol.chat import ChatRequest, ChatShape
from llmboost_api.protocol.completions import CompletionRequest, CompletionShape
from llmboost_api.protocol.responses.object import Progress, ResponseObject
from llmboost_api.protocol.responses.request import ResponseRequest
from llmboost_api.protocol.sampling import GenerationRequest
from llmboost_api.protocol.shape import Choice, Shape, encode_json


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A place at which completions are made, and fetched by their ids."""

    name: str
    path: str
    prefix: str
    """Of its ids."""
    request: type[GenerationRequest]
    shape: type[ChatShape] | type[CompletionShape] | None
    """What writes its chunks; None: it has no chunks, but events."""
    noun: str = "completion"
    """What it makes, in errors."""

    def made(self, completion_id: str) -> bool:
        """Whether the id is one of its own."""
        return completion_id.startswith(self.stem)

    @property
    def stem(self) -> str:
        """With what its ids begin."""
        return stem(self.prefix)


CHAT = Endpoint("chat", "/v1/chat/completions", "chatcmpl", ChatRequest, ChatShape)
COMPLETIONS = Endpoint("completions", "/v1/completions", "cmpl", CompletionRequest, CompletionShape)
RESPONSES = Endpoint("responses", "/v1/responses", "resp_", ResponseRequest, None, "response")
ENDPOINTS = (CHAT, COMPLETIONS, RESPONSES)
_BY_NAME = {endpoint.name: endpoint for endpoint in ENDPOINTS}


class Form(msgspec.Struct, frozen=True, array_like=True):
    """All that it takes, besides the entries of its streams, to write an answer down."""

    endpoint_name: str
    model: str
    """As it was asked for."""
    created: int
    """Unix time, s."""
    deadline: float
    """Unix time, s, by which it has ended."""
    jobs: int
    n: int
    """Choices of each job."""
    logprobs: bool
    usage_null: bool
    """Every chunk but the last says that it carries no usage."""
    usage: bool
    """A stream ends with a usage chunk."""
    repeated: bytes = b""
    """Of a response: what its object repeats of the request, as JSON."""
    service_tier: str | None = None
    """That the answer names."""

    @classmethod
    def of(
        cls,
        asked: GenerationRequest,
        endpoint: Endpoint,
        jobs: Sequence[GenerationJob],
        *,
        always_usage: bool,
    ) -> "Form":
        """How the answer to a request, made into `jobs`, is written down."""
        first = jobs[0]
        return cls(
            endpoint_name=endpoint.name,
            model=asked.model,
            created=int(first.created),
            deadline=first.deadline,
            jobs=len(jobs),
            n=asked.n,
            logprobs=first.sampling.top_logprobs is not None,
            usage_null=asked.include_usage,
            usage=asked.include_usage or always_usage,
            repeated=asked.repeated,
            service_tier=tier.used(asked.service_tier),
        )

    @property
    def endpoint(self) -> Endpoint:
        return _BY_NAME[self.endpoint_name]

    def shape(self, completion_id: str) -> Shape:
        """What writes it, unless it is a response."""
        shape = self.endpoint.shape
        assert shape is not None
        return shape(
            completion_id,
            self.created,
            self.model,
            logprobs=self.logprobs,
            usage_null=self.usage_null,
            service_tier=self.service_tier,
        )

    def response(self, response_id: str) -> ResponseObject:
        """What writes it, if it is one."""
        return ResponseObject(response_id, self.created, self.model, self.repeated)

    def whole(
        self, completion_id: str, choices: Sequence[Choice], usage: Usage, ended_at: float | None
    ) -> bytes:
        """The whole answer, as JSON. `ended_at`: Unix time (s), if it is known."""
        if self.endpoint.shape is None:
            progress = Progress(choices[0], started=True, terminal=Terminal("", usage, at=ended_at))
            return encode_json(self.response(completion_id).at(progress))
        return self.shape(completion_id).whole(choices, usage)

    def encode(self) -> bytes:
        """The form as it is kept."""
        return msgspec.msgpack.encode(self)


decode_form = msgspec.msgpack.Decoder(Form).decode
