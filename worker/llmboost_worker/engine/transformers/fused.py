"""The forward of a Llama-like model, what lies between its products fused: on a CPU, with compiled kernels.

The model's modules stay what the weights are loaded into; this reads them, packs their weights, and takes
their memory. Per layer four products and four kernels are left of some forty operations:

    norm | queries, keys and values in one product | rotation, into the blocks | attention | product
    norm | gate and up in one product, silu and product of both | product

Which models: those whose layers compute just that, known by the class of their layers. All others run as
transformers has them (`forward`).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmboost_worker.engine.transformers.attention.backend import AttentionBackend, Formula
from llmboost_worker.engine.transformers.attention.layout import StepLayout
from llmboost_worker.engine.transformers.cache import KeyValueCache
from llmboost_worker.engine.transformers.config import Quantization
from llmboost_worker.engine.transformers.kernels import WIDTH, Kernels, Rotation
from llmboost_worker.engine.transformers.linear import Product, gated_product, product
from llmboost_worker.engine.transformers.loading import architecture

LAYERS = {
    "LlamaDecoderLayer",
    "MistralDecoderLayer",
    "MinistralDecoderLayer",
    "Qwen2DecoderLayer",
    "Qwen3DecoderLayer",
}
"""By name: transformers generates a class for each model."""


@dataclass(slots=True)
class _Layer:
    input_norm: Tensor
    qkv: Product
    query_norm: Tensor | None
    key_norm: Tensor | None
    formula: Formula
    out: Product
    post_norm: Tensor
    gated: Product
    down: Product


class FusedForward:
    """A `Forward`."""

    def __init__(
        self,
        model: Any,
        config: Any,
        kernels: Kernels,
        backend: AttentionBackend,
        max_model_len: int,
        quantization: Quantization,
    ) -> None:
        """Takes the model apart: its layers' weights are gone from it afterwards."""
        body, attention = model.model, model.model.layers[0].self_attn
        self._kernels, self.backend = kernels, backend
        self._embedding = body.embed_tokens.weight
        self._epsilon = config.rms_norm_eps
        self._norm = body.norm.weight
        self._heads, self._key_heads = config.num_attention_heads, config.num_key_value_heads
        self._head_dim = attention.head_dim
        positions = torch.arange(max_model_len)[None]
        # In float32 whatever the model's dtype: each row is rounded once, at the end.
        cos, sin = body.rotary_emb(torch.zeros(1, dtype=torch.float32), positions)
        self._angles = cos[0].contiguous(), sin[0].contiguous()
        self._rotation = Rotation(
            self._heads,
            self._key_heads,
            self._head_dim,
            self._head_dim,
            cos.shape[-1],
            *(angle.data_ptr() for angle in self._angles),
            self._epsilon,
        )
        self._layers = []
        for window in architecture.windows(config):
            self._layers.append(_taken(body.layers[0], window, kernels, quantization))
            del body.layers[0]
        self._head = product(model.lm_head.weight, model.lm_head.bias, quantization)
        del model.lm_head

    @staticmethod
    def fits(model: Any, config: Any) -> bool:
        """Whether this computes what the model does."""
        body = getattr(model, "model", None)
        layers = getattr(body, "layers", None)
        if not layers or {type(layer).__name__ for layer in layers} - LAYERS:
            return False
        head_dim = layers[0].self_attn.head_dim
        heads = config.num_attention_heads, config.num_key_value_heads
        return (
            config.hidden_act == "silu"
            and Kernels.attends(*heads, head_dim, head_dim)
            and head_dim % (2 * WIDTH) == config.hidden_size % WIDTH == config.intermediate_size % WIDTH == 0
        )

    def __call__(
        self, ids: Tensor, layout: StepLayout, cache: KeyValueCache, rows: Tensor | None = None
    ) -> Tensor:
        kernels, epsilon, count = self._kernels, self._epsilon, len(ids)
        residual = nn.functional.embedding(ids, self._embedding)
        normed = torch.empty_like(residual)
        width = self._heads * self._head_dim
        x: Tensor | None = None
        for layer, keys, values in zip(self._layers, cache.keys, cache.values, strict=True):
            kernels.add_rms_norm(x, residual, layer.input_norm, epsilon, normed)
            qkv = layer.qkv(normed)
            kernels.rotate_and_store(
                qkv,
                self._rotation,
                layer.query_norm,
                layer.key_norm,
                layout.positions,
                layout.slots,
                keys,
                values,
            )
            query = qkv[:, :width].view(count, self._heads, self._head_dim)
            attended = self.backend.attend(keys, values, query, layout, layer.formula)
            x = layer.out(attended.view(count, width))
            kernels.add_rms_norm(x, residual, layer.post_norm, epsilon, normed)
            x = layer.down(layer.gated(normed))
        if rows is not None and x is not None:
            x, residual = x.index_select(0, rows), residual.index_select(0, rows)
            normed = torch.empty_like(residual)
        kernels.add_rms_norm(x, residual, self._norm, epsilon, normed)
        return self._head(normed)

    def formula(self, layer: int, asked: Formula) -> Formula:
        return self._layers[layer].formula


def _taken(layer: Any, window: int | None, kernels: Kernels, quantization: Quantization) -> _Layer:
    """The layer's weights, packed."""
    attention, mlp = layer.self_attn, layer.mlp
    return _Layer(
        input_norm=layer.input_layernorm.weight,
        qkv=product(*_joined(attention.q_proj, attention.k_proj, attention.v_proj), quantization),
        query_norm=attention.q_norm.weight if hasattr(attention, "q_norm") else None,
        key_norm=attention.k_norm.weight if hasattr(attention, "k_norm") else None,
        formula=Formula(attention.scaling, None, window),
        out=product(attention.o_proj.weight, attention.o_proj.bias, quantization),
        post_norm=layer.post_attention_layernorm.weight,
        gated=gated_product(*_joined(mlp.gate_proj, mlp.up_proj), kernels, quantization),
        down=product(mlp.down_proj.weight, mlp.down_proj.bias, quantization),
    )


def _joined(*linears: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of one product for several that read the same rows; their outputs lie side by side."""
    bias = None if linears[0].bias is None else torch.cat([linear.bias for linear in linears])
    return torch.cat([linear.weight for linear in linears]), bias
