"""What the transformers engine is told."""

from dataclasses import dataclass
from typing import Literal

Quantization = Literal["none", "int8"]
Attention = Literal["auto", "flash_attn", "flex", "sdpa"]
DType = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Raises `ValueError` with the field's name for a value that can't work."""

    model: str
    """A folder in Hugging Face's layout, or a name on the hub."""
    revision: str | None = None
    trust_remote_code: bool = False
    """Run Python code that comes with the checkpoint."""
    dtype: DType = "auto"
    """auto: float32 on a CPU, the checkpoint's own on CUDA. bfloat16 is about twice as fast on a processor
    that multiplies it (AMX, AVX512_BF16), but has so few digits that tokens often tie, and a resumed sequence
    may take another turn than the unbroken one would have."""
    quantization: Quantization = "none"
    """int8: weights in int8, activations in `dtype`."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:<n>. auto: CUDA if there is one."""
    attention_backend: Attention = "auto"
    """What attends on a GPU. auto: the quickest that is there."""
    enable_cuda_graphs: bool = True
    """On a GPU, record decoding once per size of the batch, and replay it."""
    max_model_len: int | None = None
    """Prompt and output together, in tokens. None: as many positions as the model was made for."""
    max_num_seqs: int = 256
    """Sequences in one step."""
    max_num_batched_tokens: int = 2048
    """Tokens in one step."""
    enable_chunked_prefill: bool = True
    """Prompts are computed in parts as small as running sequences need, to get their next tokens in time.
    False: each in one step, even one above `max_num_batched_tokens`."""
    enable_prefix_caching: bool = True
    """Keep computed blocks for others that begin alike."""
    threads: int | None = None
    """Of torch on a CPU. None: the physical cores that this process may use."""
    kv_cache_memory: float | None = None
    """GiB for keys and values. None: half of what is available once a CPU's weights are loaded, 0.9 on
    CUDA. Never more than `max_num_seqs` sequences of full length need."""

    tp: int = 1
    """Devices over which the model is split (tensor parallelism); on a CPU, processes."""

    def __post_init__(self) -> None:
        if not self.model:
            raise ValueError("model is empty: give a folder or a name on the hub")
        if self.dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise ValueError(f"dtype is {self.dtype!r}, but must be auto, float32, bfloat16 or float16")
        if self.quantization not in ("none", "int8"):
            raise ValueError(f"quantization is {self.quantization!r}, but must be none or int8")
        if self.device not in ("auto", "cpu", "cuda") and not self.device.removeprefix("cuda:").isdigit():
            raise ValueError(f"device is {self.device!r}, but must be auto, cpu, cuda or cuda:<n>")
        for name in (
            "max_model_len",
            "max_num_seqs",
            "max_num_batched_tokens",
            "threads",
            "kv_cache_memory",
            "tp",
        ):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} is {value}, but must be above 0")
        if self.tp > 1 and self.device.startswith("cuda:"):
            raise ValueError(f"device is {self.device!r}, but tp is {self.tp}: set device to cuda")
        if self.tp > 1 and self.quantization != "none":
            raise ValueError(
                f"quantization is {self.quantization!r}, but tp is {self.tp}: a model that is split can't be "
                "quantized"
            )
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) is below max_num_seqs "
                f"({self.max_num_seqs}): every sequence needs room for one token a step"
            )
