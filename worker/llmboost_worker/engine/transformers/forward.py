"""A step's tokens through the model: one interface, whoever computes."""

from typing import Any, Protocol

from torch import Tensor

from llmboost_worker.engine.transformers.attention.backend import AttentionBackend, Formula
from llmboost_worker.engine.transformers.attention.hook import Step, attending
from llmboost_worker.engine.transformers.attention.layout import StepLayout
from llmboost_worker.engine.transformers.cache import KeyValueCache


class Forward(Protocol):
    """Writes keys and values of all tokens into their slots, and says what comes after some of them."""

    @property
    def backend(self) -> AttentionBackend:
        """Of all layers."""

    def __call__(
        self, ids: Tensor, layout: StepLayout, cache: KeyValueCache, rows: Tensor | None = None
    ) -> Tensor:
        """
        Args:
            ids: [T], int64
            rows: [n], int64: those whose logits are wanted. Projecting to the vocabulary is the widest
                product of all. None: all

        Returns:
            [n, vocabulary]
        """

    def formula(self, layer: int, asked: Formula) -> Formula:
        """By which a layer attends here, if by transformers it does by `asked`."""


class ModelForward:
    """transformers' own forward, with the engine's attention in it."""

    def __init__(self, model: Any, backend: AttentionBackend) -> None:
        self._model, self.backend = model, backend

    def __call__(
        self, ids: Tensor, layout: StepLayout, cache: KeyValueCache, rows: Tensor | None = None
    ) -> Tensor:
        with attending(Step(layout, cache, self.backend)):
            output = self._model(
                input_ids=ids[None],
                position_ids=layout.positions[None],
                use_cache=False,
                logits_to_keep=0 if rows is None else rows,
            )
        logits: Tensor = output.logits[0]
        if rows is not None and len(logits) != len(rows):  # not every model knows `logits_to_keep`
            logits = logits[rows]
        return logits

    def formula(self, layer: int, asked: Formula) -> Formula:
        return asked
