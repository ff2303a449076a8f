"""What a model's layers see is found out for all positions, and has to be what they ask for."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    Gemma3TextModel,
    LlamaConfig,
    MistralConfig,
    PhimoeConfig,
    PreTrainedConfig,
    masking_utils,
)
from transformers.models.gemma3 import modeling_gemma3
from transformers.models.mistral import modeling_mistral

from llmboost_worker.engine.interface import EngineError
from llmboost_worker.engine.transformers.loading import architecture, probe
from tests.unit.engine_configs import COMMON, FAMILIES, LOCAL

LONG = 100_000
"""Positions; no forward is as long."""


def model(config: PreTrainedConfig) -> Any:
    return AutoModelForCausalLM.from_config(config).eval()


def check(config: PreTrainedConfig, max_model_len: int = LONG) -> None:
    architecture.layers_of(config.model_type, model(config), config, max_model_len)


def windows(config: PreTrainedConfig) -> list[int]:
    """By the masks: how many tokens the last of `LONG` sees, per layer."""
    calls = probe.record(model(config))
    return [int(probe.visible(call.mask, LONG - 1, LONG).sum()) for call in calls if call.mask]


def test_a_window_is_found_however_wide_it_is() -> None:
    config = Gemma3TextConfig(**COMMON, head_dim=16, sliding_window=4096, layer_types=LOCAL)
    assert windows(config) == [4096, LONG, 4096]
    check(config)


def test_the_shapes_are_those_of_each_layer() -> None:
    config = FAMILIES["gemma4"]
    shapes = architecture.layers_of("gemma4", model(config), config, LONG)
    assert [shape.key_dim for shape in shapes] == [16, 32, 16, 32]
    config = FAMILIES["deepseek-v3"]
    shapes = architecture.layers_of("deepseek_v3", model(config), config, LONG)
    assert {(shape.heads, shape.key_dim, shape.value_dim) for shape in shapes} == {(4, 24, 16)}


@pytest.mark.parametrize("length", [4096, 4097, LONG])
def test_a_layer_that_counts_on_a_mask_for_its_window_is_refused(length: int) -> None:
    """phimoe doesn't tell its attention. That is no matter where the window is as long as the context."""
    config = PhimoeConfig(**COMMON, sliding_window=4096, num_local_experts=2)
    if length == 4096:
        check(config, length)
        return
    with pytest.raises(EngineError, match=r"layer 0 has a window of 4096.*of None by what it asks.*of 4096"):
        check(config, length)


def test_a_window_that_the_attention_is_not_told_of_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    attend = probe._attention

    def without(*arguments: Any, sliding_window: int | None = None, **options: Any) -> Any:
        return attend(*arguments, **options)

    monkeypatch.setitem(probe.AttentionInterface._global_mapping, probe.NAME, without)
    with pytest.raises(EngineError, match=r"of 50 by its configuration, of None"):
        check(MistralConfig(**COMMON, sliding_window=50))


def test_a_mask_that_differs_from_the_window_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        modeling_mistral, "create_sliding_window_causal_mask", masking_utils.create_causal_mask
    )
    with pytest.raises(EngineError, match=r"of 50 by its configuration, of 50.*of None by its mask"):
        check(MistralConfig(**COMMON, sliding_window=50))


@pytest.mark.parametrize(
    "extra",
    [
        lambda batch, head, query, key: key == query + 1,
        lambda batch, head, query, key: (key < 4) & (query < 4),
        lambda batch, head, query, key: key < 8,  # attention sinks of tokens, beyond every window
    ],
    ids=["ahead", "a prefix both ways", "the first tokens always"],
)
def test_a_mask_that_is_no_window_is_refused(
    extra: Callable[..., torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    create = masking_utils.create_sliding_window_causal_mask

    def overlaid(*arguments: Any, **options: Any) -> Any:
        return create(*arguments, **{**options, "or_mask_function": extra})

    monkeypatch.setattr(modeling_gemma3, "create_sliding_window_causal_mask", overlaid)
    config = Gemma3TextConfig(**COMMON, head_dim=16, sliding_window=50, layer_types=LOCAL)
    with pytest.raises(EngineError, match=r"'gemma3_text'.*layer 0 sees are no window"):
        check(config)


def test_a_mask_of_the_models_own_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = Gemma3TextModel.forward

    def own(self: Any, *arguments: Any, **options: Any) -> Any:
        options["attention_mask"] = dict.fromkeys(set(LOCAL), torch.zeros(1, 1, 1, 1))
        return forward(self, *arguments, **options)

    monkeypatch.setattr(Gemma3TextModel, "forward", own)
    config = Gemma3TextConfig(**COMMON, head_dim=16, sliding_window=50, layer_types=LOCAL)
    with pytest.raises(EngineError, match=r"Gemma3Attention builds an attention mask of its own"):
        check(config)


def test_a_layer_that_does_not_attend_once_is_refused() -> None:
    config = LlamaConfig(**COMMON)
    calls = probe.record(model(config))
    calls[1] = calls[0]
    with pytest.raises(EngineError, match=r"of its 3 layers, these attend: \[0, 0, 2\]"):
        architecture.check_calls("llama", config, calls, LONG)


def test_attention_that_looks_ahead_is_refused(tmp_path: Path) -> None:
    """EmbeddingGemma's, for one."""
    config = Gemma3TextConfig(**COMMON, head_dim=16, layer_types=LOCAL, use_bidirectional_attention=True)
    with pytest.raises(EngineError, match=r"Gemma3Attention isn't causal"):
        check(config)
