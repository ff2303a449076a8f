"""The form of an answer: how it was asked for. Kept in its stream, so that any pod writes the same bytes."""

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from llmboost.jobs import GenerationJob
from llmboost_api.protocol import tier
from llmboost_api.protocol.chat import ChatShape
from llmboost_api.protocol.completions import CompletionShape
from llmboost_api.protocol.sampling import GenerationRequest
from llmboost_api.protocol.shape import Shape


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A place at which completions are made, and fetched by their ids."""

    name: str
    path: str
    prefix: str
    """Of its ids."""
    shape: type[ChatShape] | type[CompletionShape]


CHAT = Endpoint("chat", "/v1/chat/completions", "chatcmpl", ChatShape)
COMPLETIONS = Endpoint("completions", "/v1/completions", "cmpl", CompletionShape)
ENDPOINTS = (CHAT, COMPLETIONS)
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
            service_tier=tier.used(asked.service_tier),
        )

    @property
    def endpoint(self) -> Endpoint:
        return _BY_NAME[self.endpoint_name]

    def shape(self, completion_id: str) -> Shape:
        """What writes it."""
        return self.endpoint.shape(
            completion_id,
            self.created,
            self.model,
            logprobs=self.logprobs,
            usage_null=self.usage_null,
            service_tier=self.service_tier,
        )

    def encode(self) -> bytes:
        """The form as it is kept."""
        return msgspec.msgpack.encode(self)


decode_form = msgspec.msgpack.Decoder(Form).decode
