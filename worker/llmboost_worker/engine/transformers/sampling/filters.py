"""top_k, top_p and min_p: the least weight that each row keeps.

All three keep the tokens above some weight, so each row ends with one threshold. Tokens that tie with the
last one are kept too, so it doesn't matter how a sort would order them.
"""

import torch
from torch import Tensor

from llmboost_worker.engine.transformers.sampling.parameters import Parameters, TopK

BLOCK = 64
"""Tokens whose largest is looked at first when a few large ones are wanted."""

CACHED = 1 << 19
"""Elements of a slice of rows whose temporaries stay in a CPU's cache."""


def thresholds(weights: Tensor, parameters: Parameters) -> Tensor | None:
    """The weight of the last token that each row keeps; None if no row filters.

    Args:
        weights: [random, vocabulary], relative to the row's most likely token

    Returns:
        [random, 1]
    """
    if parameters.min_p is None and parameters.top_p is None and not parameters.top_k:
        return None
    least = torch.zeros(len(weights), 1, device=weights.device)
    for top_k in parameters.top_k:
        least.index_copy_(0, top_k.rows, _of_top_k(_select(weights, top_k.rows), top_k))
    if parameters.top_p is not None:
        rows, p = parameters.top_p.rows, parameters.top_p.p
        least.index_copy_(0, rows, nucleus(_select(weights, rows), p))
    return least if parameters.min_p is None else torch.maximum(least, parameters.min_p)


def _select(weights: Tensor, rows: Tensor) -> Tensor:
    return weights if len(rows) == len(weights) else weights.index_select(0, rows)


def _of_top_k(weights: Tensor, asked: TopK) -> Tensor:
    """The least weight of each row's top k, and of the nucleus within them. [rows, 1]"""
    ranked, _ = largest(weights, asked.width)
    within_k = torch.arange(asked.width, device=weights.device) < asked.k
    return _last_kept(ranked, ranked.double() * within_k, asked.p, within_k)


def _last_kept(ranked: Tensor, masses: Tensor, p: Tensor, among: Tensor | None = None) -> Tensor:
    """A token is kept while those before it don't make up p yet; the first always. [rows, 1]"""
    mass = masses.cumsum(1)
    kept = (mass - masses < p * mass[:, -1:]) | (p >= 1)
    if among is not None:
        kept &= among
    return ranked.gather(1, kept.sum(1, keepdim=True).clamp_(min=1) - 1)


def nucleus(weights: Tensor, p: Tensor) -> Tensor:
    """The least weight v of each row such that the tokens above v don't make up the share p of the row.

    A GPU sorts. On a CPU that takes ten times as long as to look for v digit by digit, as a radix sort does.

    Args:
        weights: [rows, vocabulary], float32 in [0, 1], each row's largest 1
        p: [rows, 1], float64, below 1

    Returns:
        [rows, 1]
    """
    if weights.device.type == "cpu":
        rows = max(1, CACHED // weights.shape[1])
        slices = zip(torch.split(weights, rows), torch.split(p, rows), strict=True)
        return torch.cat([_by_digits(*each) for each in slices])
    return _by_sorting(weights, p)


def _by_sorting(weights: Tensor, p: Tensor) -> Tensor:
    ranked = weights.sort(descending=True).values
    return _last_kept(ranked, ranked.double(), p)


def _by_digits(weights: Tensor, p: Tensor) -> Tensor:
    """`nucleus`: the bits of floats that aren't negative are ordered like the floats. So they are found in
    three digits from the first on, each by the mass of the tokens that have it and agree so far."""
    rows, vocabulary = weights.shape
    digits = (weights.view(torch.int32) >> 20).long() & 0x7FF
    masses = weights.new_zeros(rows, 1 << 11, dtype=torch.float64).scatter_add_(1, digits, weights.double())
    needed = p * masses.sum(1, keepdim=True)
    above = torch.zeros_like(needed)
    found, above = _digit(masses, above, needed)
    flat = (digits == found).view(-1).nonzero()[:, 0]
    row, rest = flat // vocabulary, weights.view(-1)[flat]
    for shift in (10, 0):
        digits = (rest.view(torch.int32) >> shift).long() & 0x3FF
        masses = above.new_zeros(rows << 10).index_add_(0, (row << 10) + digits, rest.double())
        digit, above = _digit(masses.view(rows, -1), above, needed)
        found = (found << 10) | digit
        if shift:
            agrees = digits == digit[row, 0]
            row, rest = row[agrees], rest[agrees]
    return found.int().view(torch.float32)


def _digit(masses: Tensor, above: Tensor, needed: Tensor) -> tuple[Tensor, Tensor]:
    """The least digit such that the mass above it isn't what is needed yet, and that mass.

    Args:
        masses: [rows, digits] of the tokens with each digit
        above: [rows, 1], mass of the tokens that are larger by an earlier digit
        needed: [rows, 1]

    Returns:
        two of [rows, 1]
    """
    larger = above + masses.flip(1).cumsum(1).flip(1) - masses
    digit = (larger >= needed).sum(1, keepdim=True).clamp_(max=masses.shape[1] - 1)
    return digit, larger.gather(1, digit)


def largest(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`topk`, best first. A third of its time for a small k: the k largest of a row are in the k blocks that
    have the largest maxima.

    Args:
        values: [rows, n]

    Returns:
        values and indices, [rows, k]
    """
    rows, n = values.shape
    num_blocks = n // BLOCK
    if k > num_blocks // 4:
        best = values.topk(k)
        return best.values, best.indices
    blocks = values[:, : num_blocks * BLOCK].view(rows, num_blocks, BLOCK)
    chosen = blocks.amax(-1).topk(k).indices[..., None]
    offsets = torch.arange(BLOCK, device=values.device)
    tail = torch.arange(num_blocks * BLOCK, n, device=values.device).expand(rows, -1)
    indices = torch.cat([(chosen * BLOCK + offsets).flatten(1), tail], dim=1)
    best = values.gather(1, indices).topk(k)
    return best.values, indices.gather(1, best.indices)
