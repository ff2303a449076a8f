"""Attention on GPUs, as far as it can be tested without one: which is chosen, and what it is given."""

from typing import Any

import pytest
import torch
from torch import Tensor

from llmboost_worker.engine.interface import EngineError
from llmboost_worker.engine.transformers.attention import backends
from llmboost_worker.engine.transformers.attention.backend import AttentionBackend, Formula, StaticBackend
from llmboost_worker.engine.transformers.attention.backends import Machine
from llmboost_worker.engine.transformers.attention.flash_backend import FlashBackend
from llmboost_worker.engine.transformers.attention.flex_backend import FlexBackend
from llmboost_worker.engine.transformers.attention.torch_backend import TorchBackend
from llmboost_worker.engine.transformers.cache import LayerShape
from tests.unit.attention_steps import CHUNKS, FORMULAS, HEADS, KEY_HEADS, Numbers, numbers

HALF, FULL = torch.bfloat16, torch.float32
COMMON, LATENT, TINY = LayerShape(2, 128, 128), LayerShape(4, 192, 128), LayerShape(1, 8, 8)
HOPPER = Machine("cuda", (9, 0), has_flash=True, has_triton=True)
BARE = Machine("cuda", (9, 0), has_triton=True)
TURING = Machine("cuda", (7, 5), has_flash=True, has_triton=True)


@pytest.mark.parametrize(
    ("machine", "dtype", "shape", "names"),
    [
        (HOPPER, HALF, COMMON, ["flash_attn", "flex", "sdpa"]),
        (HOPPER, torch.float16, COMMON, ["flash_attn", "flex", "sdpa"]),
        (HOPPER, FULL, COMMON, ["flex", "sdpa"]),
        (HOPPER, HALF, LATENT, ["flex", "sdpa"]),
        (HOPPER, HALF, TINY, ["flash_attn", "sdpa"]),
        (BARE, HALF, COMMON, ["flex", "sdpa"]),
        (Machine("cuda", (9, 0)), HALF, COMMON, ["sdpa"]),
        (TURING, HALF, COMMON, ["sdpa"]),
        (Machine("cpu"), FULL, COMMON, ["sdpa"]),
    ],
)
def test_the_quickest_that_can_be_had_comes_first(
    machine: Machine, dtype: torch.dtype, shape: LayerShape, names: list[str]
) -> None:
    assert backends.candidates("auto", machine, dtype, [COMMON, shape]) == names


@pytest.mark.parametrize(
    ("asked", "machine", "dtype", "shape", "reason"),
    [
        ("flash_attn", Machine("cpu"), HALF, COMMON, "the device is cpu"),
        ("flash_attn", BARE, HALF, COMMON, "flash-attn isn't installed"),
        ("flash_attn", TURING, HALF, COMMON, "compute capability is 7.5"),
        ("flash_attn", HOPPER, FULL, COMMON, "the model is in float32"),
        ("flash_attn", HOPPER, HALF, LATENT, "keys of 192 and values of 128"),
        ("flash_attn", HOPPER, HALF, LayerShape(1, 512, 512), "keys of 512"),
        ("flex", Machine("cpu"), HALF, COMMON, "the device is cpu"),
        ("flex", Machine("cuda", (9, 0)), HALF, COMMON, "triton isn't installed"),
        ("flex", TURING, HALF, COMMON, "compute capability is 7.5"),
        ("flex", HOPPER, HALF, TINY, "less than 16"),
    ],
)
def test_what_cannot_be_had_is_refused_with_the_reason(
    asked: Any, machine: Machine, dtype: torch.dtype, shape: LayerShape, reason: str
) -> None:
    with pytest.raises(EngineError, match=f"--attention-backend is {asked}, but .*{reason}.*use auto"):
        backends.candidates(asked, machine, dtype, [shape])


def test_what_is_asked_for_and_can_be_had_is_all_there_is() -> None:
    for name in ("flash_attn", "flex", "sdpa"):
        assert backends.candidates(name, HOPPER, HALF, [COMMON]) == [name]  # type: ignore[arg-type]


