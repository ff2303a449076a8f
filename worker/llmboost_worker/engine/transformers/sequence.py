"""One sequence on its way through the engine: its tokens, how far it is computed, when it ends."""

import numpy as np
from numpy.typing import NDArray

from llmboost_worker.engine.grammar import Compiled, Matcher
from llmboost_worker.engine.interface import EngineInfo, FinishReason, SequenceRequest, TokenLogprobs
from llmboost_worker.engine.transformers.blocks import BlockTable
from llmboost_worker.engine.transformers.sampling import randomness


class Sequence:
    """A request and its state.

    Raises:
        ValueError: the request can't be run; the message says which value is wrong.
    """

    def __init__(self, request: SequenceRequest, info: EngineInfo, arrival: int) -> None:
        _check(request, info)
        sampling = request.sampling
        self.id = request.id
        self.sampling = sampling
        self.choice = request.choice
        self.priority = request.priority
        self.rank = (request.priority, arrival)
        """Smaller is served first and preempted last."""
        self.tokens = request.prompt_ids + request.output_ids
        self.num_prompt = len(request.prompt_ids)
        self.max_tokens = request.max_tokens

        self.num_cached = 0
        """Tokens whose keys and values are in its blocks."""
        self.num_scheduled = 0
        """Tokens that the step under way computes."""
        self.table = BlockTable()
        self.num_found: int | None = None
        """Tokens of the prompt that were in the prefix cache when it first began; 0 once that is reported."""

        self.random_state = randomness.stream(sampling.seed, request.choice)
        stops = {token for token in sampling.stop_token_ids if 0 <= token < info.vocab_size}
        self.matcher: Matcher | None = None
        """What its grammar allows next."""
        if isinstance(request.grammar, Compiled):
            self.matcher = request.grammar.matcher(self.num_prompt, holds_end=sampling.ignore_eos)
        # With a grammar the end is allowed only where the output may end, or must.
        ignores_end = sampling.ignore_eos and self.matcher is None
        self.stop_ids = frozenset(stops if ignores_end else stops.union(info.eos_token_ids))
        self.held_back_ids = np.array(sorted(stops.union(info.eos_token_ids)), dtype=np.int64)
        """Not drawn before `min_tokens`."""
        self.bias_ids = np.array(list(sampling.logit_bias.keys()), dtype=np.int64)
        self.bias_values = np.array(list(sampling.logit_bias.values()), dtype=np.float32)
        self.prompt_logprobs: list[TokenLogprobs | None] | None = None
        """Of the prompt's tokens, as far as it is computed; None: not asked for, or given away."""
        if sampling.prompt_logprobs is not None:
            self.prompt_logprobs = [None]
        penalised = (
            sampling.presence_penalty or sampling.frequency_penalty or sampling.repetition_penalty != 1.0
        )
        self.counts = TokenCounts(request.prompt_ids, request.output_ids) if penalised else None

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def num_uncached(self) -> int:
        return len(self.tokens) - self.num_cached

    @property
    def is_decoding(self) -> bool:
        """Only the token drawn last is missing from its blocks."""
        return self.num_cached > 0 and self.num_uncached == 1

    @property
    def most_tokens(self) -> int:
        """Prompt and output, if nothing ends it before its limit."""
        return max(len(self.tokens), self.num_prompt + self.max_tokens)

    @property
    def is_scored(self) -> bool:
        """Tokens of its prompt still want their logprobs, which come from computing it."""
        return self.prompt_logprobs is not None and len(self.prompt_logprobs) < self.num_prompt

    @property
    def is_sampled(self) -> bool:
        """The step under way reaches the last token, so the next one can be drawn."""
        return self.num_scheduled == self.num_uncached

    def begin(self, num_found: int) -> None:
        """It has blocks, of which the first hold `num_found` tokens already."""
        self.num_cached = num_found
        if self.num_found is None:
            self.num_found = min(num_found, self.num_prompt)

    def append(self, token: int) -> None:
        """Takes a drawn token."""
        self.tokens.append(token)
        if self.counts is not None:
            self.counts.add(token)

    def finish_reason(self) -> FinishReason | None:
        """Whether the tokens so far, those of an earlier attempt included, are all there will be."""
        if self.num_output and self.tokens[-1] in self.stop_ids:
            return "stop"
        if self.num_output >= self.max_tokens:
            return "length"
        return None


class TokenCounts:
    """The distinct tokens of one sequence and how often each was output (0: only in the prompt).

    Kept sparse and up to date token by token: counting anew would cost more each step than the penalties.
    """

    def __init__(self, prompt_ids: list[int], output_ids: list[int]) -> None:
        distinct = np.unique(np.array(prompt_ids, dtype=np.int64))
        self._size = len(distinct)
        self._ids = distinct
        self._counts = np.zeros(self._size, dtype=np.float32)
        self._index = {int(token): i for i, token in enumerate(distinct)}
        for token in output_ids:
            self.add(token)

    @property
    def ids(self) -> NDArray[np.int64]:
        """[distinct]"""
        return self._ids[: self._size]

    @property
    def counts(self) -> NDArray[np.float32]:
        """[distinct]"""
        return self._counts[: self._size]

    def add(self, token: int) -> None:
        index = self._index.get(token)
        if index is None:
            index = self._index[token] = self._size
            if self._size == len(self._ids):
                self._ids = np.concatenate([self._ids, np.zeros(self._size, dtype=np.int64)])
                self._counts = np.concatenate([self._counts, np.zeros(self._size, dtype=np.float32)])
            self._ids[index] = token
            self._size += 1
        self._counts[index] += 1


def _check(request: SequenceRequest, info: EngineInfo) -> None:
    if not request.prompt_ids:
        raise ValueError("the prompt is empty: it needs at least one token")
    for name, ids in (
        ("prompt", request.prompt_ids),
        ("output", request.output_ids),
        ("logit_bias", request.sampling.logit_bias),
    ):
        for token in ids:
            if not 0 <= token < info.vocab_size:
                raise ValueError(f"token id {token} of {name} is outside the vocabulary of {info.vocab_size}")
    length = len(request.prompt_ids) + max(request.max_tokens, len(request.output_ids))
    if length > info.max_model_len:
        raise ValueError(
            f"{len(request.prompt_ids)} prompt tokens and {length - len(request.prompt_ids)} output tokens "
            f"are more than the context of {info.max_model_len}"
        )
