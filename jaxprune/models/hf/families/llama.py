"""Llama."""

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
)


def _fields(a: Attributes) -> Fields:
    fields, bias = sizes(a), a.flag("attention_bias", False)
    return {
        **fields,
        "activation": activation(a),
        "qkv_bias": bias,
        "out_bias": bias,
        "mlp_bias": a.flag("mlp_bias", False),
        "ropes": (rope_config.one(a, fields),),
    }


FAMILY = Family(_fields, modules(OUTER, LAYER))