class Flash:
    """Stands for the flash-attn package: its conditions, by its documentation and its C++ checks, and its
    results by the plain formula."""

    def flash_attn_with_kvcache(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        *,
        cache_seqlens: Tensor,
        block_table: Tensor,
        softmax_scale: float,
        causal: bool,
        window_size: tuple[int, int],
        softcap: float,
    ) -> Tensor:
        assert q.shape[1:] == (1, HEADS, k_cache.shape[3])
        starts = torch.arange(len(q) + 1, dtype=torch.int32)
        return self._attend(
            q[:, 0],
            k_cache,
            v_cache,
            starts,
            cache_seqlens,
            block_table,
            softmax_scale,
            causal,
            window_size,
            softcap,
        )[:, None]

    def flash_attn_varlen_func(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        softmax_scale: float,
        causal: bool,
        window_size: tuple[int, int],
        softcap: float,
        block_table: Tensor,
    ) -> Tensor:
        lengths = cu_seqlens_k.diff()
        assert cu_seqlens_k.dtype == torch.int32
        assert (int(cu_seqlens_q[0]), int(cu_seqlens_k[0]), int(cu_seqlens_q[-1])) == (0, 0, len(q))
        assert (max_seqlen_q, max_seqlen_k) == (int(cu_seqlens_q.diff().max()), int(lengths.max()))
        return self._attend(
            q, k, v, cu_seqlens_q, lengths, block_table, softmax_scale, causal, window_size, softcap
        )

    def _attend(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        starts: Tensor,
        lengths: Tensor,
        tables: Tensor,
        scale: float,
        causal: bool,
        window: tuple[int, int],
        softcap: float,
    ) -> Tensor:
        assert query.dtype == keys.dtype == values.dtype
        assert query.dtype in (torch.float16, torch.bfloat16)
        assert keys.shape == values.shape
        assert keys.shape[1] % 256 == 0, "Paged KV cache block size must be divisible by 256"
        assert query.stride(-1) == keys.stride(-1) == 1
        assert starts.dtype == lengths.dtype == tables.dtype == torch.int32
        assert (len(starts) - 1, len(lengths)) == (len(tables), len(tables))
        assert tables.stride(-1) == 1
        assert causal
        out = torch.empty_like(query)
        for i in range(len(tables)):
            rows, length = slice(int(starts[i]), int(starts[i + 1])), int(lengths[i])
            key, value = (
                tensor[tables[i].long()]
                .flatten(0, 1)[:length]
                .float()
                .repeat_interleave(HEADS // KEY_HEADS, 1)
                for tensor in (keys, values)
            )
            scores = torch.einsum("qhd,khd->hqk", query[rows].float(), key) * scale
            if softcap:
                scores = torch.tanh(scores / softcap) * softcap
            # Aligned at the end: the last row sees the last key.
            position = torch.arange(length - (rows.stop - rows.start), length)[:, None]
            hidden = torch.arange(length) > position + max(window[1], 0)
            if window[0] >= 0:
                hidden |= torch.arange(length) < position - window[0]
            weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
            out[rows] = torch.einsum("hqk,khd->qhd", weights, value).to(out.dtype)
        return out


def expected(step: Numbers, formula: Formula) -> Tensor:
    """By torch's operations, in single precision."""
    tensors = (step.keys.float(), step.values.float(), step.query.float())
    out = TorchBackend().attend(*tensors, step.layout, formula)
    step.layout.plans.clear()
    return out


def check(
    backend: AttentionBackend, chunks: list[tuple[int, int]], formula: Formula, dtype: torch.dtype
) -> None:
    """Twice: what was worked out for the first layer serves the next."""
    step = numbers(chunks, backend.block_size, dtype)
    right = expected(step, formula)
    for _ in range(2):
        out = backend.attend(step.keys, step.values, step.query, step.layout, formula)
        assert out.dtype == dtype
        torch.testing.assert_close(out.float(), right, rtol=2e-2, atol=2e-2 if dtype == HALF else 1e-4)


@pytest.mark.parametrize("formula", FORMULAS.values(), ids=FORMULAS)
@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
def test_flash_attention_is_given_what_it_takes(chunks: list[tuple[int, int]], formula: Formula) -> None:
    check(FlashBackend(Flash()), chunks, formula, HALF)


@pytest.mark.parametrize("formula", FORMULAS.values(), ids=FORMULAS)
@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
def test_flex_attention_sees_what_each_row_sees(chunks: list[tuple[int, int]], formula: Formula) -> None:
    """Uncompiled, as torch runs it on a CPU."""
    check(FlexBackend(), chunks, formula, FULL)


@pytest.mark.parametrize("formula", FORMULAS.values(), ids=FORMULAS)
@pytest.mark.parametrize(
    ("backend", "dtype"), [(TorchBackend(), FULL), (FlashBackend(Flash()), HALF)], ids=["torch", "flash"]
)
def test_decoding_that_is_recorded_looks_at_tensors_alone(
    backend: StaticBackend, dtype: torch.dtype, formula: Formula
) -> None:
    """Tables may be wider than they need be, and what stands on the host isn't true any more."""
    step = numbers(CHUNKS["rows"], backend.block_size, dtype)
    right = expected(step, formula)
    layout = step.layout
    layout.block_tables = torch.nn.functional.pad(layout.block_tables, (0, 5))
    layout.rows = layout.ends = layout.tables = layout.query_starts = None  # type: ignore[assignment]
    out = backend.decode(step.keys, step.values, step.query, layout, formula)
    torch.testing.assert_close(out.float(), right, rtol=2e-2, atol=2e-2 if dtype == HALF else 1e-4)
