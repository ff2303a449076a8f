"""From a name to a model in memory, or to an error that says what to do."""

import logging
from dataclasses import dataclass
from typing import Any

import torch
from transformers.distributed.configuration_utils import DistributedConfig

from llmboost.machine import available_cores, available_memory
from llmboost_worker.engine.interface import EngineError
from llmboost_worker.engine.transformers.attention.hook import NAME
from llmboost_worker.engine.transformers.attention.torch_backend import TorchBackend
from llmboost_worker.engine.transformers.cache import KeyValueCache, LayerShape, bytes_per_token
from llmboost_worker.engine.transformers.config import EngineConfig
from llmboost_worker.engine.transformers.forward import Forward, ModelForward
from llmboost_worker.engine.transformers.loading import architecture, checkpoint
from llmboost_worker.engine.transformers.ranks import Ranks

logger = logging.getLogger(__name__)

GIB = 1 << 30
MIN_MODEL_LEN = 32
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


def check(config: EngineConfig) -> Any:
    """The model's configuration, as far as that says that it can be served.

    Raises:
        EngineError: it can't be.
    """
    model_config = checkpoint.read_config(config)
    name, text_config = model_config.model_type, model_config.get_text_config(decoder=True)
    architecture.check_config(name, text_config)
    architecture.check_split(name, text_config, config.tp)
    architecture.class_of(name, model_config)
    return model_config


def load(config: EngineConfig, local_rank: int = 0) -> LoadedModel:
    """Reads configuration and weights, and puts the engine's attention into the model. With `config.tp`, all
    ranks do this at the same time, and have a part of the weights each.

    Raises:
        EngineError
    """
    device = device_of(config, local_rank)
    if device.type == "cpu":
        torch.set_num_threads(config.threads or max(1, available_cores() // config.tp))
    model_config = check(config)
    name, text_config = model_config.model_type, model_config.get_text_config(decoder=True)
    max_model_len = _max_model_len(config, text_config)
    dtype = _dtype(config.dtype, device)
    options = checkpoint.options_of(config)
    if config.tp > 1:
        options["distributed_config"] = DistributedConfig(tp_size=config.tp)
    model: Any
    report: dict[str, Any]
    try:
        model, report = architecture.class_of(name, model_config).from_pretrained(
            config.model,
            config=model_config,
            dtype=dtype,
            attn_implementation=REFERENCE,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # by the report they are refused, with their names
            **options,
        )
    except Exception as error:
        raise checkpoint.unloaded(config.model, error) from error
    checkpoint.check_report(config.model, report)
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
        fits = (num_blocks - 1) * block_size
        lower = f"lower max_model_len (to {fits} at most) or " if fits >= MIN_MODEL_LEN else ""
        raise EngineError(
            f"one sequence of max_model_len={loaded.max_model_len} tokens needs "
            f"{_gib((longest + 1) * per_block)} of keys and values, and {origin} {_gib(given)}: "
            f"{lower}raise kv_cache_memory"
        )
    try:
        return KeyValueCache(loaded.layers, num_blocks, block_size, loaded.dtype, loaded.device)
    except (RuntimeError, OSError) as error:  # of torch's allocator, of the kernel
        raise EngineError(
            f"no memory for {_gib(num_blocks * per_block)} of keys and values: lower kv_cache_memory "
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
            f"kv_cache_memory is {config.kv_cache_memory}, but {_gib(available)} are available on "
            f"{loaded.device}: lower kv_cache_memory"
        )
    return given, "kv_cache_memory gives"


def _gib(size: int) -> str:
    """Bytes for a reader, who may want to know how few they are."""
    return f"{size / GIB:{'.2f' if size > GIB / 10 else '.2g'}} GiB"


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
        what = "max_model_len is" if config.max_model_len else f"the positions of {config.model!r} are"
        raise EngineError(f"{what} {max_model_len}, but the self-test needs {MIN_MODEL_LEN}")
    return max_model_len


def _eos_token_ids(model: Any, text_config: Any, vocab_size: int) -> tuple[int, ...]:
    """Those of the generation config, which chat checkpoints keep more complete, else of the model's."""
    ids = getattr(model.generation_config, "eos_token_id", None)
    if ids is None:
        ids = getattr(text_config, "eos_token_id", None)
    ids = [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
    return tuple(id for id in ids if 0 <= id < vocab_size)
