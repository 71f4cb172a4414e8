"""Phi-3: q, k and v are one matrix, gate and up another."""

from jaxprune.models.hf import rope_config
from jaxprune.models.hf.config_reader import Attributes
from jaxprune.models.hf.families.family import (
    LAYER,
    OUTER,
    Family,
    Fields,
    activation,
    modules,
    sizes,
    window,
)


def _fields(a: Attributes) -> Fields:
    fields = sizes(a)
    return {
        **fields,
        "norm_epsilon": a.number("rms_norm_eps", 1e-5),
        "activation": activation(a),
        "fused": True,
        "ropes": (rope_config.one(a, fields),),
        "windows": (window(a, None),) * fields["layers"],
    }


_FUSED = {"attention/qkv": "self_attn.qkv_proj", "mlp/gate_up": "mlp.gate_up_proj"}
FAMILY = Family(
    _fields,
    modules(OUTER, {**LAYER, **_FUSED}),
    only={
        "attention_bias": False,
        "mlp_bias": False,
        "lm_head_bias": False,
        "full_attn_mod": 1,
        "interpolate_factor": 1,
    },
)
