"""From logits to tokens, for a whole batch at once and each sequence by its own parameters.

Temperature, top_k, top_p and min_p, in transformers' order. Since all three filters keep the tokens above
some weight, each row ends with one threshold. Among what is left the token is drawn by a race: each takes an
exponentially distributed time, a function of (seed, choice, position, token) alone, divided by its
probability, and the first wins (the Gumbel-max trick, without logarithms).

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
from llmboost_worker.engine.transformers import penalties, randomness
from llmboost_worker.engine.transformers.sequence import Sequence

TOP = 1024
"""Candidates among which top_k and top_p are looked for before a row's whole vocabulary is sorted. Sorting
all of 32 x 49k costs 131 ms on two cores, the top 1,024 some 10 ms."""

COLDEST = 1e-6
"""Temperatures below behave like this one, which tells logits apart that differ by 1e-4: no division by a
subnormal."""

LEAST = -80.0
"""Tokens that are e^80 times less likely than the best are never drawn. Below this exp gets ten to a hundred
times slower, on its way to subnormal numbers."""

BLOCK = 256
"""Tokens that race together, after their block has won against the others."""


@dataclass(frozen=True, slots=True)
class Draw:
    """What a step drew for one sequence."""

    token: int = -1
    logprobs: TokenLogprobs | None = None
    error: str | None = None
    """Instead of a token."""


def sample(logits: Tensor, sequences: list[Sequence]) -> list[Draw]:
    """logits [rows, vocabulary] of `sequences`, may be overwritten."""
    logits = logits.float()
    logprobs = _Logprobs.of(logits, sequences)
    penalties.apply(logits, sequences)
    best, tokens = logits.max(dim=-1)
    # max passes NaN on, and is -inf where no token is left: one look at each row finds both.
    broken = [not ok for ok in best.isfinite().tolist()]
    rows = [i for i, sequence in enumerate(sequences) if sequence.sampling.temperature > 0 and not broken[i]]
    if rows:
        index = torch.tensor(rows, device=logits.device)
        random = [sequences[i] for i in rows]
        among = logits if len(rows) == len(sequences) else logits[index]
        weights = weigh(among.sub_(best[index, None]), random)
        drawn = race(weights, [randomness.key(one.random_state, one.num_output) for one in random])
        tokens = tokens.index_copy(0, index, drawn)
    ids = tokens.tolist()
    reported = logprobs.report(ids) if logprobs else {}
    return [
        Draw(error=_why(logits[i], sequences[i])) if broken[i] else Draw(ids[i], reported.get(i))
        for i in range(len(sequences))
    ]


def _why(row: Tensor, sequence: Sequence) -> str:
    if sequence.matcher is not None and sequence.matcher.error is not None:
        return f"the output can't be held to its grammar any longer: {sequence.matcher.error}"
    if row.isnan().any():
        return "the model's logits are not numbers (NaN); a wider dtype may help"
    if (row == torch.inf).any():
        return "the model's logits, or a logit_bias, are infinite"
    return "no token is left to draw: logit_bias, min_tokens and the grammar exclude all of them"


def weigh(scores: Tensor, sequences: list[Sequence]) -> Tensor:
    """The probabilities by which each row draws, relative to its most likely token's.

    Args:
        scores: [rows, vocabulary], logits less their row's maximum; overwritten
    """
    params = [sequence.sampling for sequence in sequences]
    if any(p.temperature != 1 for p in params):
        scores /= torch.tensor([max(p.temperature, COLDEST) for p in params], device=scores.device)[:, None]
    weights = scores.clamp_(min=LEAST).exp_()
    thresholds = torch.tensor([max(p.min_p, math.exp(LEAST) * 1.001) for p in params], device=scores.device)
    rows = [i for i, p in enumerate(params) if 0 < p.top_k < scores.shape[1] or p.top_p < 1]
    if rows:
        index = torch.tensor(rows, device=scores.device)
        among = weights if len(rows) == len(params) else weights[index]
        found = nucleus(among, [params[i].top_k for i in rows], [params[i].top_p for i in rows])
        thresholds[index] = torch.maximum(thresholds[index], found)
    return weights.masked_fill_(weights < thresholds.clamp_(max=1)[:, None], 0)


def nucleus(weights: Tensor, top_k: list[int], top_p: list[float]) -> Tensor:
    """The weight of the last token that top_k (0: off) and then top_p keep, per row.

    Tokens that tie with the last one are kept too, so it doesn't matter how a sort orders them.

    Args:
        weights: [rows, vocabulary], unnormalised probabilities
    """
    vocabulary = weights.shape[1]
    # Beyond top_k nothing counts: where every row has a small one, that many candidates do.
    width = min(vocabulary, TOP, max(k or vocabulary for k in top_k))
    total = weights.sum(1, dtype=torch.float64) if min(top_p) < 1 else weights[:, 0].double()
    found, complete = _cut(weights.topk(width).values, total, vocabulary, top_k, top_p)
    if not complete.all():
        rest = (~complete).nonzero()[:, 0]
        rows = rest.tolist()
        ranked = weights[rest].sort(descending=True).values
        found[rest], _ = _cut(
            ranked, total[rest], vocabulary, [top_k[i] for i in rows], [top_p[i] for i in rows]
        )
    return found


def _cut(
    ranked: Tensor, total: Tensor, vocabulary: int, top_k: list[int], top_p: list[float]
) -> tuple[Tensor, Tensor]:
    """`nucleus`, looked for among the best.

    Args:
        ranked: [rows, candidates], best first
        total: [rows], of the whole vocabulary

    Returns:
        the last weight kept per row, and whether the candidates sufficed to find it
    """
    width, device = ranked.shape[1], ranked.device
    k = torch.tensor([k or vocabulary for k in top_k], device=device)
    p = torch.tensor(top_p, dtype=torch.float64, device=device)
    within_k = torch.arange(width, device=device) < k[:, None]
    weights = ranked.double() * within_k
    mass = weights.cumsum(1)
    needed = p * torch.where(k <= width, mass[:, -1], total)
    # A token is kept while those before it don't make up p yet; the first always.
    kept = within_k & ((mass - weights < needed[:, None]) | (p >= 1)[:, None])
    last = kept.sum(1).clamp_(min=1) - 1
    complete = (k <= width) | ((k >= vocabulary) & (p < 1) & (mass[:, -1] >= needed)) | (width == vocabulary)
    return ranked.gather(1, last[:, None])[:, 0], complete


def race(weights: Tensor, keys: list[int]) -> Tensor:
    """Draws a token of each row, with a probability proportional to its weight.

    First whole blocks of tokens race, then the tokens of the block that won: the same distribution, for a few
    hundred random numbers instead of one per token of the vocabulary.

    Args:
        weights: [rows, vocabulary], float32, not negative, not all 0
        keys: [rows], of `randomness.key`

    Returns:
        [rows], int64; never a token of weight 0
    """
    padded = torch.nn.functional.pad(weights, (0, -weights.shape[1] % BLOCK))
    blocks = padded.view(len(weights), -1, BLOCK)
    rows = torch.arange(len(weights), device=weights.device)
    numbers = torch.arange(max(BLOCK, blocks.shape[1]), device=weights.device)
    block = _first(blocks.sum(-1, dtype=torch.float64), keys, numbers[None, : blocks.shape[1]])
    tokens = block[:, None] * BLOCK + numbers[:BLOCK]
    inside = _first(blocks[rows, block].double(), keys, tokens + blocks.shape[1])
    return block * BLOCK + inside


def _first(rates: Tensor, keys: list[int], candidates: Tensor) -> Tensor:
    """Who wins among [rows, n] candidates, named by numbers of which none is used twice with a key. [rows]"""
    return (randomness.exponentials(keys, candidates) / rates).argmin(1)


class _Logprobs:
    """Log probabilities of the model's own distribution, for the rows that ask for them."""

    def __init__(self, rows: list[int], wanted: list[int], logits: Tensor) -> None:
        self._rows = rows
        self._wanted = wanted
        self._logits = logits
        """[rows that ask, vocabulary]"""

    @classmethod
    def of(cls, logits: Tensor, sequences: list[Sequence]) -> "_Logprobs | None":
        """Copies what it needs of `logits`; None if nobody asks."""
        rows = [i for i, sequence in enumerate(sequences) if sequence.sampling.top_logprobs is not None]
        if not rows:
            return None
        wanted = [sequences[i].sampling.top_logprobs or 0 for i in rows]
        return cls(rows, wanted, logits[rows])

    def report(self, tokens: list[int]) -> dict[int, TokenLogprobs]:
        """By row, given each row's drawn token."""
        norm = self._logits.logsumexp(1, keepdim=True)
        drawn = torch.tensor([tokens[i] for i in self._rows], device=norm.device)[:, None]
        of_drawn = (self._logits.gather(1, drawn) - norm)[:, 0].tolist()
        best = self._logits.topk(min(max(self._wanted), self._logits.shape[1]), dim=1)
        values, ids = (best.values - norm).tolist(), best.indices.tolist()
        return {
            row: TokenLogprobs(of_drawn[i], tuple(zip(ids[i][:wanted], values[i][:wanted], strict=True)))
            for i, (row, wanted) in enumerate(zip(self._rows, self._wanted, strict=True))
        }
