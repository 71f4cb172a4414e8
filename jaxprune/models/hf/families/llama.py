"""Llama."""

from jaxprune.models.hf.config_reader import Attributes
from jaxprune.models.hf.families import family
from jaxprune.models.hf.families.family import Family, Fields


def _fields(a: Attributes) -> Fields:
    fields, bias = family.like_llama(a), a.flag("attention_bias", False)
    return {
        **fields,
        "qkv_bias": bias,
        "out_bias": bias,
        "mlp_bias": a.flag("mlp_bias", False),
    }


FAMILY = Family(_fields, family.modules(family.OUTER, family.LAYER))
