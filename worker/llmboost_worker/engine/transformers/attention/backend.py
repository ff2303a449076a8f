"""What computes attention over the blocks: one interface, chosen once, when a model is loaded."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from llmboost_worker.engine.transformers.attention.layout import StepLayout
from llmboost_worker.engine.transformers.blocks import BLOCK_SIZE


@dataclass(frozen=True, slots=True)
class Formula:
    """A layer's own parameters."""

    scale: float
    softcap: float | None
    window: int | None
    """A token sees this many tokens, itself included."""
    sinks: Tensor | None = None
    """[heads]: of each head, the score of nothing, which takes its share of the attention."""


class AttentionBackend(ABC):
    """Attention of one layer, for all rows of a step. Each row sees what its sequence has up to itself."""

    block_size = BLOCK_SIZE
    """Tokens per block of the cache that it reads."""

    @abstractmethod
    def write(
        self, layer_keys: Tensor, layer_values: Tensor, key: Tensor, value: Tensor, layout: StepLayout
    ) -> None:
        """Stores the step's keys and values.

        Args:
            layer_keys: [blocks, block_size, key_heads, key_dim], the layer's part of the cache
            layer_values: [blocks, block_size, key_heads, value_dim]
            key: [T, key_heads, key_dim]; any strides
            value: [T, key_heads, value_dim]
        """

    @abstractmethod
    def attend(
        self, layer_keys: Tensor, layer_values: Tensor, query: Tensor, layout: StepLayout, formula: Formula
    ) -> Tensor:
        """After `write`.

        Args:
            query: [T, heads, key_dim]; any strides. `heads` is a multiple of `key_heads`

        Returns:
            [T, heads, value_dim]
        """


class StaticBackend(AttentionBackend):
    """One whose decoding can be recorded into a CUDA graph."""

    most_blocks: int | None
    """Rows times the width of the block tables at most, if it reads all of the tables; None: it reads no
    further than the lengths."""

    @abstractmethod
    def decode(
        self, layer_keys: Tensor, layer_values: Tensor, query: Tensor, layout: StepLayout, formula: Formula
    ) -> Tensor:
        """As `attend`, for sequences of one row each. What is in the layout's tensors may change between
        recording and replay, so nothing but their shapes is looked at on the host."""
