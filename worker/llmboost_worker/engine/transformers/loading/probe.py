"""What each layer of a model asks of its attention, found by a forward of one token.

transformers lets a model's attention be replaced by name, and the masks that go with it. The probe replaces
both: layers hand over shapes and parameters, and, in place of a mask, the function of two positions from
which one would be made. That function can be asked about any position, so that a window of 4,096 tokens is
checked without computing 4,096 tokens.
"""

import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from llmboost_worker.engine.transformers.cache import LayerShape

NAME = "llmboost_probe"
"""As an attention implementation of transformers."""

MaskFunction = Callable[[int, int, Tensor, Tensor], Tensor]
"""Of batch, head, the positions of queries and of keys: which keys are seen."""


@dataclass(frozen=True, slots=True)
class LayerCall:
    """What a layer handed to its attention function."""

    module: nn.Module
    layer: int
    heads: int
    """Of the queries."""
    shape: LayerShape
    scale: float
    keywords: dict[str, Any] = field(default_factory=dict)
    """What else it passed, as far as it isn't None: `sliding_window`, `softcap`, ..."""
    mask: MaskFunction | None = None
    """Of the mask that it would have been given."""
    makes_mask: bool = False
    """It passed a mask that isn't one of transformers'."""


class _Recorder(threading.local):
    """Of the forward under way in this thread."""

    calls: list[LayerCall]
    masks: list[tuple[Tensor, MaskFunction]]


_recorder = _Recorder()


def record(model: Any) -> list[LayerCall]:
    """The calls of all layers in the order of the forward; the model's attention is left replaced.

    Raises whatever the model's forward raises.
    """
    _recorder.calls, _recorder.masks = [], []
    one = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    model.set_attn_implementation(NAME)
    try:
        model(input_ids=one, position_ids=one, use_cache=False)
        return _recorder.calls
    finally:
        del _recorder.calls, _recorder.masks


def visible(mask: MaskFunction, position: int, length: int) -> Tensor:
    """[length] of bool: the keys that the token at `position` sees."""
    keys = torch.arange(length)
    return mask(0, 0, torch.full_like(keys, position), keys).expand(length)


def eager(module: nn.Module) -> Callable[..., tuple[Tensor, Any]] | None:
    """The plain attention function that stands beside a layer's class in transformers, if there is one."""
    return getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **keywords: Any,
) -> tuple[Tensor, None]:
    """Of one token: its own value. Takes [1, heads, 1, dim], returns [1, 1, heads, value_dim]."""
    layer: int = module.layer_idx  # type: ignore[assignment]
    mask = next((function for tensor, function in _recorder.masks if tensor is attention_mask), None)
    _recorder.calls.append(
        LayerCall(
            module,
            layer,
            query.shape[1],
            LayerShape(heads=key.shape[1], key_dim=key.shape[3], value_dim=value.shape[3]),
            query.shape[-1] ** -0.5 if scaling is None else scaling,
            {name: given for name, given in keywords.items() if given is not None},
            mask,
            makes_mask=attention_mask is not None and mask is None,
        )
    )
    return value.repeat_interleave(query.shape[1] // value.shape[1], 1).transpose(1, 2).contiguous(), None


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: MaskFunction,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    **_: Any,
) -> Tensor:
    """Stands for a mask in the layers' calls."""
    mark = torch.zeros(batch_size, 1, q_length, kv_length, dtype=dtype, device=device)
    _recorder.masks.append((mark, mask_function))
    return mark


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)
