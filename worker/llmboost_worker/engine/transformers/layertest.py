"""Before a model is served: the attention of each kind of layer, on numbers that make its formula matter.

The logits of a few tokens don't tell whether a softcap of 50 was applied to scores of 5, or a window of 4,096
to 20 tokens. So each layer's attention is given scores near its softcap, and a window of a few tokens if it
has one, through transformers' own function and through the engine's.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from llmboost_worker.engine.transformers import probe
from llmboost_worker.engine.transformers.attention import Step, attending, block_attention
from llmboost_worker.engine.transformers.blocks import BLOCK_SIZE, NOBODYS, BlockTable
from llmboost_worker.engine.transformers.cache import KeyValueCache
from llmboost_worker.engine.transformers.layout import StepLayout
from llmboost_worker.engine.transformers.loader import LoadedModel
from llmboost_worker.engine.transformers.probe import LayerCall

CHUNKS = (BLOCK_SIZE + 2, 1, 3)
"""Rows of a sequence that are attended in one step each: a chunk, a decode row, a chunk that continues."""
WINDOW = 5
SPREAD = 2.0
"""Of the scores: no token takes all of the attention."""
LEVEL = 10.0
"""Of the scores, where the layer names no softcap that would matter to them."""


@dataclass(slots=True)
class _Chunk:
    """As a layout wants a sequence."""

    num_cached: int
    num_scheduled: int
    table: BlockTable = field(default_factory=BlockTable)


def compare(loaded: LoadedModel) -> Iterator[tuple[LayerCall, Tensor, Tensor]]:
    """For one layer of each kind, what the engine's attention and transformers' make of the same numbers.
    The model's attention is left replaced.

    Returns:
        the layer's call, and twice [rows, heads, value_dim]
    """
    done = set()
    for call in probe.record(loaded.model):
        plain = {name: given for name, given in call.keywords.items() if isinstance(given, int | float | str)}
        kind = (type(call.module), call.heads, call.shape, call.scale, *plain.items(), *call.keywords)
        eager = probe.eager(call.module)
        if eager is None or kind in done:
            continue
        done.add(kind)
        keywords = dict(call.keywords)
        if "sliding_window" in keywords:
            keywords["sliding_window"] = WINDOW
        for level in (0.0, float(plain.get("softcap", LEVEL))):
            rows = _rows(call, level, loaded)
            mask = _mask(keywords.get("sliding_window"), loaded)
            # In single precision, so that only the engine's rounding counts.
            query, key, value = (tensor.float() for tensor in rows)
            expected, _ = eager(
                call.module, query, key, value, mask, scaling=call.scale, dropout=0.0, **keywords
            )
            yield call, _engines(loaded, call, rows, keywords), expected[0]


def _rows(call: LayerCall, level: float, loaded: LoadedModel) -> tuple[Tensor, Tensor, Tensor]:
    """query [1, heads, rows, key_dim], key and value [1, key_heads, rows, ...], whose scores are
    `level` on average and spread by `SPREAD`."""
    generator = torch.Generator().manual_seed(0)
    shape, rows = call.shape, sum(CHUNKS)

    def normal(heads: int, dim: int) -> Tensor:
        return torch.randn(1, heads, rows, dim, generator=generator)

    query, key = normal(call.heads, shape.key_dim), normal(shape.heads, shape.key_dim)
    query *= SPREAD / (call.scale * shape.key_dim**0.5)
    # The first dimension is the same in all rows, and makes the level.
    query[..., 0] = key[..., 0] = (level / call.scale) ** 0.5
    tensors = (query, key, normal(shape.heads, shape.value_dim))
    return tuple(tensor.to(loaded.device, loaded.dtype) for tensor in tensors)  # type: ignore[return-value]


def _mask(window: int | None, loaded: LoadedModel) -> Tensor:
    """[1, 1, rows, rows], to add to the scores."""
    rows = sum(CHUNKS)
    seen = torch.ones(rows, rows, dtype=torch.bool).tril()
    if window is not None:
        seen = seen.triu(1 - window)
    mask = torch.zeros(rows, rows).masked_fill_(~seen, torch.finfo(torch.float32).min)
    return mask[None, None].to(loaded.device)


def _engines(
    loaded: LoadedModel, call: LayerCall, rows: tuple[Tensor, Tensor, Tensor], keywords: dict[str, Any]
) -> Tensor:
    """[rows, heads, value_dim]"""
    num_blocks = -(-sum(CHUNKS) // BLOCK_SIZE)
    cache = KeyValueCache(loaded.layers, NOBODYS + 1 + num_blocks, BLOCK_SIZE, loaded.dtype, loaded.device)
    parts, start = [], 0
    for size in CHUNKS:
        chunk = _Chunk(start, size)
        chunk.table.blocks.extend(range(NOBODYS + 1, NOBODYS + 1 + num_blocks))
        layout = StepLayout.of([chunk], BLOCK_SIZE, loaded.device)
        with attending(Step(layout, cache, loaded.backend)):
            query, key, value = (tensor[:, :, start : start + size] for tensor in rows)
            out, _ = block_attention(call.module, query, key, value, None, scaling=call.scale, **keywords)
        parts.append(out[0])
        start += size
    return torch.cat(parts)
