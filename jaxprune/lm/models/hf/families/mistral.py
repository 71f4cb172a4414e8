"""Mistral: Llama whose tokens see a window."""

from jaxprune.lm.models.hf.config_reader import Attributes
from jaxprune.lm.models.hf.families import family
from jaxprune.lm.models.hf.families.family import Family, Fields


def _fields(a: Attributes) -> Fields:
    fields = family.like_llama(a, kv_heads=8)
    return {**fields, "windows": (family.window(a, 4096),) * fields["layers"]}


FAMILY = Family(_fields)
