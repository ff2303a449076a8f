"""A model that is computed wrongly is refused at load, whatever it is that went wrong."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma2Config, GptOssConfig, GraniteConfig, MistralConfig, PreTrainedConfig
from transformers.models.llama import modeling_llama

from llmboost_worker.engine.interface import EngineError
from llmboost_worker.engine.transformers import EngineConfig, TransformersEngine, fused, runner
from llmboost_worker.engine.transformers.attention import hook
from llmboost_worker.engine.transformers.attention.backend import Formula
from llmboost_worker.engine.transformers.attention.layout import StepLayout
from llmboost_worker.engine.transformers.loading import selftest
from tests.unit.engine_configs import COMMON, CONFIGS, LOCAL
from tests.unit.engine_models import save_model

WIDE: dict[str, PreTrainedConfig] = {
    "llama": CONFIGS["llama"],
    "gpt2": CONFIGS["gpt2"],
    "mistral": MistralConfig(**COMMON, sliding_window=256),
    "gemma2": Gemma2Config(**COMMON, head_dim=16, sliding_window=256, query_pre_attn_scalar=16),
    "granite": GraniteConfig(**COMMON, attention_multiplier=0.2),
    "gpt-oss": GptOssConfig(
        **COMMON,
        head_dim=16,
        num_local_experts=2,
        num_experts_per_tok=1,
        sliding_window=256,
        layer_types=LOCAL,
    ),
}
"""Windows and softcaps (Gemma 2's own is 50) that the self-test's few tokens never come near."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        name: save_model(config, tmp_path_factory.mktemp(name), spread=0.1) for name, config in WIDE.items()
    }


def start(folder: Path, dtype: str = "float32") -> None:
    engine = TransformersEngine(
        EngineConfig(model=str(folder), threads=1, kv_cache_memory=0.01, dtype=dtype)  # type: ignore[arg-type]
    )
    try:
        engine.start(lambda outputs: None, lambda error: None)
    finally:
        engine.close()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", WIDE)
def test_a_sound_model_passes(folders: dict[str, Path], name: str, dtype: str) -> None:
    start(folders[name], dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("mistral", {"window": None}),
        ("gemma2", {"window": None}),
        ("gemma2", {"softcap": None}),
        ("gemma2", {"softcap": 30.0}),
        ("granite", {"scale": 0.25}),
        ("gpt-oss", {"sinks": None}),
        ("gpt-oss", {"window": None}),
    ],
    ids=lambda value: (
        "-".join(f"{key} {given}" for key, given in value.items()) if isinstance(value, dict) else value
    ),
)
def test_a_formula_that_is_not_the_layers_is_refused(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, name: str, wrong: dict[str, Any], dtype: str
) -> None:
    for module in (hook, fused):
        monkeypatch.setattr(module, "Formula", lambda *given: replace(Formula(*given), **wrong))
    with pytest.raises(EngineError, match=r"gives other"):
        start(folders[name], dtype)


def off_by_one(given: Formula) -> Formula:
    return replace(given, window=given.window + 1) if given.window else given


def a_little_warm(given: Formula) -> Formula:
    return replace(given, scale=given.scale * 1.02)


@pytest.mark.parametrize(("name", "wrong"), [("mistral", off_by_one), ("llama", a_little_warm)])
def test_a_formula_that_is_a_little_off_is_refused(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, name: str, wrong: Callable[[Formula], Formula]
) -> None:
    for module in (hook, fused):
        monkeypatch.setattr(module, "Formula", lambda *given: wrong(Formula(*given)))
    with pytest.raises(EngineError, match=f"'{name}'.*gives other"):
        start(folders[name])


def all_later(layout: StepLayout) -> None:
    layout.positions += 1


def decoding_later(layout: StepLayout) -> None:
    layout.positions[: layout.num_single] += 1


def chunks_from_the_start(layout: StepLayout) -> None:
    layout.positions[layout.num_single :] -= layout.positions[layout.num_single].clone()


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("gpt2", all_later),
        ("llama", decoding_later),
        ("gpt2", decoding_later),
        ("llama", chunks_from_the_start),
    ],
)
def test_positions_that_are_off_are_refused(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, name: str, wrong: Callable[[StepLayout], None]
) -> None:
    """Rotated positions tell only distances: all of them one later would be right."""
    forward = runner.ModelRunner.forward

    def off(self: Any, ordered: Any, layout: StepLayout) -> Any:
        wrong(layout)
        return forward(self, ordered, layout)

    monkeypatch.setattr(selftest.ModelRunner, "forward", off)
    with pytest.raises(EngineError, match=f"'{name}'.*gives other"):
        start(folders[name])


@pytest.mark.parametrize("broken", ["ends", "tables", "slots"])
def test_blocks_that_are_not_a_sequences_own_are_noticed(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    """Read at another length, read in another order, written to another place."""
    of = StepLayout.of

    def wrong(*arguments: Any) -> StepLayout:
        layout = of(*arguments)
        if broken == "ends":
            layout.ends = layout.ends - (layout.rows == 1)
            layout.positions[: layout.num_single] -= 1
        elif broken == "tables":
            layout.tables = layout.tables[:, ::-1]
            layout.block_tables = layout.block_tables.flip(1).contiguous()
        else:
            layout.slots = layout.slots.roll(1)
        return layout

    monkeypatch.setattr(StepLayout, "of", wrong)
    with pytest.raises(EngineError, match="gives other"):
        start(folders["llama"])


def test_attention_of_a_models_own_is_noticed(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says nothing of it to whoever replaces its attention."""
    eager = modeling_llama.eager_attention_forward

    def own(module: Any, query: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        out, weights = eager(module, query, *arguments, **options)
        return 30 * torch.tanh(out / 30) * 1.1, weights

    monkeypatch.setattr(modeling_llama, "eager_attention_forward", own)
    with pytest.raises(EngineError, match=r"'llama'.*gives other"):
        start(folders["llama"])
