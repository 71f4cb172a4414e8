"""Mistral: Llama whose tokens see a window."""

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
        "activation": activation(a),
        "ropes": (rope_config.one(a, fields),),
        "windows": (window(a, 4096),) * fields["layers"],
    }


FAMILY = Family(_fields, modules(OUTER, LAYER))
