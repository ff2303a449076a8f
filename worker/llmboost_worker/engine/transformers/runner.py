"""One forward of the model per step."""

import logging
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmboost_worker.engine.transformers import sampler
from llmboost_worker.engine.transformers.attention import Step, attending
from llmboost_worker.engine.transformers.backend import AttentionBackend
from llmboost_worker.engine.transformers.cache import KeyValueCache
from llmboost_worker.engine.transformers.layout import StepLayout
from llmboost_worker.engine.transformers.sampler import Draw
from llmboost_worker.engine.transformers.sequence import Sequence

logger = logging.getLogger(__name__)

UNSOUND = "the model's keys and values are not numbers (NaN) or infinite; a wider dtype may help"


class ModelRunner:
    """Computes the scheduled tokens of a batch and draws the next ones."""

    def __init__(
        self, model: Any, cache: KeyValueCache, backend: AttentionBackend, device: torch.device
    ) -> None:
        self._model = model
        self._cache = cache
        self._backend = backend
        self._device = device

    def run(self, batch: list[Sequence]) -> dict[str, Draw]:
        """By sequence id, for the sequences whose last token this step reaches and for those that fail.

        If the step throws, halves of it are tried until the culprits are found. That is safe to do: a second
        forward writes the same keys and values into the same places.

        Raises:
            torch.AcceleratorError: the device is lost; nothing can be computed any more.
        """
        try:
            ordered = in_order(batch)
            layout = StepLayout.of(ordered, self._cache.block_size, self._device)
            logits, sampled = self.forward(ordered, layout)
            drawn = sampler.sample(logits, sampled) if sampled else []
            draws = {sequence.id: draw for sequence, draw in zip(sampled, drawn, strict=True)}
            return draws | self._unsound(ordered, layout)
        except torch.AcceleratorError:
            raise
        except Exception as error:
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
            if len(batch) == 1:
                logger.exception("sequence %s failed in a step", batch[0].id)
                return {batch[0].id: Draw(error=f"{type(error).__name__}: {error}")}
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
        for sequence in ordered:
            tokens += sequence.tokens[sequence.num_cached : sequence.num_cached + sequence.num_scheduled]
            if sequence.is_sampled:
                sampled.append(sequence)
                last_rows.append(len(tokens) - 1)
        all_rows = len(last_rows) == len(tokens)
        with attending(Step(layout, self._cache, self._backend)):
            output = self._model(
                input_ids=torch.tensor([tokens], device=self._device),
                position_ids=layout.positions[None],
                use_cache=False,
                # Projecting to the vocabulary is the widest product of all: only rows that are sampled.
                logits_to_keep=0
                if all_rows
                else torch.tensor(last_rows, dtype=torch.int64, device=self._device),
            )
        logits = output.logits[0]
        if len(logits) != len(sampled):  # not every model knows `logits_to_keep`
            logits = logits[last_rows]
        return logits, sampled

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
    """The order of the sequences in the row of tokens: one row each first, by length, so that what is alike
    stands together."""
    return sorted(
        batch,
        key=lambda sequence: (
            sequence.num_scheduled > 1,
            sequence.num_cached if sequence.num_scheduled == 1 else 0,
        ),
    )
