"""What is loaded and what is refused, with which words."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BloomConfig,
    FalconConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    Qwen3NextConfig,
    RwkvConfig,
    T5Config,
    ViTConfig,
)

from llmboost.settings import WorkerSettings
from llmboost_worker.engine.interface import EngineError, EngineInfo
from llmboost_worker.engine.transformers import EngineConfig, TransformersEngine
from llmboost_worker.engine.transformers.loading import architecture
from llmboost_worker.engine.transformers.runner import ModelRunner
from llmboost_worker.models import load_model
from tests.unit.engine_configs import COMMON, CONFIGS, EOS
from tests.unit.engine_models import driving, prompt, request, save_model

CAUSAL_LM = {"vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(CONFIGS["llama"], tmp_path_factory.mktemp("llama"))


@pytest.fixture
def copy(llama: Path, tmp_path: Path) -> Path:
    return shutil.copytree(llama, tmp_path / "copy")


def start(folder: Path | str, **options: Any) -> EngineInfo:
    options = {"threads": 1, "kv_cache_memory": 0.1, **options}
    engine = TransformersEngine(EngineConfig(model=str(folder), **options))
    try:
        return engine.start(lambda outputs: None, lambda error: None)
    finally:
        engine.close()


def change(folder: Path, file: str = "config.json", **values: Any) -> Path:
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return folder


def test_info_tells_what_was_loaded(llama: Path) -> None:
    assert start(llama, max_num_seqs=7) == EngineInfo(
        max_model_len=512,
        vocab_size=300,
        max_num_seqs=7,
        eos_token_ids=(EOS,),
        engine="transformers",
        dtype="float32",
        device="cpu",
    )


def test_a_given_context_bounds_the_models(llama: Path) -> None:
    with driving(llama, max_model_len=40) as driver:
        assert driver.info.max_model_len == 40
        fits, too_long = driver.run(
            request("fits", prompt(30), max_tokens=10, ignore_eos=True),
            request("long", prompt(31), max_tokens=10),
        )
    assert (len(fits.token_ids), fits.finish_reason) == (10, "length")
    assert "context of 40" in (too_long.error or "")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_serves_and_passes_its_self_test(llama: Path, dtype: str) -> None:
    with driving(llama, dtype=dtype) as driver:
        assert driver.info.dtype == dtype
        assert len(driver.run_one(request("a", prompt(20), max_tokens=5, ignore_eos=True)).token_ids) == 5


def test_several_ends_of_sequence_come_from_the_generation_config(copy: Path) -> None:
    assert start(change(copy, "generation_config.json", eos_token_id=[EOS, 7, 999])).eos_token_ids == (EOS, 7)


def test_a_model_without_an_end_of_sequence_runs_to_its_limit(copy: Path) -> None:
    change(copy, eos_token_id=None)
    change(copy, "generation_config.json", eos_token_id=None)
    with driving(copy) as driver:
        assert driver.info.eos_token_ids == ()
        assert driver.run_one(request("a", prompt(5), max_tokens=9)).finish_reason == "length"


# What a person gets wrong.


def test_a_folder_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"no model folder.*nowhere"):
        start(tmp_path / "nowhere")


def test_a_folder_without_a_config(copy: Path) -> None:
    (copy / "config.json").unlink()
    with pytest.raises(EngineError, match=r"has no config\.json"):
        start(copy)


def test_a_folder_without_weights(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    with pytest.raises(EngineError, match="has no weights"):
        start(copy)


def test_a_config_of_no_known_model(copy: Path) -> None:
    with pytest.raises(EngineError, match=r"can't use config\.json.*unheard-of"):
        start(change(copy, model_type="unheard-of"))


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("model.safetensors", b"nonsense", r"model\.safetensors is damaged or not complete.*fetch it again"),
        ("model.safetensors", POINTER, r"model\.safetensors is a pointer of Git LFS.*git lfs pull"),
        ("pytorch_model.bin", b"\x80\x04nonsense", r"pytorch_model\.bin is damaged.*fetch it again"),
    ],
    ids=["damaged", "pointer", "bin"],
)
def test_a_file_of_weights_that_is_not_whole_is_named(
    copy: Path, file: str, content: bytes, words: str
) -> None:
    (copy / "model.safetensors").unlink()
    (copy / file).write_bytes(content)
    with pytest.raises(EngineError, match=f"can't load the weights.*{words}"):
        start(copy)


def test_weights_of_another_shape_are_named(copy: Path) -> None:
    with pytest.raises(EngineError, match=r"'lm_head\.weight' in the shape \[300, 64\].*\[400, 64\]"):
        start(change(copy, vocab_size=400))


def test_weights_that_are_not_all_there(copy: Path) -> None:
    """transformers would draw the missing ones at random, and serve nonsense."""
    weights = load_file(copy / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EngineError, match=r"lacks 1 of the model's weights.*layers\.1\.mlp\.up_proj"):
        start(copy)


def test_weights_that_have_no_place_are_named(copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    start(change(copy, num_hidden_layers=1))
    assert "config.json has no place for them" in caplog.text
    assert "'model.layers.1." in caplog.text


def test_a_name_that_the_hub_does_not_give(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(EngineError, match=r"'nobody/nothing' at revision 'v1'.*no folder.*hub") as caught:
        start("nobody/nothing", revision="v1")
    assert "HF_TOKEN" in str(caught.value)


def test_more_context_than_the_model_has(llama: Path) -> None:
    with pytest.raises(EngineError, match=r"max_model_len is 513.*512 positions"):
        start(llama, max_model_len=513)


def test_a_context_that_memory_cannot_hold(llama: Path) -> None:
    with pytest.raises(
        EngineError, match=r"max_model_len=512.*lower max_model_len \(to \d+ at most\)"
    ) as caught:
        start(llama, kv_cache_memory=0.0001)
    limit = int(str(caught.value).split("(to ")[1].split()[0])
    assert start(llama, kv_cache_memory=0.0001, max_model_len=limit).max_model_len == limit
    with pytest.raises(EngineError, match=r"needs 0\.0\d+ GiB.*gives 1e-06 GiB: raise kv_cache_memory"):
        start(llama, kv_cache_memory=0.000001)


def test_more_cache_than_there_is_memory(llama: Path) -> None:
    with pytest.raises(EngineError, match=r"kv_cache_memory is 1000000.*lower kv_cache_memory"):
        start(llama, kv_cache_memory=1_000_000)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there(llama: Path) -> None:
    with pytest.raises(EngineError, match=r"device is 'cuda'.*cpu or auto"):
        start(llama, device="cuda")


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"model": ""}, "model"),
        ({"dtype": "int4"}, "dtype"),
        ({"device": "tpu"}, "device"),
        ({"max_num_seqs": 0}, "max_num_seqs"),
        ({"max_model_len": -1}, "max_model_len"),
        ({"kv_cache_memory": 0}, "kv_cache_memory"),
        ({"max_num_batched_tokens": 31}, "max_num_batched_tokens"),
    ],
)
def test_a_setting_that_cannot_work_is_refused_by_name(options: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        EngineConfig(**{"model": "m", **options})


# What can't be served.

REFUSED = {
    "recurrent": (MambaConfig(**CAUSAL_LM), "mamba.*recurrent|mamba.*layers of kind"),
    "recurrent-2": (
        RwkvConfig(**CAUSAL_LM, attention_hidden_size=64),
        "rwkv",
    ),
    "hybrid": (
        Qwen3NextConfig(**COMMON, num_experts=2, moe_intermediate_size=16, linear_num_value_heads=2),
        "qwen3_next.*linear_attention",
    ),
    "alibi": (BloomConfig(vocab_size=300, hidden_size=64, n_layer=2, n_head=4), "bloom.*ALiBi"),
    "alibi-by-option": (FalconConfig(**CAUSAL_LM, num_attention_heads=4, alibi=True), "falcon.*ALiBi"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_kinds_of_models_that_would_come_out_wrong_are_refused_by_name(kind: str, tmp_path: Path) -> None:
    config, words = REFUSED[kind]
    with pytest.raises(EngineError, match=words) as caught:
        start(save_model(config, tmp_path))
    assert "vllm" in str(caught.value)


def test_encoder_decoders_are_refused(tmp_path: Path) -> None:
    T5Config().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(EngineError, match=r"t5.*encoder-decoder"):
        start(tmp_path)


@pytest.mark.parametrize("has_config", [True, False])
def test_what_can_not_be_served_is_refused_before_its_tokenizer_is_looked_for(
    has_config: bool, tmp_path: Path
) -> None:
    T5Config().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()
    if not has_config:
        (tmp_path / "config.json").write_text("{")
    with pytest.raises(EngineError, match="encoder-decoder" if has_config else r"can't use config\.json"):
        load_model(WorkerSettings(model=str(tmp_path)))


def test_a_model_that_is_no_language_model_is_refused_by_name(tmp_path: Path) -> None:
    ViTConfig().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(EngineError, match=r"'vit' models: transformers has no causal language model"):
        start(tmp_path)


def test_what_a_models_own_code_raises_comes_with_its_name(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("of its own")

    with monkeypatch.context() as patch:
        patch.setattr(LlamaForCausalLM, "forward", fail)
        with pytest.raises(EngineError, match=r"'llama'.*compute a token \(ZeroDivisionError: of its own"):
            start(llama)
    monkeypatch.setattr(ModelRunner, "forward", fail)
    with pytest.raises(EngineError, match=r"'llama'.*self-test failed \(ZeroDivisionError: of its own"):
        start(llama)


def test_logits_that_are_no_numbers_are_refused_at_load(copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    weights["model.norm.weight"][0] = torch.inf
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EngineError, match=r"not finite.*another dtype"):
        start(copy)


@pytest.mark.parametrize(
    ("rope", "limit"),
    [
        ({"rope_type": "default"}, 512),
        ({"rope_type": "linear", "factor": 2.0}, 512),
        ({"rope_type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 128}, 128),
        (
            {
                "rope_type": "longrope",
                "factor": 4.0,
                "original_max_position_embeddings": 64,
                "short_factor": [1.0] * 8,
                "long_factor": [2.0] * 8,
            },
            64,
        ),
    ],
    ids=lambda value: value["rope_type"] if isinstance(value, dict) else str(value),
)
def test_frequencies_that_change_with_length_bound_the_context(rope: dict[str, Any], limit: int) -> None:
    """Beyond it one long sequence would change its neighbours' positions."""
    config = LlamaConfig(**COMMON, rope_parameters={"rope_theta": 10000.0, **rope})
    assert architecture.position_limit(config) == limit
