"""From a name to a model in memory, or to an error that says what to do."""

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig
from transformers.distributed.configuration_utils import DistributedConfig

from llmboost.machine import available_cores, available_memory
from llmboost_worker.engine.interface import EngineError
from llmboost_worker.engine.transformers.attention.hook import NAME
from llmboost_worker.engine.transformers.attention.torch_backend import TorchBackend
from llmboost_worker.engine.transformers.cache import KeyValueCache, LayerShape, bytes_per_token
from llmboost_worker.engine.transformers.config import EngineConfig
from llmboost_worker.engine.transformers.forward import Forward, ModelForward
from llmboost_worker.engine.transformers.loading import architecture
from llmboost_worker.engine.transformers.ranks import Ranks

logger = logging.getLogger(__name__)

GIB = 1 << 30
MIN_MODEL_LEN = 32
WEIGHTS = ("*.safetensors", "*.bin")
REFERENCE = "eager"
"""transformers' plainest attention: supports everything, and is what the self-test compares with."""


@dataclass(slots=True)
class LoadedModel:
    """A model and what has been found out about it."""

    model: Any
    config: Any
    """Its text configuration."""
    device: torch.device
    dtype: torch.dtype
    layers: list[LayerShape]
    """What each layer stores per token."""
    forward: Forward
    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]


