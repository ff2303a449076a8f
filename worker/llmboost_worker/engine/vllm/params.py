"""Between our requests and vLLM's: what is asked, what comes back."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from llmboost.jobs import Grammar, SamplingParams
from llmboost_worker.engine.interface import (
    EngineInfo,
    FinishReason,
    SequenceOutput,
    SequenceRequest,
    TokenLogprobs,
)
from llmboost_worker.engine.transformers.sequence import Sequence as DrawnSequence

if TYPE_CHECKING:
    import vllm
    from vllm.logprobs import Logprob
    from vllm.outputs import RequestOutput

EXTRA = "llmboost"
"""Under which name `drawing` finds its part in vLLM's parameters."""


Compile = Callable[[Grammar, EngineInfo], Any]
"""Makes of a grammar what a `SequenceRequest` takes."""


class Drawn(msgspec.Struct, frozen=True, omit_defaults=True, array_like=True):
    """What `drawing` is told of a sequence, beyond the token ids that vLLM has of it."""

    id: str
    sampling: SamplingParams
    choice: int
    num_prompt: int
    """How many of what is a prompt to vLLM are ours; the rest was emitted by an earlier attempt."""
    max_tokens: int
    eos_token_ids: tuple[int, ...]
    max_model_len: int
    vocab_size: int


def encode(sequence: DrawnSequence, info: EngineInfo) -> bytes:
    """A `Drawn`, as it travels in vLLM's parameters."""
    sampling = msgspec.structs.replace(sequence.sampling, top_logprobs=None)  # vLLM's own affair
    return msgspec.msgpack.encode(
        Drawn(
            sequence.id,
            sampling,
            sequence.choice,
            sequence.num_prompt,
            sequence.max_tokens,
            info.eos_token_ids,
            info.max_model_len,
            info.vocab_size,
        )
    )


def decode(data: bytes, prompt_ids: list[int], compiled: Compile) -> DrawnSequence:
    """The sequence as it was, of what `encode` made and of vLLM's prompt.

    Raises:
        ValueError: it can't be run, which whoever encoded it has checked.
    """
    drawn = msgspec.msgpack.decode(data, type=Drawn)
    info = EngineInfo(drawn.max_model_len, drawn.vocab_size, 0, drawn.eos_token_ids, "vllm", "", "")
    grammar = drawn.sampling.grammar
    request = SequenceRequest(
        id=drawn.id,
        prompt_ids=prompt_ids[: drawn.num_prompt],
        output_ids=prompt_ids[drawn.num_prompt :],
        sampling=drawn.sampling,
        choice=drawn.choice,
        max_tokens=drawn.max_tokens,
        grammar=None if grammar is None else compiled(grammar, info),
    )
    return DrawnSequence(request, info, arrival=0)


def to_vllm(sequence: DrawnSequence, info: EngineInfo) -> "vllm.SamplingParams":
    """vLLM's parameters. Of what shapes the distribution they know nothing: `drawing` takes it into account,
    and to vLLM every sequence is greedy."""
    from vllm import SamplingParams as VllmSamplingParams
    from vllm.sampling_params import RequestOutputKind

    sampling = sequence.sampling
    return VllmSamplingParams(
        temperature=0.0,
        max_tokens=sequence.max_tokens - sequence.num_output,
        ignore_eos=True,  # among the stop ids, if it counts: vLLM's idea of it may be another
        stop_token_ids=sorted(sequence.stop_ids),
        logprobs=sampling.top_logprobs,
        prompt_logprobs=sampling.prompt_logprobs,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
        extra_args={EXTRA: encode(sequence, info)},
        skip_clone=True,
    )


def from_vllm(output: "RequestOutput", request: SequenceRequest, first: bool) -> SequenceOutput:
    """One delta of vLLM's. `first`: nothing of the sequence has gone out yet."""
    completion = output.outputs[0]
    reason = completion.finish_reason
    sampling = request.sampling
    logprobs = None
    if sampling.top_logprobs is not None and completion.logprobs is not None:
        logprobs = [
            _logprobs(token, at, sampling.top_logprobs)
            for token, at in zip(completion.token_ids, completion.logprobs, strict=True)
        ]
    return SequenceOutput(
        id=request.id,
        token_ids=list(completion.token_ids),
        logprobs=logprobs,
        finish_reason=_REASONS.get(reason, "error") if reason else None,
        error=f"vLLM ended the sequence: {reason}" if reason and reason not in _REASONS else None,
        # vLLM's prompt may have a tail that is output to us.
        cached_tokens=min(output.num_cached_tokens or 0, len(request.prompt_ids)) if first else 0,
        prompt_logprobs=_of_prompt(output.prompt_logprobs, request) if first else None,
    )


_REASONS: dict[str, FinishReason] = {"stop": "stop", "length": "length"}


def _of_prompt(
    logprobs: "Sequence[Mapping[int, Logprob] | None] | None", request: SequenceRequest
) -> list[TokenLogprobs | None] | None:
    wanted = request.sampling.prompt_logprobs
    if wanted is None or logprobs is None:
        return None
    return [
        None if at is None else _logprobs(token, at, wanted)
        for token, at in zip(request.prompt_ids, logprobs, strict=False)
    ]


def _logprobs(token: int, at: "Mapping[int, Logprob]", wanted: int) -> TokenLogprobs:
    """vLLM gives the most likely tokens and the drawn one, if that isn't among them."""
    best: list[tuple[int, Any]] = sorted(at.items(), key=lambda item: item[1].rank or 0)
    return TokenLogprobs(at[token].logprob, tuple((id, each.logprob) for id, each in best[:wanted]))
