"""Logprobs of the tokens of prompts, computed with the prompt."""

import torch
from torch import Tensor

from llmboost_worker.engine.transformers.sampling.logprobs import logprobs
from llmboost_worker.engine.transformers.sequence import Sequence

MOST_ROWS = 256
"""Tokens of prompts that are scored in a step. Each needs a row of logits as wide as the vocabulary: 2,048 at
once would take 1.2 GiB where it has 152,000 tokens."""


def bounded(batch: list[Sequence]) -> list[Sequence]:
    """The batch with no more rows to score than `MOST_ROWS`: chunks are cut, and sequences sit out, with a
    `num_scheduled` of what is left."""
    left = MOST_ROWS
    for sequence in batch:
        if sequence.is_scored:
            sequence.num_scheduled = min(sequence.num_scheduled, left)
            left -= sequence.num_scheduled
    return [sequence for sequence in batch if sequence.num_scheduled]


class PromptScores:
    """What a step says of its prompts: the row of each token foretells the next."""

    def __init__(self) -> None:
        self.rows: list[int] = []
        """Rows of the step whose logits are needed."""
        self._targets: list[int] = []
        self._wanted: list[int] = []
        self._owners: list[Sequence] = []

    def add(self, sequence: Sequence, first_row: int) -> None:
        """The sequence's part of the step, which begins at this row."""
        scores = sequence.prompt_logprobs
        if scores is None:
            return
        end = sequence.num_cached + sequence.num_scheduled
        # One that gave way is computed again from its beginning, and a step that failed, in halves.
        positions = range(max(len(scores), sequence.num_cached + 1), min(end + 1, sequence.num_prompt))
        self.rows += [first_row + position - 1 - sequence.num_cached for position in positions]
        self._targets += [sequence.tokens[position] for position in positions]
        self._wanted += [sequence.sampling.prompt_logprobs or 0] * len(positions)
        self._owners += [sequence] * len(positions)

    def take(self, logits: Tensor) -> None:
        """Gives the sequences their scores.

        Args:
            logits: [rows, vocabulary], of `rows`
        """
        targets = torch.tensor(self._targets, device=logits.device)
        for sequence, score in zip(
            self._owners, logprobs(logits.float(), targets, self._wanted), strict=True
        ):
            assert sequence.prompt_logprobs is not None
            sequence.prompt_logprobs.append(score)
