"""What the vLLM engine is told, and how vLLM is told."""

from dataclasses import dataclass, field
from typing import Any, Literal

from llmboost.settings import LogLevel

GIB = 1 << 30

DRAWING = "llmboost_worker.engine.vllm.drawing:KeyedDrawing"
"""What draws the tokens, as vLLM's processes import it."""

MAX_LOGPROBS = 20
"""As many as OpenAI's `top_logprobs` allows."""

OURS = frozenset({"model", "tokenizer", "logits_processors", "logprobs_mode", "speculative_config"})
"""Arguments of vLLM on which the engine's contract rests, or that have a setting: not for `options`."""


@dataclass(frozen=True, slots=True)
class VllmConfig:
    """vLLM itself checks what it is told, when the engine starts."""

    model: str
    """A folder in Hugging Face's layout, or a name on the hub."""
    revision: str | None = None
    trust_remote_code: bool = False
    dtype: str = "auto"
    """auto: what the transformers engine would choose."""
    quantization: Literal["none", "int8"] = "none"
    """int8: weights alone, a scale for each channel. none: as the checkpoint says."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:<n>. vLLM is built for one kind of device: this can only agree."""
    max_model_len: int | None = None
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    enable_chunked_prefill: bool = True
    enable_prefix_caching: bool = True
    threads: int | None = None
    """On a CPU, of all processes. None: as many as there are cores."""
    kv_cache_memory: float | None = None
    """GiB for keys and values. None: on a CPU, 0.7 of the free memory less the weights; elsewhere vLLM's
    own `gpu_memory_utilization`."""
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    log_level: LogLevel = "info"
    """Of our own messages in vLLM's processes."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of vLLM's `AsyncEngineArgs`; these win."""

    def arguments(self) -> dict[str, Any]:
        """Of vLLM's `AsyncEngineArgs`."""
        arguments: dict[str, Any] = {
            "model": self.model,
            "revision": self.revision,
            "trust_remote_code": self.trust_remote_code,
            "dtype": self.dtype,
            "max_model_len": self.max_model_len,
            "max_num_seqs": self.max_num_seqs,
            "max_num_batched_tokens": self.max_num_batched_tokens,
            "enable_chunked_prefill": self.enable_chunked_prefill,
            "enable_prefix_caching": self.enable_prefix_caching,
            "scheduling_policy": "priority",
            "tensor_parallel_size": self.tensor_parallel,
            "pipeline_parallel_size": self.pipeline_parallel,
            "max_logprobs": MAX_LOGPROBS,
            "logprobs_mode": "raw_logprobs",  # before temperature, filters and penalties
            "logits_processors": [DRAWING],
            "skip_tokenizer_init": True,  # token ids go in and come out
            "use_tqdm_on_load": False,
            "disable_log_stats": True,
        }
        if self.kv_cache_memory is not None:
            arguments["kv_cache_memory_bytes"] = int(self.kv_cache_memory * GIB)
        if self.quantization == "int8":
            arguments["quantization"] = "int8_per_channel_weight_only"
        return arguments | self.options
