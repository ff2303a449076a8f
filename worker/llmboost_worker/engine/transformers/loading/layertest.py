"""The attention of each kind of layer, on numbers that make its formula matter.

The logits of a few tokens don't tell whether a softcap of 50 was applied to scores of 5, or a window of 4,096
to 20 tokens. So each layer's attention is given scores near its softcap, and a window of a few tokens if it
has one, through transformers' own function and through the engine's.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from llmboost_worker.engine.transformers.attention.backend import Formula
from llmboost_worker.engine.transformers.attention.hook import asked
from llmboost_worker.engine.transformers.attention.layout import StepLayout
from llmboost_worker.engine.transformers.blocks import BLOCK_SIZE, NOBODYS, BlockTable
from llmboost_worker.engine.transformers.cache import KeyValueCache
from llmboost_worker.engine.transformers.loading import probe
from llmboost_worker.engine.transformers.loading.loader import LoadedModel
from llmboost_worker.engine.transformers.loading.probe import LayerCall

CHUNKS = (BLOCK_SIZE + 2, 1, 3)
"""Rows of a sequence that are attended in one step each: a chunk, a decode row, a chunk that continues."""
WINDOW = 5
SPREAD = 2.0
"""Of the scores: no token takes all of the attention."""
LEVEL = 10.0
"""Of the scores, where the layer names no softcap that would matter to them."""


@dataclass(frozen=True, slots=True)
class Case:
    """What transformers makes of some rows in one layer."""

    layer: int
    window: int | None
    """Of the layer; not of `expected`, where it is `WINDOW`."""
    formula: Formula
    """What the engine takes the layer's wishes for."""
    query: Tensor
    """[1, heads, rows, key_dim]"""
    key: Tensor
    """[1, key_heads, rows, key_dim]"""
    value: Tensor
    """[1, key_heads, rows, value_dim]"""
    expected: Tensor
    """[rows, heads, value_dim], float32"""


@dataclass(slots=True)
class _Chunk:
    """As a layout wants a sequence."""

    num_cached: int
    num_scheduled: int
    table: BlockTable = field(default_factory=BlockTable)


def cases(loaded: LoadedModel) -> Iterator[Case]:
    """Of one layer of each kind. The model's attention is left replaced."""
    done = set()
    for call in probe.record(loaded.model):
        formula = asked(call.shape.key_dim, scaling=call.scale, **call.keywords)
        window, softcap = call.keywords.get("sliding_window"), call.keywords.get("softcap")
        kind = (type(call.module), call.heads, call.shape, call.scale, window, softcap, *call.keywords)
        eager = probe.eager(call.module)
        if eager is None or kind in done:
            continue
        done.add(kind)
        for level in (0.0, softcap or LEVEL):
            rows = _rows(call, level, loaded)
            # In single precision, so that only the engine's rounding counts.
            expected, _ = eager(
                call.module,
                *(tensor.float() for tensor in rows),
                _mask(window is not None, loaded.device),
                scaling=call.scale,
                dropout=0.0,
                **call.keywords,
            )
            yield Case(call.layer, window, formula, *rows, expected[0])


def attended(loaded: LoadedModel, case: Case) -> Tensor:
    """[rows, heads, value_dim]: what the engine makes of it."""
    backend, formula = loaded.forward.backend, loaded.forward.formula(case.layer, case.formula)
    if formula.window is not None:
        formula = replace(formula, window=WINDOW + formula.window - (case.window or formula.window))
    num_blocks, size = -(-sum(CHUNKS) // backend.block_size), backend.block_size
    cache = KeyValueCache(
        [loaded.layers[case.layer]], NOBODYS + 1 + num_blocks, size, loaded.dtype, loaded.device
    )
    keys, values = cache.keys[0], cache.values[0]
    parts, start = [], 0
    for rows in CHUNKS:
        chunk = _Chunk(start, rows)
        chunk.table.blocks.extend(range(NOBODYS + 1, NOBODYS + 1 + num_blocks))
        layout = StepLayout.of([chunk], size, loaded.device)
        query, key, value = (
            tensor[0, :, start : start + rows].transpose(0, 1)
            for tensor in (case.query, case.key, case.value)
        )
        backend.write(keys, values, key, value, layout)
        parts.append(backend.attend(keys, values, query, layout, formula))
        start += rows
    return torch.cat(parts)


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
    value = normal(shape.heads, shape.value_dim)
    query, key, value = (tensor.to(loaded.device, loaded.dtype) for tensor in (query, key, value))
    return query, key, value


def _mask(has_window: bool, device: torch.device) -> Tensor:
    """[1, 1, rows, rows], to add to the scores; with the test's window if the layer has any."""
    rows = sum(CHUNKS)
    seen = torch.ones(rows, rows, dtype=torch.bool, device=device).tril()
    if has_window:
        seen = seen.triu(1 - WINDOW)
    return torch.zeros(1, 1, rows, rows, device=device).masked_fill_(~seen, torch.finfo(torch.float32).min)
