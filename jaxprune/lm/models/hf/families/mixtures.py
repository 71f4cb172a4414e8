"""Mixtures of experts: Mixtral, Qwen 2 MoE, Qwen 3 MoE and OLMoE.

Directories hold a tensor for each matrix of each expert, the model one leaf for all
experts of a layer.
"""

from typing import Any

from jaxprune.lm.models.hf.config_reader import Attributes
from jaxprune.lm.models.hf.families import family
from jaxprune.lm.models.hf.families.family import Family, Fields

# transformers writes two names for one number.
TWINS = {
    "num_experts": ("num_local_experts",),
    "num_local_experts": ("num_experts",),
}


def _mixtral(a: Attributes) -> Fields:
    fields = family.like_llama(a, kv_heads=8, theta=1e6, epsilon=("rms_norm_eps", 1e-5))
    return {
        **fields,
        **experts(a, "num_local_experts", 8, 2),
        "renormalise": True,
        "windows": (family.window(a, None),) * fields["layers"],
    }


def _qwen_2(a: Attributes) -> Fields:
    fields = family.like_llama(a, kv_heads=16)
    if any(family.sliding_layers(a, [False] * fields["layers"])):
        a.wrong("layer_types", "full_attention everywhere", a.raw("layer_types"))
    return {
        **fields,
        **_of_qwen(a, (60, 4), 1408),
        "qkv_bias": a.flag("qkv_bias", True),
        "shared_width": a.size("shared_expert_intermediate_size", 5632),
    }


def _qwen_3(a: Attributes) -> Fields:
    fields = family.like_llama(a, kv_heads=4)
    return {
        **fields,
        **family.biased(a),
        **_of_qwen(a, (128, 8), 768),
        "qk_norm": "head",
    }


def _of_qwen(a: Attributes, defaults: tuple[int, int], mlp_width: int) -> Fields:
    # The width of layers without experts; a model with such layers is refused.
    a.raw("intermediate_size")
    if a.raw("mlp_only_layers") not in (None, []):
        a.wrong("mlp_only_layers", "empty", a.raw("mlp_only_layers"))
    for name in ("sliding_window", "max_window_layers"):
        a.raw(name)  # not looked at unless use_sliding_window is true
    return {
        **experts(a, "num_experts", *defaults),
        "mlp_width": a.size("moe_intermediate_size", mlp_width),
        "renormalise": a.flag("norm_topk_prob", False),
    }


def _olmoe(a: Attributes) -> Fields:
    fields = family.like_llama(a, epsilon=("rms_norm_eps", 1e-5))
    family.whole_heads(a, fields)
    return {
        **fields,
        **family.biased(a),
        **experts(a, "num_experts", 64, 8),
        "renormalise": a.flag("norm_topk_prob", False),
        "qk_norm": "whole",
    }


def experts(a: Attributes, name: str, default: int, default_per_token: int) -> Fields:
    """How many experts there are, and how many of them a token is given to."""
    for unused in ("output_router_logits", "router_aux_loss_coef"):
        a.raw(unused)  # of training
    a.raw("router_jitter_noise")
    number = a.size(name, default)
    for twin in TWINS[name]:
        if a.raw(name) is None:
            number = a.size(twin, default)
        elif a.raw(twin) not in (None, number):
            a.wrong(twin, f"{name}={number}", a.raw(twin))
    per_token = a.size("num_experts_per_tok", default_per_token)
    if per_token > number:
        a.wrong("num_experts_per_tok", f"at most {name}={number}", per_token)
    return {"experts": number, "experts_per_token": min(per_token, number)}


def _modules(mlp: str, gate: str, up: str, down: str) -> dict[str, str]:
    """The modules of a layer; "*" stands for the number of the expert."""
    # A mixture has no MLP of its own.
    dense = {k: v for k, v in family.LAYER.items() if not k.startswith("mlp/")}
    return family.modules(
        family.OUTER,
        {
            **dense,
            "mlp/router": f"{mlp}.gate",
            "mlp/gate": f"{mlp}.experts.*.{gate}",
            "mlp/up": f"{mlp}.experts.*.{up}",
            "mlp/down": f"{mlp}.experts.*.{down}",
            "mlp/shared/gate": f"{mlp}.shared_expert.{gate}",
            "mlp/shared/up": f"{mlp}.shared_expert.{up}",
            "mlp/shared/down": f"{mlp}.shared_expert.{down}",
            "mlp/shared_router": f"{mlp}.shared_expert_gate",
        },
    )


_HEADS = {k: v for k, v in family.RESIZED.items() if k != "mlp_width"}
_NUMBER = {"experts": "num_experts"}
_QWEN: dict[str, Any] = {"decoder_sparse_step": 1, "use_sliding_window": False}
_NAMES = _modules("mlp", "gate_proj", "up_proj", "down_proj")
MIXTRAL = Family(
    _mixtral,
    _modules("block_sparse_moe", "w1", "w3", "w2"),
    resized={**_HEADS, "experts": "num_local_experts"},
)
QWEN2_MOE = Family(_qwen_2, _NAMES, only=_QWEN, resized={**_HEADS, **_NUMBER})
QWEN3_MOE = Family(_qwen_3, _NAMES, only=_QWEN, resized={**_HEADS, **_NUMBER})
OLMOE = Family(
    _olmoe,
    _NAMES,
    only={"clip_qkv": None},
    resized={"layers": "num_hidden_layers", **_NUMBER},  # a norm is over all heads
)
