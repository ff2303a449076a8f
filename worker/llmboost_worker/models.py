"""A model by its name: where its files are, and the engine that the settings choose for it."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmboost.settings import DEMO_MODEL, WorkerSettings
from llmboost_worker.engine.interface import Engine, EngineError
from llmboost_worker.text import Tokenizer

if TYPE_CHECKING:
    from llmboost_worker.engine.transformers import EngineConfig

DEMO_FOLDER = Path(__file__).parent / "demo_model"


def locate(model: str) -> str:
    """What transformers takes for a model's name: its folder, or its name on the hub."""
    return str(DEMO_FOLDER) if model == DEMO_MODEL else model


def load_model(settings: WorkerSettings) -> tuple[Engine, Tokenizer]:
    """The engine that the settings name, not yet started, and the model's tokenizer.

    Raises:
        EngineError, TokenizerError: there is none; says why.
    """
    model = locate(settings.model)
    if settings.engine == "vllm":
        tokenizer = _tokenizer(settings, model)
        return _vllm_engine(settings, model, tokenizer), tokenizer
    from llmboost_worker.engine.transformers import TransformersEngine
    from llmboost_worker.engine.transformers.loading import loader

    config = _transformers_config(settings, model)
    loader.check(config)  # first: a model that can't be served need not have a tokenizer
    tokenizer = _tokenizer(settings, model)
    return TransformersEngine(config, tokenizer.token_bytes), tokenizer


def follow(settings: WorkerSettings) -> int:
    """A process that torchrun started beside the one that serves: computes with it, and returns an exit
    status."""
    from llmboost_worker.engine.transformers import followers
    from llmboost_worker.engine.transformers.ranks import Place

    place = Place.given()
    assert place is not None
    return followers.follow(_transformers_config(settings, locate(settings.model)), place)


def _tokenizer(settings: WorkerSettings, model: str) -> Tokenizer:
    return Tokenizer.load(model, settings.revision, settings.trust_remote_code)


def _transformers_config(settings: WorkerSettings, model: str) -> "EngineConfig":
    from llmboost_worker.engine.transformers import EngineConfig

    if settings.pp > 1:
        raise EngineError(
            f"--pp is {settings.pp}, but the {settings.engine} engine has a part of every layer on each "
            "device: use --pp 1, and --tp for more devices"
        )
    try:
        return EngineConfig(
            **_of_every_engine(settings, model),
            attention_backend=settings.attention_backend,
            enable_cuda_graphs=settings.enable_cuda_graphs,
            tp=settings.tp,
        )
    except ValueError as error:  # settings that don't go together
        raise EngineError(str(error)) from error


def _vllm_engine(settings: WorkerSettings, model: str, tokenizer: Tokenizer) -> Engine:
    from llmboost_worker.engine.vllm.config import VllmConfig
    from llmboost_worker.engine.vllm.engine import VllmEngine

    return VllmEngine(
        VllmConfig(
            **_of_every_engine(settings, model),
            tensor_parallel=settings.tp,
            pipeline_parallel=settings.pp,
            log_level=settings.log_level,
            options=json.loads(settings.vllm_options),
        ),
        tokenizer.token_bytes,
    )


def _of_every_engine(settings: WorkerSettings, model: str) -> dict[str, Any]:
    """The fields that the engines' configurations have in common."""
    return {
        "model": model,
        "revision": settings.revision,
        "trust_remote_code": settings.trust_remote_code,
        "dtype": settings.dtype,
        "quantization": settings.quantization,
        "device": settings.device,
        "max_model_len": settings.max_model_len,
        "kv_cache_memory": settings.kv_cache_memory,
        # Every sequence has a token in every step.
        "max_num_seqs": min(settings.max_num_seqs, settings.max_num_batched_tokens),
        "max_num_batched_tokens": settings.max_num_batched_tokens,
        "enable_chunked_prefill": settings.enable_chunked_prefill,
        "enable_prefix_caching": settings.enable_prefix_caching,
        "threads": settings.threads or None,
    }
