"""Tiny configurations of the families that `tiny_hf` reads beside its first seven.

Those that are the same but for one feature have a suffix. The features are odd ones:
heads that no power of two counts, features of a head that are not width over heads.
"""

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
HEADS_3 = {  # three heads, each of whose features are not width / heads
    **SMALL,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 12,
}
NEOX = {
    "vocab_size": 97,
    "hidden_size": 36,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 64,
}
OPT = {
    "vocab_size": 97,
    "hidden_size": 36,
    "ffn_dim": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 64,
}
FALCON = {
    "vocab_size": 97,
    "hidden_size": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 64,
}
MIXTURES = {
    "mixtral": ("Mixtral", {**SMALL, "num_local_experts": 3, "sliding_window": 7}),
    "qwen2-moe": (
        "Qwen2Moe",
        {
            **SMALL,
            "num_experts": 5,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 20,
            "shared_expert_intermediate_size": 24,
        },
    ),
    "qwen3-moe": (
        "Qwen3Moe",
        {
            **SMALL,
            "head_dim": 12,
            "num_experts": 4,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 20,
            "norm_topk_prob": True,
            "tie_word_embeddings": True,
        },
    ),
    "gpt-oss": (
        "GptOss",
        {
            **SMALL,
            "num_attention_heads": 6,
            "head_dim": 10,
            "num_local_experts": 3,
            "num_experts_per_tok": 2,
            "sliding_window": 7,
            "swiglu_limit": 1.5,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 150000.0,
                "factor": 4.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
                "original_max_position_embeddings": 16,
            },
        },
    ),
    "olmoe": (
        "Olmoe",
        {
            **SMALL,
            "num_experts": 4,
            "num_experts_per_tok": 1,
            "attention_bias": True,
        },
    ),
}
CONFIGS = {
    "gemma2": (
        "Gemma2",
        {
            **SMALL,
            "num_hidden_layers": 3,
            "head_dim": 16,
            "sliding_window": 5,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 4.0,
        },
    ),
    "gemma2-plain": (
        "Gemma2",
        {
            **SMALL,
            "head_dim": 12,
            "num_key_value_heads": 1,
            "attention_bias": True,
            "layer_types": ["full_attention", "sliding_attention"],
            "sliding_window": 7,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "tie_word_embeddings": False,
        },
    ),
    "olmo2": ("Olmo2", SMALL),
    "olmo2-odd": (
        "Olmo2",
        {**HEADS_3, "attention_bias": True, "tie_word_embeddings": True},
    ),
    "smollm3": (
        "SmolLM3",
        {**SMALL, "num_hidden_layers": 3, "no_rope_layers": [1, 0, 1]},
    ),
    "smollm3-sliding": (
        "SmolLM3",
        {
            **HEADS_3,
            "no_rope_layer_interval": 2,
            "use_sliding_window": True,
            "sliding_window": 6,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": False,
        },
    ),
    "granite": (
        "Granite",
        {
            **SMALL,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.3,
            "attention_multiplier": 0.2,
            "logits_scaling": 2.5,
        },
    ),
    "granite-odd": (
        "Granite",
        {
            **HEADS_3,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
        },
    ),
    "cohere": ("Cohere", {**SMALL, "logit_scale": 0.5}),
    "cohere-norms": (
        "Cohere",
        {
            **HEADS_3,
            "num_key_value_heads": 3,
            "use_qk_norm": True,
            "logit_scale": 1.0,
            "attention_bias": True,
            "tie_word_embeddings": False,
        },
    ),
    "cohere2": (
        "Cohere2",
        {
            **SMALL,
            "num_hidden_layers": 3,
            "sliding_window": 5,
            "layer_switch": 4,
            "logit_scale": 0.5,
        },
    ),
    "starcoder2": ("Starcoder2", {**SMALL, "sliding_window": 6}),
    "starcoder2-odd": (
        "Starcoder2",
        {**HEADS_3, "use_bias": False, "tie_word_embeddings": False},
    ),
    "phi": ("Phi", {**SMALL, "num_key_value_heads": 4}),
    "phi-norms": (
        "Phi",
        {
            **SMALL,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "qk_layernorm": True,
            "partial_rotary_factor": 0.25,
            "hidden_act": "gelu",
        },
    ),
    "gpt-neox": ("GPTNeoX", {**NEOX, "rotary_pct": 0.5}),
    "gpt-neox-serial": (
        "GPTNeoX",
        {
            **NEOX,
            "use_parallel_residual": False,
            "attention_bias": False,
            "tie_word_embeddings": True,
            "rotary_pct": 1.0,
            "rotary_emb_base": 100,
            "hidden_act": "gelu_fast",
        },
    ),
    "opt": ("OPT", OPT),
    "opt-plain": (
        "OPT",
        {
            **OPT,
            "enable_bias": False,
            "layer_norm_elementwise_affine": False,
            "activation_function": "gelu",
            "tie_word_embeddings": False,
        },
    ),
    "falcon": ("Falcon", FALCON),
    "falcon-40b": (
        "Falcon",
        {
            **FALCON,
            "num_attention_heads": 6,
            "num_kv_heads": 2,
            "new_decoder_architecture": True,
            "bias": True,
            "ffn_hidden_size": 40,
            "tie_word_embeddings": False,
        },
    ),
    "falcon-11b": (
        "Falcon",
        {
            **FALCON,
            "num_attention_heads": 6,
            "num_kv_heads": 3,
            "new_decoder_architecture": True,
            "num_ln_in_parallel_attn": 1,
        },
    ),
    "falcon-serial": (
        "Falcon",
        {**FALCON, "multi_query": False, "parallel_attn": False, "bias": True},
    ),
}