def load(config: EngineConfig, local_rank: int = 0) -> LoadedModel:
    """Reads configuration and weights, and puts the engine's attention into the model. With `config.tp`, all
    ranks do this at the same time, and have a part of the weights each.

    Raises:
        EngineError
    """
    device = device_of(config, local_rank)
    if device.type == "cpu":
        torch.set_num_threads(config.threads or max(1, available_cores() // config.tp))
    _check_folder(config.model)
    options: dict[str, Any] = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    try:
        model_config = AutoConfig.from_pretrained(config.model, **options)
    except Exception as error:
        raise _not_found(config, error) from error
    name, text_config = model_config.model_type, model_config.get_text_config(decoder=True)
    architecture.check_config(name, text_config)
    architecture.check_split(name, text_config, config.tp)
    model_class = architecture.class_of(name, model_config)
    max_model_len = _max_model_len(config, text_config)
    dtype = _dtype(config.dtype, device)
    if config.tp > 1:
        options["distributed_config"] = DistributedConfig(tp_size=config.tp)
    model: Any
    report: dict[str, Any]
    try:
        model, report = model_class.from_pretrained(
            config.model,
            config=model_config,
            dtype=dtype,
            attn_implementation=REFERENCE,
            output_loading_info=True,
            **options,
        )
    except Exception as error:
        raise EngineError(f"can't load the weights of {config.model!r}: {error}") from error
    if missing := sorted(report["missing_keys"]):
        # transformers would serve random numbers in their place.
        raise EngineError(
            f"the checkpoint {config.model!r} lacks {len(missing)} of the model's weights, {missing[0]!r} "
            "for one: is it complete, and of a causal language model?"
        )
    architecture.check_class(name, model)
    model = model.eval().requires_grad_(False).to(device)
    layers = architecture.layers_of(name, model, text_config, max_model_len)
    model.set_attn_implementation(NAME)
    vocab_size = min(text_config.vocab_size, model.get_input_embeddings().weight.shape[0])
    return LoadedModel(
        model=model,
        config=text_config,
        device=device,
        dtype=model.dtype,
        layers=layers,
        forward=ModelForward(model, TorchBackend()),
        max_model_len=max_model_len,
        vocab_size=vocab_size,
        eos_token_ids=_eos_token_ids(model, text_config, vocab_size),
    )


def make_cache(config: EngineConfig, loaded: LoadedModel, ranks: Ranks | None = None) -> KeyValueCache:
    """The memory for keys and values, now that the weights are in theirs: as much as is given, but no more
    than all sequences at once can fill, and as many blocks on each of the ranks. One block of it is nobody's.

    Raises:
        EngineError: not even one sequence of full length fits.
    """
    given, origin = _cache_bytes(config, loaded)
    block_size = loaded.forward.backend.block_size
    per_block = block_size * bytes_per_token(loaded.layers, loaded.dtype)
    longest = -(-loaded.max_model_len // block_size)
    num_blocks = min(given // per_block, config.max_num_seqs * longest + 1)
    if ranks is not None:
        num_blocks = ranks.fewest(num_blocks)
    if num_blocks < longest + 1:
        raise EngineError(
            f"one sequence of max_model_len={loaded.max_model_len} tokens needs "
            f"{(longest + 1) * per_block / GIB:.2f} GiB of keys and values, and {origin} "
            f"{given / GIB:.2f} GiB: lower max_model_len (to {max(0, num_blocks - 1) * block_size} at most) "
            "or raise kv_cache_memory"
        )
    try:
        return KeyValueCache(loaded.layers, num_blocks, block_size, loaded.dtype, loaded.device)
    except (RuntimeError, OSError) as error:  # of torch's allocator, of the kernel
        raise EngineError(
            f"no memory for {num_blocks * per_block / GIB:.2f} GiB of keys and values: lower kv_cache_memory "
            f"({error})"
        ) from error


def _cache_bytes(config: EngineConfig, loaded: LoadedModel) -> tuple[int, str]:
    """Memory for keys and values, and who says so."""
    available = _free_memory(loaded.device)
    if config.kv_cache_memory is None:
        share = 0.9 if loaded.device.type == "cuda" else 0.5 / config.tp  # on a CPU all take of the same
        return int(available * share), f"{share:.0%} of what is available are"
    given = int(config.kv_cache_memory * GIB)
    if given > available:
        raise EngineError(
            f"kv_cache_memory is {config.kv_cache_memory}, but {available / GIB:.2f} GiB are available on "
            f"{loaded.device}: lower kv_cache_memory"
        )
    return given, "kv_cache_memory gives"


def _free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on the device."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    return available_memory()


def device_of(config: EngineConfig, local_rank: int = 0) -> torch.device:
    """
    Raises:
        EngineError: it isn't there.
    """
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise EngineError(
            f"device is {name!r}, but torch sees no CUDA device here: set device to cpu or auto"
        )
    if config.tp > 1 and name == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise EngineError(
                f"--tp is {config.tp}, but torch sees {torch.cuda.device_count()} CUDA devices here: "
                "lower --tp"
            )
        name = f"cuda:{local_rank}"
    return torch.device(name)


def _dtype(name: str, device: torch.device) -> torch.dtype | str:
    """What `--dtype` means here; "auto" is the checkpoint's own."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _check_folder(model: str) -> None:
    """Says what is wrong with a folder before transformers takes its path for a name on the hub."""
    folder = Path(model).expanduser()
    if not folder.is_dir():
        if folder.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1:
            raise EngineError(f"there is no model folder {model!r} (looked for {folder.absolute()})")
        return
    if not (folder / "config.json").is_file():
        raise EngineError(
            f"the folder {model!r} has no config.json: a model in Hugging Face's layout needs config.json, "
            "tokenizer files and *.safetensors"
        )
    if not any(path for pattern in WEIGHTS for path in folder.glob(pattern)):
        raise EngineError(f"the folder {model!r} has no weights (looked for {', '.join(WEIGHTS)})")


def _not_found(config: EngineConfig, error: Exception) -> EngineError:
    if os.path.isdir(config.model):
        return EngineError(f"can't use config.json of {config.model!r}: {error}")
    revision = f" at revision {config.revision!r}" if config.revision else ""
    return EngineError(
        f"found no model {config.model!r}{revision}: there is no folder of that name here, and the Hugging "
        f"Face hub didn't give it. Check the name, the network, and HF_TOKEN if the model is gated. ({error})"
    )


def _max_model_len(config: EngineConfig, text_config: Any) -> int:
    limit = architecture.position_limit(text_config)
    if limit is None and config.max_model_len is None:
        raise EngineError(f"{config.model!r} doesn't say how many positions it has: set max_model_len")
    if limit is not None and config.max_model_len is not None and config.max_model_len > limit:
        raise EngineError(
            f"max_model_len is {config.max_model_len}, but {config.model!r} has {limit} positions: "
            "lower max_model_len or leave it out"
        )
    max_model_len = config.max_model_len or limit or 0
    if max_model_len < MIN_MODEL_LEN:
        raise EngineError(f"max_model_len is {max_model_len}, but the self-test needs {MIN_MODEL_LEN}")
    return max_model_len


def _eos_token_ids(model: Any, text_config: Any, vocab_size: int) -> tuple[int, ...]:
    """Those of the generation config, which chat checkpoints keep more complete, else of the model's."""
    ids = getattr(model.generation_config, "eos_token_id", None)
    if ids is None:
        ids = getattr(text_config, "eos_token_id", None)
    ids = [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
    return tuple(id for id in ids if 0 <= id < vocab_size)
