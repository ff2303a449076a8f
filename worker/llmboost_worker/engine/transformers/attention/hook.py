"""Attention over the blocks of many sequences, inside a model that thinks it sees one row of tokens.

A step packs its tokens into `input_ids [1, T]`: sequences with one token first, prefill chunks after them.
Everything in a transformer but attention works token by token, so the model's own forward runs unmodified,
and its attention layers call `block_attention` (registered through transformers' `AttentionInterface`), which
hands their rows to the backend.

Registering no mask function under the same name keeps transformers from building T x T masks
(`masking_utils._preprocess_mask_arguments`); models then pass None and say `sliding_window` in a keyword.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface

from llmboost_worker.engine.transformers.attention.backend import AttentionBackend, Formula, StaticBackend
from llmboost_worker.engine.transformers.attention.layout import StepLayout
from llmboost_worker.engine.transformers.cache import KeyValueCache

NAME = "llmboost_blocks"
"""As an attention implementation of transformers."""


@dataclass(frozen=True, slots=True)
class Step:
    """What the rows of a forward attend to."""

    layout: StepLayout
    cache: KeyValueCache
    backend: AttentionBackend

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, formula: Formula) -> Tensor:
        """[T, heads, dim] of the step's rows -> [T, heads, value_dim]"""
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        self.backend.write(keys, values, key, value, self.layout)
        if self.layout.is_static:
            assert isinstance(self.backend, StaticBackend)
            return self.backend.decode(keys, values, query, self.layout, formula)
        return self.backend.attend(keys, values, query, self.layout, formula)


class _Current(threading.local):
    """What the forward under way in this thread attends to. Not every model passes keywords on to its
    layers."""

    step: Step | None = None


_current = _Current()


@contextmanager
def attending(step: Step) -> Iterator[None]:
    """The forward inside attends to this step, whose rows are the packed tokens in order."""
    _current.step = step
    try:
        yield
    finally:
        _current.step = None


def asked(
    key_dim: int,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> Formula:
    """The formula that a layer asks for by the keywords that it gives its attention function.

    Args:
        s_aux: [heads], sinks
    """
    return Formula(key_dim**-0.5 if scaling is None else scaling, softcap, sliding_window, s_aux)


def block_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **keywords: Any,
) -> tuple[Tensor, None]:
    """The attention function of transformers' interface.

    Args:
        query: [1, heads, T, key_dim]
        key: [1, key_heads, T, key_dim]
        value: [1, key_heads, T, value_dim]
        keywords: of `asked`

    Returns:
        [1, T, heads, value_dim], and no weights.
    """
    layer: int = module.layer_idx  # type: ignore[assignment]
    if attention_mask is not None:
        raise NotImplementedError(f"{type(module).__name__} builds an attention mask of its own")
    formula = asked(query.shape[-1], scaling, **keywords)
    step = _current.step
    if step is None:
        raise RuntimeError("block attention outside of a step")
    # [1, heads, T, dim] -> [T, heads, dim]
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    return step.attend(layer, query, key, value, formula)[None], None


AttentionInterface.register(NAME, block_attention)
