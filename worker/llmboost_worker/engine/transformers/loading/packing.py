"""A loaded model made quick on the machine that it is on: packed weights, compiled kernels, int8.

It computes what it did before, but for rounding and for what int8 loses; the self-test sees to that.
"""

from torch import nn
from transformers.pytorch_utils import Conv1D

from llmboost_worker.engine.transformers.attention.backend import AttentionBackend
from llmboost_worker.engine.transformers.attention.compiled_backend import CompiledBackend
from llmboost_worker.engine.transformers.attention.torch_backend import TorchBackend
from llmboost_worker.engine.transformers.config import Quantization
from llmboost_worker.engine.transformers.forward import ModelForward
from llmboost_worker.engine.transformers.fused import FusedForward
from llmboost_worker.engine.transformers.kernels import Kernels, find
from llmboost_worker.engine.transformers.linear import PackedLinear
from llmboost_worker.engine.transformers.loading.loader import LoadedModel


def pack(loaded: LoadedModel, quantization: Quantization) -> bool:
    """Replaces `loaded.forward`, and takes weights out of `loaded.model` as they are packed. False: there is
    nothing to gain here, and all is as it was."""
    if loaded.device.type != "cpu":
        if quantization == "none":
            return False
        _pack_linears(loaded.model, quantization)
        return True
    kernels = find(loaded.device, loaded.dtype)
    if kernels is not None and FusedForward.fits(loaded.model, loaded.config):
        backend = CompiledBackend(kernels)
        loaded.forward = FusedForward(
            loaded.model, loaded.config, kernels, backend, loaded.max_model_len, quantization
        )
        return True
    _pack_linears(loaded.model, quantization)
    loaded.forward = ModelForward(loaded.model, _backend(kernels, loaded))
    return True


def _backend(kernels: Kernels | None, loaded: LoadedModel) -> AttentionBackend:
    if kernels is not None and CompiledBackend.fits(loaded.layers, loaded.config.num_attention_heads):
        return CompiledBackend(kernels)
    return TorchBackend()


def _pack_linears(model: nn.Module, quantization: Quantization) -> None:
    """Puts a `PackedLinear` in the place of each linear layer, one after the other: the weights of one layer
    are in memory twice, not those of all."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, PackedLinear(child.weight, child.bias, quantization))
            elif type(child) is Conv1D:  # GPT-2's linear layer, which keeps its weight the other way round
                setattr(module, name, PackedLinear(child.weight.t().contiguous(), child.bias, quantization))
