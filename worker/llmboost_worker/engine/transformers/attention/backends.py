"""Which attention a model gets on a GPU. (On a CPU `packing` chooses.)"""

from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from llmboost_worker.engine.interface import EngineError
from llmboost_worker.engine.transformers.attention.backend import AttentionBackend
from llmboost_worker.engine.transformers.attention.flash_backend import FlashBackend
from llmboost_worker.engine.transformers.attention.flex_backend import FlexBackend
from llmboost_worker.engine.transformers.attention.torch_backend import TorchBackend
from llmboost_worker.engine.transformers.cache import LayerShape
from llmboost_worker.engine.transformers.config import Attention

HALF = (torch.float16, torch.bfloat16)
AMPERE = (8, 0)
"""Compute capability of the first GPUs that both were made for."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What there is to attend with."""

    device: str
    """cpu or cuda"""
    capability: tuple[int, int] = (0, 0)
    has_flash: bool = False
    has_triton: bool = False

    @classmethod
    def here(cls, device: torch.device) -> "Machine":
        if device.type != "cuda":
            return cls(device.type)
        capability = torch.cuda.get_device_capability(device)
        return cls("cuda", capability, *(find_spec(name) is not None for name in ("flash_attn", "triton")))


def candidates(
    asked: Attention, machine: Machine, dtype: torch.dtype, layers: list[LayerShape]
) -> list[Attention]:
    """What can be had, the quickest first; or the one asked for.

    Raises:
        EngineError: it can't be had; says why.
    """
    missing: dict[Attention, str] = {
        "flash_attn": _no_flash(machine, dtype, layers),
        "flex": _no_flex(machine, layers),
        "sdpa": "",
    }
    if asked == "auto":
        return [name for name, reason in missing.items() if not reason]
    if reason := missing[asked]:
        raise EngineError(f"--attention-backend is {asked}, but {reason}: use auto")
    return [asked]


def make(name: Attention) -> AttentionBackend:
    """
    Raises:
        ImportError: its package is broken: most often it was built for another torch.
    """
    if name == "flash_attn":
        flash: Any = import_module("flash_attn")
        return FlashBackend(flash)
    return FlexBackend.compiled() if name == "flex" else TorchBackend()


def _no_flash(machine: Machine, dtype: torch.dtype, layers: list[LayerShape]) -> str:
    """Why it can't be had; empty if it can."""
    if machine.device != "cuda":
        return f"the device is {machine.device}"
    if not machine.has_flash:
        return "the package flash-attn isn't installed"
    if machine.capability < AMPERE:
        return f"this GPU's compute capability is {'.'.join(map(str, machine.capability))}, below 8.0"
    if dtype not in HALF:
        return f"the model is in {str(dtype).removeprefix('torch.')}, not in half precision"
    for layer in layers:
        if layer.key_dim != layer.value_dim or layer.key_dim > 256 or layer.key_dim % 8:
            return f"a layer's heads have keys of {layer.key_dim} and values of {layer.value_dim} numbers"
    return ""


def _no_flex(machine: Machine, layers: list[LayerShape]) -> str:
    if machine.device != "cuda":
        return f"the device is {machine.device}"
    if not machine.has_triton:
        return "the package triton isn't installed"
    if machine.capability < AMPERE:
        return f"this GPU's compute capability is {'.'.join(map(str, machine.capability))}, below 8.0"
    if any(min(layer.key_dim, layer.value_dim) < 16 for layer in layers):
        return "a layer's heads have keys or values of less than 16 numbers"
    return ""
