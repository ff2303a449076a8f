"""From logits to tokens, for a whole batch at once and each sequence by its own parameters.

Temperature, top_k, top_p and min_p, in transformers' order. Among what these leave the token is drawn by a
race: each takes an exponentially distributed time, a function of (seed, choice, position, token) alone,
divided by its probability, and the first wins (the Gumbel-max trick, without logarithms).

A race because nothing in a row may depend on other rows, and rounding does: the forward's last digits change
with the shape of the batch. Inverting the cumulative distribution moves every one of its steps by that, one
per token of the vocabulary, and the random number fell between two such steps once in 2,000 tokens. A race
changes its winner only if the first two are as close as the rounding: once in millions.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from llmboost_worker.engine.interface import TokenLogprobs
from llmboost_worker.engine.transformers.sampling import filters, penalties, randomness
from llmboost_worker.engine.transformers.sampling.host import HostCopy, host_copy
from llmboost_worker.engine.transformers.sampling.logprobs import logprobs
from llmboost_worker.engine.transformers.sampling.parameters import Parameters
from llmboost_worker.engine.transformers.sequence import Sequence

LEAST = -80.0
"""Tokens that are e^80 times less likely than the best are never drawn. Below this exp gets ten to a hundred
times slower, on its way to subnormal numbers."""

NEVER = math.exp(LEAST) * 1.001

BLOCK = 256
"""Tokens that race together, after their block has won against the others."""

NO_TOKEN = -1
"""In place of a token where a row has no distribution."""


@dataclass(frozen=True, slots=True)
class Draw:
    """What a step drew for one sequence."""

    token: int = NO_TOKEN
    logprobs: TokenLogprobs | None = None
    error: str | None = None
    """Instead of a token."""
    is_refused: bool = False
    """With an error: the request itself leaves nothing to draw."""


class Sampler:
    """Draws a token for each row of a batch. One transfer from the device a step, one more for logprobs."""

    def __init__(self) -> None:
        self._parameters: Parameters | None = None
        """Of the last batch: most steps have the same sequences as the one before."""
        self._copy: HostCopy | None = None

    def sample(self, logits: Tensor, sequences: list[Sequence]) -> list[Draw]:
        """logits [rows, vocabulary] of `sequences`, in any float type; may be overwritten."""
        logits = logits.float()
        parameters = self._of(sequences, logits)
        model = logits.index_select(0, parameters.logprob_index) if parameters.logprob_rows else None
        penalties.apply(logits, parameters)
        best, tokens = draw(logits, parameters)
        # The maximum passes NaN on, and is -inf where no token is left: one look at each row finds both.
        copy = self._copy = self._copy or host_copy(logits.device)
        copy.start(torch.where(best.isfinite(), tokens, NO_TOKEN))
        of_rows: list[TokenLogprobs] = []
        if model is not None:
            of_rows = logprobs(model, tokens[parameters.logprob_index], parameters.top_logprobs)
        ids = copy.wait()
        draws = [Draw(token) for token in ids]
        for row, each in zip(parameters.logprob_rows, of_rows, strict=True):
            draws[row] = Draw(ids[row], each)
        if NO_TOKEN in ids:
            draws = [
                each if each.token != NO_TOKEN else _undrawn(most, one)
                for each, most, one in zip(draws, best.tolist(), sequences, strict=True)
            ]
        return draws

    def _of(self, sequences: list[Sequence], logits: Tensor) -> Parameters:
        if self._parameters is None or self._parameters.sequences != sequences:
            self._parameters = Parameters(list(sequences), logits.shape[1], logits.device)
        return self._parameters


def _undrawn(best: float, sequence: Sequence) -> Draw:
    """What is wrong with a row, by its largest logit."""
    if sequence.matcher is not None and sequence.matcher.error is not None:
        why = (
            f"The output can't be held to its grammar any longer: {sequence.matcher.error}. Make it simpler."
        )
        return Draw(error=why, is_refused=True)
    if math.isnan(best) or best > 0:
        what = "not numbers (NaN)" if math.isnan(best) else "infinite"
        return Draw(
            error=f"The model's logits are {what}. If others' are too, an operator can try a wider --dtype."
        )
    if sequence.sampling.logit_bias or sequence.sampling.min_tokens:
        excluders = (
            "logit_bias, min_tokens and the grammar" if sequence.matcher else "logit_bias and min_tokens"
        )
        why = f"No token is left to draw: {excluders} exclude all of them. Relax them."
        return Draw(error=why, is_refused=True)
    return Draw(error="The model gives every token a probability of 0: its weights may be damaged.")


def draw(logits: Tensor, parameters: Parameters) -> tuple[Tensor, Tensor]:
    """Each row's largest logit [rows], and the token drawn for it [rows]: any, where that isn't finite.

    Args:
        logits: [rows, vocabulary], float32; overwritten
    """
    if parameters.all_random:
        best = logits.amax(-1)
        scores = logits.sub_(best[:, None])
    else:
        best, tokens = logits.max(-1)
        if not parameters.random_rows:
            return best, tokens
        index = parameters.random_index
        scores = logits.index_select(0, index).sub_(best[index, None])
    keys = randomness.keys(parameters.random_states, parameters.positions())
    drawn = race(weigh(scores, parameters), keys)
    return best, drawn if parameters.all_random else tokens.index_copy(0, parameters.random_index, drawn)


def weigh(scores: Tensor, parameters: Parameters) -> Tensor:
    """The probabilities by which each row draws, relative to its most likely token's.

    Args:
        scores: [random, vocabulary], logits less their row's maximum; overwritten
    """
    if parameters.temperatures is not None:
        scores.div_(parameters.temperatures)
    # Where it was clamped exactly 0, and the same to all digits where it is likely enough ever to be drawn.
    weights = scores.clamp_(min=LEAST).exp_().sub_(NEVER).clamp_(min=0)
    least = filters.thresholds(weights, parameters)
    if least is not None:
        # Written as floats: a mask of booleans takes three times as long to apply.
        weights.mul_(torch.ge(weights, least, out=torch.empty_like(weights)))
    return weights


def race(weights: Tensor, keys: Tensor) -> Tensor:
    """Draws a token of each row, with a probability proportional to its weight.

    First whole blocks of tokens race, then the tokens of the block that won: the same distribution, for a few
    hundred random numbers instead of one per token of the vocabulary.

    Args:
        weights: [rows, vocabulary], float32, not negative, not all 0
        keys: [rows], of `randomness.keys`

    Returns:
        [rows], int64; never a token of weight 0
    """
    vocabulary = weights.shape[1]
    whole = vocabulary // BLOCK
    blocks = weights[:, : whole * BLOCK].view(len(weights), whole, BLOCK).sum(-1)
    if whole * BLOCK < vocabulary:
        blocks = torch.cat([blocks, weights[:, whole * BLOCK :].sum(-1, keepdim=True)], dim=1)
    num_blocks = blocks.shape[1]
    numbers = torch.arange(max(BLOCK, num_blocks), device=weights.device)
    block = _first(blocks, keys, numbers[None, :num_blocks])
    tokens = block[:, None] * BLOCK + numbers[:BLOCK]
    rates = weights.gather(1, tokens.clamp(max=vocabulary - 1)) * (tokens < vocabulary)
    inside = _first(rates, keys, tokens + num_blocks)
    return block * BLOCK + inside


def _first(rates: Tensor, keys: Tensor, candidates: Tensor) -> Tensor:
    """Who wins among [rows, n] candidates, named by numbers of which none is used twice with a key. [rows]"""
    return (randomness.exponentials(keys, candidates) / rates).argmin(1)
