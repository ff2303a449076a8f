"""One forward of the model per step."""

import logging
from typing import Any

import torch
from torch import Tensor

from llmboost_worker.engine.transformers.attention import DecodeSegment, PrefillSegment, Segment, attending
from llmboost_worker.engine.transformers.cache import Slot
from llmboost_worker.engine.transformers.sampler import Draw, Sampler
from llmboost_worker.engine.transformers.sequence import Sequence

logger = logging.getLogger(__name__)


class ModelRunner:
    """Computes the scheduled tokens of a batch and draws the next ones."""

    def __init__(self, model: Any, device: torch.device) -> None:
        self._model = model
        self._device = device
        self._sampler = Sampler()

    def run(self, batch: list[Sequence]) -> dict[str, Draw]:
        """By sequence id, for the sequences whose last token this step reaches and for those that fail.

        If the step throws, halves of it are tried until the culprits are found. That is safe to do: a second
        forward writes the same keys and values into the same places.

        Raises:
            torch.AcceleratorError: the device is lost; nothing can be computed any more.
        """
        try:
            logits, sampled = self.forward(batch)
            draws = self._sampler.sample(logits, sampled) if sampled else []
            return {sequence.id: draw for sequence, draw in zip(sampled, draws, strict=True)}
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

    def forward(self, batch: list[Sequence]) -> tuple[Tensor, list[Sequence]]:
        """The logits [sampled, vocabulary] after the last token of each sequence that this step completes,
        and those sequences."""
        ordered, segments = self._pack(batch)
        tokens: list[int] = []
        positions: list[int] = []
        last_rows: list[int] = []
        sampled: list[Sequence] = []
        for sequence in ordered:
            end = sequence.num_cached + sequence.num_scheduled
            tokens += sequence.tokens[sequence.num_cached : end]
            positions += range(sequence.num_cached, end)
            if sequence.is_sampled:
                sampled.append(sequence)
                last_rows.append(len(tokens) - 1)
        all_rows = len(last_rows) == len(tokens)
        with attending(segments):
            output = self._model(
                input_ids=torch.tensor([tokens], device=self._device),
                position_ids=torch.tensor([positions], device=self._device),
                use_cache=False,
                # Projecting to the vocabulary is the widest product of all: only rows that are sampled.
                logits_to_keep=0
                if all_rows
                else torch.tensor(last_rows, dtype=torch.int64, device=self._device),
            )
        return output.logits[0], sampled

    def _pack(self, batch: list[Sequence]) -> tuple[list[Sequence], list[Segment]]:
        """The order of the sequences in the row of tokens, and what each part of it attends to."""
        decoding = [(slot, sequence) for slot, sequence in _slots(batch) if sequence.is_decoding]
        decoding.sort(key=lambda pair: (pair[0].slab.capacity, pair[0].index))
        prefilling = [(slot, sequence) for slot, sequence in _slots(batch) if not sequence.is_decoding]
        segments: list[Segment] = []
        for capacity in sorted({slot.slab.capacity for slot, _ in decoding}):
            same = [(slot, sequence) for slot, sequence in decoding if slot.slab.capacity == capacity]
            slots = [slot for slot, _ in same]
            segments.append(
                DecodeSegment.of(slots, [sequence.num_cached for _, sequence in same], self._device)
            )
        for slot, sequence in prefilling:
            segments.append(PrefillSegment(slot, sequence.num_cached, sequence.num_scheduled))
        return [sequence for _, sequence in decoding + prefilling], segments


def _slots(batch: list[Sequence]) -> list[tuple[Slot, Sequence]]:
    return [(sequence.slot, sequence) for sequence in batch if sequence.slot is not None]
