"""Configurations of small models, of every family that the engine is tested with."""

from typing import Any

from transformers import (
    Cohere2Config,
    CohereConfig,
    DeepseekV3Config,
    Gemma2Config,
    Gemma3TextConfig,
    Gemma4TextConfig,
    GemmaConfig,
    Glm4Config,
    Glm4MoeConfig,
    GPT2Config,
    GPTBigCodeConfig,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    Mistral3Config,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Olmo3Config,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3VLConfig,
    SmolLM3Config,
    Starcoder2Config,
)

VOCAB = 300
PAD, EOS = 0, 2

COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    # Random weights of the usual spread give near-flat logits, where rounding decides the argmax.
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
    "tie_word_embeddings": False,
}
GPT2_COMMON = {
    "vocab_size": VOCAB,
    "n_embd": 64,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 512,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": EOS,
    "tie_word_embeddings": False,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
LOCAL = ["sliding_attention", "full_attention", "sliding_attention"]
LATENT = {
    **COMMON,
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
"""DeepSeek's attention: keys and values are made from one narrow vector, and keys are wider."""

CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**COMMON),
    "qwen2": Qwen2Config(**COMMON),
    "qwen2-window": Qwen2Config(**COMMON, use_sliding_window=True, sliding_window=9, max_window_layers=1),
    "qwen3": Qwen3Config(**COMMON, head_dim=16),
    "mistral": MistralConfig(**COMMON, sliding_window=8),
    "gemma2": Gemma2Config(
        **COMMON, head_dim=16, sliding_window=8, attn_logit_softcapping=20.0, query_pre_attn_scalar=16
    ),
    "phi": PhiConfig(**COMMON),
    "gpt2": GPT2Config(**GPT2_COMMON),
    "mixtral": MixtralConfig(**COMMON, num_local_experts=4, sliding_window=None),
}
"""Of the families that people run most."""

FAMILIES: dict[str, PreTrainedConfig] = {
    "llama-tied": LlamaConfig(**{**COMMON, "tie_word_embeddings": True}),
    "llama3-rope": LlamaConfig(
        **COMMON,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    "yarn": Qwen2Config(
        **COMMON,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 128,
        },
    ),
    "one-key-head": LlamaConfig(**{**COMMON, "num_key_value_heads": 1}),
    "gemma": GemmaConfig(**COMMON, head_dim=16),
    "gemma3": Gemma3TextConfig(
        **COMMON, head_dim=16, sliding_window=8, query_pre_attn_scalar=16, layer_types=LOCAL
    ),
    "gemma4": Gemma4TextConfig(  # its last two layers take the keys and values of the first two
        **{**COMMON, "num_hidden_layers": 4},
        head_dim=16,
        global_head_dim=32,
        sliding_window=8,
        layer_types=LOCAL[:2] * 2,
        num_kv_shared_layers=2,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=VOCAB,
    ),
    "phi3": Phi3Config(**COMMON, sliding_window=8),
    "gpt-neox": GPTNeoXConfig(**COMMON, rotary_pct=0.25),
    "gpt-bigcode": GPTBigCodeConfig(**GPT2_COMMON, multi_query=True, pad_token_id=PAD),
    "opt": OPTConfig(**COMMON, ffn_dim=96, word_embed_proj_dim=64),
    "starcoder2": Starcoder2Config(**COMMON, sliding_window=8),
    "olmo2": Olmo2Config(**COMMON),
    "olmo3": Olmo3Config(**COMMON, sliding_window=8, layer_types=LOCAL),
    "cohere": CohereConfig(**COMMON),
    "cohere2": Cohere2Config(**COMMON, sliding_window=8, layer_types=LOCAL),
    "granite": GraniteConfig(**COMMON, attention_multiplier=0.2, logits_scaling=2.0),
    "glm4": Glm4Config(**COMMON, head_dim=16),
    "smollm3": SmolLM3Config(**COMMON),
    "qwen2-moe": Qwen2MoeConfig(**COMMON, **EXPERTS, num_experts=4, shared_expert_intermediate_size=32),
    "qwen3-moe": Qwen3MoeConfig(**COMMON, **EXPERTS, num_experts=4, head_dim=16),
    "glm4-moe": Glm4MoeConfig(**COMMON, **EXPERTS, n_routed_experts=4, head_dim=16),
    "deepseek-v3": DeepseekV3Config(
        **LATENT, **EXPERTS, n_routed_experts=4, n_group=2, topk_group=1, first_k_dense_replace=1
    ),
    "gpt-oss": GptOssConfig(
        **COMMON, head_dim=16, num_local_experts=4, num_experts_per_tok=2, sliding_window=8, layer_types=LOCAL
    ),
    "mistral3": Mistral3Config(  # the text of a model that also takes images
        text_config={**COMMON, "model_type": "mistral", "head_dim": 16},
        vision_config={
            "model_type": "pixtral",
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "head_dim": 16,
            "image_size": 56,
            "patch_size": 14,
        },
    ),
    "qwen3-vl": Qwen3VLConfig(
        text_config={
            **COMMON,
            "model_type": "qwen3_vl_text",
            "head_dim": 16,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [4, 2, 2],
            },
        },
        vision_config={
            "model_type": "qwen3_vl_vision",
            "hidden_size": 32,
            "intermediate_size": 32,
            "depth": 1,
            "num_heads": 2,
            "out_hidden_size": 64,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
    ),
}
"""Others, each of which does something that those don't."""
