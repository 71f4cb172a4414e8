"""Llama."""

from jaxprune.models.hf.config_reader import Attributes
from jaxprune.models.hf.families import family
from jaxprune.models.hf.families.family import Family, Fields


def _fields(a: Attributes) -> Fields:
    return {**family.like_llama(a), **family.biased(a, mlp=True)}


FAMILY = Family(
    _fields, family.modules(family.OUTER, family.LAYER), heads=family.DIVIDING_HEADS
)
