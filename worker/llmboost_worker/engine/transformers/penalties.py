"""What a request changes in its logits before they are turned into probabilities.

In vLLM's order: bias, tokens held back by `min_tokens`, repetition, frequency and presence penalties. Each is
a sparse update of [rows, vocabulary] in place, and costs nothing where no sequence asks for it. Last what the
grammars forbid, so that nothing brings it back.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmboost_worker.engine.transformers import masks
from llmboost_worker.engine.transformers.sequence import Sequence


def apply(logits: Tensor, sequences: list[Sequence]) -> None:
    """logits [rows, vocabulary] of `sequences`, changed in place."""
    matchers = {i: sequence.matcher for i, sequence in enumerate(sequences) if sequence.matcher is not None}
    for i, matcher in matchers.items():
        matcher.wait(sequences[i].tokens)
    _bias(logits, sequences)
    _hold_back(logits, sequences)
    _penalise(logits, sequences)
    if matchers:
        masks.forbid(logits, matchers)


def _bias(logits: Tensor, sequences: list[Sequence]) -> None:
    rows = [i for i, sequence in enumerate(sequences) if len(sequence.bias_ids)]
    if rows:
        index = _index(rows, [sequences[i].bias_ids for i in rows], logits)
        logits[index] += _concatenate([sequences[i].bias_values for i in rows], logits)


def _hold_back(logits: Tensor, sequences: list[Sequence]) -> None:
    rows = [
        i
        for i, sequence in enumerate(sequences)
        if sequence.num_output < sequence.sampling.min_tokens
        and not (sequence.matcher and sequence.matcher.must_end)
    ]
    if rows:
        logits[_index(rows, [sequences[i].held_back_ids for i in rows], logits)] = -torch.inf


def _penalise(logits: Tensor, sequences: list[Sequence]) -> None:
    """Repetition as in "CTRL" (arXiv:1909.05858) and transformers: over prompt and output, divides positive
    logits and multiplies negative ones. Frequency and presence as OpenAI defines them: over the output."""
    counted = [
        (i, sequence.sampling, sequence.counts)
        for i, sequence in enumerate(sequences)
        if sequence.counts is not None
    ]
    if not counted:
        return
    index = _index([i for i, _, _ in counted], [tokens.ids for _, _, tokens in counted], logits)
    sizes = torch.tensor([len(tokens.ids) for _, _, tokens in counted], device=logits.device)

    def spread(values: list[float]) -> Tensor:
        """One value per sequence -> [pairs]"""
        return torch.tensor(values, device=logits.device).repeat_interleave(sizes)

    repetition = spread([sampling.repetition_penalty for _, sampling, _ in counted])
    frequency = spread([sampling.frequency_penalty for _, sampling, _ in counted])
    presence = spread([sampling.presence_penalty for _, sampling, _ in counted])
    counts = _concatenate([tokens.counts for _, _, tokens in counted], logits)
    values = logits[index]
    values = torch.where(values > 0, values / repetition, values * repetition)
    logits[index] = values - counts * frequency - (counts > 0) * presence


def _index(rows: list[int], columns: list[NDArray[np.int64]], logits: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of all (row, column) pairs."""
    row = np.repeat(np.array(rows), [len(ids) for ids in columns])
    column = np.concatenate(columns)
    return torch.from_numpy(row).to(logits.device), torch.from_numpy(column).to(logits.device)


def _concatenate(values: list[NDArray[np.float32]], logits: Tensor) -> Tensor:
    """One array per row of `_index` -> [pairs]"""
    return torch.from_numpy(np.concatenate(values)).to(logits.device)
