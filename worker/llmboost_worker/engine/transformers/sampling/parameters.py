"""What the sequences of a batch ask of the sampler, as tensors."""

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmboost_worker.engine.transformers.sequence import Sequence

COLDEST = 1e-6
"""Temperatures below behave like this one, which tells logits apart that differ by 1e-4: no division by a
subnormal."""

FEW = 1024
"""Up to this top_k a row's candidates are taken from the vocabulary together with those of its neighbours."""


@dataclass(frozen=True, slots=True)
class TopK:
    """Rows that keep the k most likely tokens, and of these perhaps a nucleus."""

    rows: Tensor
    """[rows], among the rows that draw"""
    k: Tensor
    """[rows, 1]"""
    p: Tensor
    """[rows, 1], float64; 1 keeps all k"""
    width: int
    """The largest k."""


@dataclass(frozen=True, slots=True)
class TopP:
    """Rows that keep a nucleus of the whole vocabulary."""

    rows: Tensor
    """[rows], among the rows that draw"""
    p: Tensor
    """[rows, 1], float64"""


@dataclass(frozen=True, slots=True)
class Bias:
    """Biases of all rows that have any."""

    index: tuple[Tensor, Tensor]
    """(row, token) of each [pairs]"""
    values: Tensor
    """[pairs]"""


@dataclass(frozen=True, slots=True)
class Penalties:
    """Rows with repetition, frequency or presence penalties."""

    rows: list[int]
    factors: Tensor
    """[3, rows]: repetition, frequency, presence"""


class Parameters:
    """All that stays the same from step to step as long as the batch has the same sequences.

    Rows are those of the batch; of the random ones, those with a temperature above 0, numbered among
    themselves.
    """

    def __init__(self, sequences: list[Sequence], vocabulary: int, device: torch.device) -> None:
        self.sequences = sequences
        self._device = device
        numbered = list(enumerate(sequences))
        self.random_rows = [row for row, one in numbered if one.sampling.temperature > 0]
        self.all_random = len(self.random_rows) == len(sequences)
        self.random_index = self._tensor(self.random_rows, torch.int64)
        """[random]"""
        random = [sequences[row] for row in self.random_rows]
        self.random_states = self._tensor([one.random_state for one in random], torch.int64)
        """[random], of `randomness.stream`"""
        temperatures = [max(one.sampling.temperature, COLDEST) for one in random]
        self.temperatures = self._column(temperatures) if any(t != 1 for t in temperatures) else None
        """[random, 1]; None: all 1"""
        min_p = [one.sampling.min_p for one in random]
        self.min_p = self._column(min_p) if any(min_p) else None
        """[random, 1]; None: nobody's"""

        k = {row: one.sampling.top_k for row, one in enumerate(random) if 0 < one.sampling.top_k < vocabulary}
        p = {row: one.sampling.top_p for row, one in enumerate(random)}
        # Apart, for the widest of a group sets the cost of all of it.
        groups = [row for row in k if k[row] <= FEW], [row for row in k if k[row] > FEW]
        self.top_k = [
            TopK(
                self._tensor(rows, torch.int64),
                self._column([k[row] for row in rows], torch.int64),
                self._column([p[row] for row in rows], torch.float64),
                max(k[row] for row in rows),
            )
            for rows in groups
            if rows
        ]
        rows = [row for row in p if p[row] < 1 and row not in k]
        self.top_p = (
            TopP(self._tensor(rows, torch.int64), self._column([p[row] for row in rows], torch.float64))
            if rows
            else None
        )

        biased = [row for row, one in numbered if len(one.bias_ids)]
        self.bias = None
        if biased:
            ids = [sequences[row].bias_ids for row in biased]
            values = np.concatenate([sequences[row].bias_values for row in biased])
            self.bias = Bias(pairs(biased, ids, device), torch.from_numpy(values).to(device))
        penalised = [row for row, one in numbered if one.counts is not None]
        self.penalties = None
        if penalised:
            params = [sequences[row].sampling for row in penalised]
            factors = [(s.repetition_penalty, s.frequency_penalty, s.presence_penalty) for s in params]
            self.penalties = Penalties(penalised, self._tensor(list(zip(*factors, strict=True))))
        self.min_tokens = [(row, one) for row, one in numbered if one.sampling.min_tokens]
        """Rows that may hold stop tokens back."""

        self.logprob_rows = [row for row, one in numbered if one.sampling.top_logprobs is not None]
        self.top_logprobs = [sequences[row].sampling.top_logprobs or 0 for row in self.logprob_rows]
        """Of each of these rows."""
        self.logprob_index = self._tensor(self.logprob_rows, torch.int64)

    def positions(self) -> Tensor:
        """[random]: how many tokens each random row has been given so far."""
        return self._tensor([self.sequences[row].num_output for row in self.random_rows], torch.int64)

    def _tensor(self, values: Collection[object], dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self._device)

    def _column(self, values: Collection[object], dtype: torch.dtype = torch.float32) -> Tensor:
        return self._tensor(values, dtype)[:, None]


def pairs(rows: list[int], tokens: list[NDArray[np.int64]], device: torch.device) -> tuple[Tensor, Tensor]:
    """The (row, token) indices of every row's tokens, one after the other."""
    row = np.repeat(np.array(rows), [len(ids) for ids in tokens])
    return torch.from_numpy(row).to(device), torch.from_numpy(np.concatenate(tokens)).to(device)
