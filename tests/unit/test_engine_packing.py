"""A model that has been packed for this machine computes what it did before."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from llmboost_worker.engine.interface import EngineError
from llmboost_worker.engine.transformers import EngineConfig, kernels, linear
from llmboost_worker.engine.transformers.attention.compiled_backend import CompiledBackend
from llmboost_worker.engine.transformers.forward import ModelForward
from llmboost_worker.engine.transformers.fused import FusedForward
from llmboost_worker.engine.transformers.kernels.build import BuildError
from llmboost_worker.engine.transformers.loading import loader, packing, selftest
from tests.unit.engine_configs import COMMON, GPT2_COMMON
from tests.unit.engine_models import driving, prompt, request, save_model
from tests.unit.test_engine_greedy import generate

WIDE: dict[str, Any] = {**COMMON, "hidden_size": 128}
FUSED: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**WIDE),
    "llama3": LlamaConfig(
        **WIDE,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    "llama-tied": LlamaConfig(**{**WIDE, "tie_word_embeddings": True}),
    "llama-biases": LlamaConfig(**WIDE, attention_bias=True),
    "mistral": MistralConfig(**WIDE, sliding_window=8),
    "qwen2": Qwen2Config(**WIDE),
    "qwen2-window": Qwen2Config(**WIDE, use_sliding_window=True, sliding_window=9, max_window_layers=1),
    "qwen3": Qwen3Config(**WIDE, head_dim=64),
}
PROMPTS = [prompt(length) for length in (1, 2, 7, 16, 17, 33, 64, 90, 150, 200)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_a_packed_product_is_torchs(dtype: torch.dtype, bias: bool, rows: int) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(96, 64).to(dtype), torch.randn(rows, 64).to(dtype)
    biases = torch.randn(96).to(dtype) if bias else None
    packed = linear.product(weight.clone(), biases)
    expected = torch.nn.functional.linear(x, weight, biases)
    assert torch.allclose(packed(x), expected, rtol=1e-2, atol=1e-5 if dtype == torch.float32 else 2e-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_a_gated_product_is_torchs(dtype: torch.dtype, bias: bool) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(96, 64).to(dtype), torch.randn(40, 64).to(dtype)
    biases = torch.randn(96).to(dtype) if bias else None
    found = kernels.find(weight.device, dtype)
    assert found is not None
    gate, up = torch.nn.functional.linear(x, weight, biases).chunk(2, 1)
    tolerance = 1e-4 if dtype == torch.float32 else 3e-1
    expected = torch.nn.functional.silu(gate) * up
    assert torch.allclose(linear.gated_product(weight, biases, found)(x), expected, rtol=2e-2, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 6, linear.FEW_ROWS, linear.FEW_ROWS + 1])
@pytest.mark.parametrize("outputs", [96, 97])
def test_weights_in_int8_are_off_by_half_a_step_at_most(dtype: torch.dtype, rows: int, outputs: int) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(outputs, 64).to(dtype), torch.randn(rows, 64).to(dtype)
    bias = torch.randn(outputs).to(dtype)
    weight[3] = 0
    out = linear.product(weight, bias, "int8")(x).float()
    step = weight.float().abs().amax(1) / 127
    most = x.float().abs().sum(1)[:, None] * step / 2
    rounding = 0.0 if dtype == torch.float32 else 2.0**-6 * out.abs() + 2.0**-5
    exact = torch.nn.functional.linear(x.float(), weight.float(), bias.float())
    assert ((out - exact).abs() <= most + rounding + 1e-4).all()


@pytest.mark.parametrize("name", FUSED)
def test_fused_layers_give_token_for_token_what_generate_gives(name: str, tmp_path: Path) -> None:
    folder = save_model(FUSED[name], tmp_path)
    with driving(folder, max_num_batched_tokens=48, max_num_seqs=6) as driver:
        results = driver.run(*(request(str(i), ids, max_tokens=12) for i, ids in enumerate(PROMPTS)))
    assert [result.token_ids for result in results] == generate(folder, PROMPTS, 12)


def load(folder: Path, **config: Any) -> loader.LoadedModel:
    return loader.load(EngineConfig(model=str(folder), device="cpu", threads=1, **config))


@pytest.mark.parametrize("name", FUSED)
@torch.inference_mode()
def test_like_models_are_fused_and_the_weights_leave_the_modules(name: str, tmp_path: Path) -> None:
    loaded = load(save_model(FUSED[name], tmp_path))
    assert packing.pack(loaded, "none")
    assert isinstance(loaded.forward, FusedForward)
    assert not loaded.model.model.layers


@torch.inference_mode()
def test_others_are_packed_layer_by_layer(tmp_path: Path) -> None:
    loaded = load(save_model(GPT2Config(**GPT2_COMMON), tmp_path))
    expected = selftest.reference(loaded)
    assert packing.pack(loaded, "none")
    assert isinstance(loaded.forward, ModelForward)
    packed = [module for module in loaded.model.modules() if isinstance(module, linear.PackedLinear)]
    assert len(packed) == 3 * 4 + 1
    selftest.run(loaded, expected, "none")


def test_without_a_compiler_all_is_computed_by_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def missing(dtype: torch.dtype) -> None:
        raise BuildError("there is no C++ compiler")

    monkeypatch.setattr(kernels, "Kernels", missing)
    monkeypatch.setattr(CompiledBackend, "attend", None)
    folder = save_model(FUSED["llama"], tmp_path)
    kernels.find.cache_clear()
    try:
        with driving(folder, max_num_batched_tokens=48, max_num_seqs=6) as driver:
            results = driver.run(*(request(str(i), ids, max_tokens=12) for i, ids in enumerate(PROMPTS)))
    finally:
        kernels.find.cache_clear()
    assert [result.token_ids for result in results] == generate(folder, PROMPTS, 12)
    assert caplog.text.count("there is no C++ compiler") == 1


def test_a_model_that_packing_would_break_is_served_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    call = FusedForward.__call__

    def off(self: FusedForward, *args: Any) -> torch.Tensor:
        return call(self, *args) * 1.1

    monkeypatch.setattr(FusedForward, "__call__", off)
    folder = save_model(FUSED["llama"], tmp_path)
    with driving(folder) as driver:
        result = driver.run_one(request("a", prompt(20), max_tokens=12))
    assert result.token_ids == generate(folder, [prompt(20)], 12)[0]
    assert "served as transformers has it" in caplog.text


@pytest.mark.parametrize("config", [FUSED["llama"], GPT2Config(**GPT2_COMMON)], ids=["llama", "gpt2"])
def test_with_int8_a_resumed_sequence_goes_on_alike(config: PreTrainedConfig, tmp_path: Path) -> None:
    folder = save_model(config, tmp_path)
    with driving(folder, quantization="int8") as driver:
        whole = driver.run_one(request("a", prompt(20), max_tokens=10, temperature=1.0, seed=3))
        rest = driver.run_one(
            request("b", prompt(20), whole.token_ids[:4], max_tokens=10, temperature=1.0, seed=3)
        )
    assert len(whole.token_ids) > 4
    assert rest.token_ids == whole.token_ids[4:]


@pytest.mark.parametrize("quantization", ["none", "int8"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_serves(dtype: str, quantization: str, tmp_path: Path) -> None:
    """What it computes is held against transformers' own by the self-test."""
    folder = save_model(FUSED["qwen3"], tmp_path)
    with driving(folder, dtype=dtype, quantization=quantization) as driver:
        results = driver.run(
            *(request(str(i), ids, max_tokens=8, ignore_eos=True) for i, ids in enumerate(PROMPTS))
        )
        assert driver.info.dtype == dtype
    assert [len(result.token_ids) for result in results] == [8] * len(PROMPTS)


def test_int8_that_loses_too_much_is_refused(tmp_path: Path) -> None:
    """One weight so large that the others of its row become zero."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FUSED["llama"])
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight[:, 0] = 1e3
            layer.mlp.up_proj.weight[0] = 0
    model.save_pretrained(tmp_path)
    with (
        pytest.raises(EngineError, match=r"in int8.*--quantization none"),
        driving(tmp_path, quantization="int8"),
    ):
        pass


def test_a_compiled_file_is_made_once_and_used_by_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = kernels.build.library()
    made = first.stat().st_mtime_ns
    assert kernels.build.library() == first
    assert first.stat().st_mtime_ns == made
    assert [path.name for path in first.parent.iterdir()] == [first.name]


@pytest.mark.parametrize(
    ("compiler", "message"), [("false", "false fails"), ("no-such-compiler", "there is no C\\+\\+ compiler")]
)
def test_what_is_wrong_with_the_compiler_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiler: str, message: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setattr(kernels.build, "COMPILERS", ())
    with pytest.raises(BuildError, match=message):
        kernels.build.library()
