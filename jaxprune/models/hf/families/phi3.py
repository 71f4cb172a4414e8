"""Phi-3: q, k and v are one matrix, gate and up another; a head may turn in part."""

from jaxprune.models.hf import rope_config
from jaxprune.models.hf.config_reader import Attributes
from jaxprune.models.hf.families import family
from jaxprune.models.hf.families.family import Family, Fields


def _fields(a: Attributes) -> Fields:
    fields = family.sizes(a)
    return {
        **fields,
        "activation": family.activation(a),
        "ropes": (rope_config.of_phi3(a, fields),),
        "norm_epsilon": a.number("rms_norm_eps", 1e-5),
        "fused": True,
        "windows": (family.window(a, None),) * fields["layers"],
    }


_FUSED = {"attention/qkv": "self_attn.qkv_proj", "mlp/gate_up": "mlp.gate_up_proj"}
FAMILY = Family(
    _fields,
    family.modules(family.OUTER, {**family.LAYER, **_FUSED}),
    only={
        **dict.fromkeys(("attention_bias", "mlp_bias", "lm_head_bias"), False),
        "full_attn_mod": 1,
        "interpolate_factor": 1,
    },
)
