"""What a request changes in its logits before they are turned into probabilities.

In this order: bias, then repetition, frequency and presence penalties, as in vLLM. Last what forbids tokens:
those held back by `min_tokens`, and whatever else sets logits to -inf for good; after it nothing may add to
them, so that nothing brings a forbidden token back. Each is a sparse update of [rows, vocabulary] in place,
and costs nothing where no sequence asks for it.
"""

import numpy as np
import torch
from torch import Tensor

from llmboost_worker.engine.transformers.sampling import masks
from llmboost_worker.engine.transformers.sampling.parameters import Parameters, Penalties, pairs


def apply(logits: Tensor, parameters: Parameters) -> None:
    """logits [rows, vocabulary], changed in place."""
    matchers = {i: each.matcher for i, each in enumerate(parameters.sequences) if each.matcher is not None}
    for i, matcher in matchers.items():
        matcher.wait(parameters.sequences[i].tokens)
    if parameters.bias is not None:
        logits.index_put_(parameters.bias.index, parameters.bias.values, accumulate=True)
    if parameters.penalties is not None:
        _penalise(logits, parameters, parameters.penalties)
    _forbid(logits, parameters)
    if matchers:
        masks.forbid(logits, matchers)


def _penalise(logits: Tensor, parameters: Parameters, penalties: Penalties) -> None:
    """Repetition as in "CTRL" (arXiv:1909.05858) and transformers: over prompt and output, divides positive
    logits and multiplies negative ones. Frequency and presence as OpenAI defines them: over the output."""
    sequences = [parameters.sequences[row] for row in penalties.rows]
    counted = [sequence.counts for sequence in sequences if sequence.counts is not None]
    index = pairs(penalties.rows, [tokens.ids for tokens in counted], logits.device)
    sizes = torch.tensor([len(tokens.ids) for tokens in counted], device=logits.device)
    repetition, frequency, presence = penalties.factors.repeat_interleave(
        sizes, dim=1, output_size=len(index[0])
    )
    counts = torch.from_numpy(np.concatenate([tokens.counts for tokens in counted])).to(logits.device)
    values = logits[index]
    values = torch.where(values > 0, values / repetition, values * repetition)
    logits[index] = values - counts * frequency - (counts > 0) * presence


def _forbid(logits: Tensor, parameters: Parameters) -> None:
    held = [
        (row, one)
        for row, one in parameters.min_tokens
        if one.num_output < one.sampling.min_tokens and not (one.matcher and one.matcher.must_end)
    ]
    if held:
        ids = [sequence.held_back_ids for _, sequence in held]
        logits[pairs([row for row, _ in held], ids, logits.device)] = -torch.inf
