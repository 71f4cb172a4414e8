"""Phi-3: q, k and v are one matrix, gate and up another; a head may turn in part."""

from collections.abc import Mapping
from typing import Any

from jaxprune.lm.models.hf import rope_config
from jaxprune.lm.models.hf.config_reader import Attributes
from jaxprune.lm.models.hf.families import family
from jaxprune.lm.models.hf.families.family import Family, Fields


def _fields(a: Attributes) -> Fields:
    fields = family.common_sizes(a)
    return {
        **fields,
        "activation": family.activation(a),
        "ropes": (rope_config.of_phi3(a, fields),),
        "norm_epsilon": a.number("rms_norm_eps", 1e-5),
        "fused": True,
        "windows": (family.window(a, None),) * fields["layers"],
    }


def _takes(config: Mapping[str, Any], width: int, heads: int) -> bool:
    """Whether the factors of a long rope are as many as Phi3Config counts."""
    # By the width and not by `head_dim`.
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    factors = rope.get("short_factor")
    name = "partial_rotary_factor"
    share = rope.get(name) or config.get(name) or 1.0
    return factors is None or int(width // heads * share) // 2 == len(factors)


_FUSED = {"attention/qkv": "self_attn.qkv_proj", "mlp/gate_up": "mlp.gate_up_proj"}
FAMILY = Family(
    _fields,
    family.modules(family.OUTER, {**family.LAYER, **_FUSED}),
    only={
        **dict.fromkeys(("attention_bias", "mlp_bias", "lm_head_bias"), False),
        "full_attn_mod": 1,
        "interpolate_factor": 1,
    },
    heads=family.HeadsRule(
        _takes, "its width, {width}, over its query heads fits its long rope"
    ),
)
