"""One forward of the model per step."""

import logging

import numpy as np
import torch
from torch import Tensor

from llmboost_worker.engine.transformers import failures
from llmboost_worker.engine.transformers.attention.layout import StepLayout
from llmboost_worker.engine.transformers.cache import KeyValueCache
from llmboost_worker.engine.transformers.forward import Forward
from llmboost_worker.engine.transformers.sampling import scoring
from llmboost_worker.engine.transformers.sampling.sampler import Draw, Sampler
from llmboost_worker.engine.transformers.sampling.scoring import PromptScores
from llmboost_worker.engine.transformers.sequence import Sequence

logger = logging.getLogger(__name__)

UNSOUND = "the model's keys and values are not numbers (NaN) or infinite; a wider dtype may help"


class ModelRunner:
    """Computes the scheduled tokens of a batch and draws the next ones."""

    def __init__(self, forward: Forward, cache: KeyValueCache, device: torch.device) -> None:
        self._forward = forward
        self._cache = cache
        self._device = device
        self._sampler = Sampler()

    def run(self, batch: list[Sequence]) -> dict[str, Draw]:
        """By sequence id, for the sequences whose last token this step reaches and for those that fail.

        If the step throws, halves of it are tried until the culprits are found, and of a sequence that has no
        memory for its chunk half of that: its `num_scheduled` says how much was computed. That is safe to do:
        a second forward writes the same keys and values into the same places.

        Raises:
            torch.AcceleratorError: the device is lost; nothing can be computed any more.
        """
        batch = scoring.bounded(batch)
        try:
            ordered = in_order(batch)
            layout = StepLayout.of(ordered, self._cache.block_size, self._device)
            logits, sampled = self.forward(ordered, layout)
            drawn = self._sampler.sample(logits, sampled) if sampled else []
            draws = {sequence.id: draw for sequence, draw in zip(sampled, drawn, strict=True)}
            return draws | self._unsound(ordered, layout)
        except Exception as error:
            if failures.is_device_lost(error):
                raise
            shorter = failures.is_out_of_memory(error) and batch[0].num_scheduled > 1
            if len(batch) == 1 and not shorter:
                logger.exception("sequence %s failed in a step", batch[0].id)
                return {batch[0].id: Draw(error=failures.explain(error))}
        # Not before: the exception held what the step had allocated.
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        if len(batch) == 1:
            batch[0].num_scheduled //= 2
            logger.warning(
                "sequence %s has no memory for its chunk; trying %d tokens",
                batch[0].id,
                batch[0].num_scheduled,
            )
            return self.run(batch)
        middle = len(batch) // 2
        return self.run(batch[:middle]) | self.run(batch[middle:])

    def forward(self, ordered: list[Sequence], layout: StepLayout) -> tuple[Tensor, list[Sequence]]:
        """The logits [sampled, vocabulary] after the last token of each sequence that this step completes,
        and those sequences.

        Args:
            ordered: as by `in_order`
        """
        tokens: list[int] = []
        last_rows: list[int] = []
        sampled: list[Sequence] = []
        scores = PromptScores()
        for sequence in ordered:
            scores.add(sequence, len(tokens))
            tokens += sequence.tokens[sequence.num_cached : sequence.num_cached + sequence.num_scheduled]
            if sequence.is_sampled:
                sampled.append(sequence)
                last_rows.append(len(tokens) - 1)
        ids = torch.tensor(tokens, device=self._device)
        rows, num_scored = None, len(scores.rows)
        if num_scored or len(last_rows) < len(tokens):
            rows = torch.tensor(scores.rows + last_rows, dtype=torch.int64, device=self._device)
        logits = self._forward(ids, layout, self._cache, rows)
        if num_scored:
            scores.take(logits[:num_scored])
        return logits[num_scored:], sampled

    def _unsound(self, ordered: list[Sequence], layout: StepLayout) -> dict[str, Draw]:
        """Errors for chunks whose keys and values are not numbers, as of bad weights. Of decoding sequences
        the logits tell, which a chunk in the middle of its prompt doesn't have; and others must not find
        it in the prefix cache."""
        chunks = np.array([not sequence.is_decoding for sequence in ordered])
        if not chunks.any():
            return {}
        rows = torch.from_numpy(np.repeat(chunks, layout.rows)).to(self._device)
        sound = self._cache.sound(layout.slots[rows])
        if sound.all():
            return {}
        owners = np.repeat(np.arange(len(ordered)), layout.rows * chunks)
        broken = {ordered[i].id for i in owners[~sound.cpu().numpy()]}
        return dict.fromkeys(broken, Draw(error=UNSOUND))


def in_order(batch: list[Sequence]) -> list[Sequence]:
    """The order of the sequences in the row of tokens: one row each first, by length, then chunks by theirs,
    so that what is alike stands together."""
    return sorted(
        batch,
        key=lambda sequence: (
            sequence.num_scheduled > 1,
            sequence.num_cached if sequence.num_scheduled == 1 else sequence.num_scheduled,
        ),
    )
