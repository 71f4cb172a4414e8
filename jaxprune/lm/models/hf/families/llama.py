"""Llama."""

from jaxprune.lm.models.hf.config_reader import Attributes
from jaxprune.lm.models.hf.families import family
from jaxprune.lm.models.hf.families.family import Family, Fields


def _fields(a: Attributes) -> Fields:
    return {**family.like_llama(a), **family.biased(a, mlp=True)}


FAMILY = Family(_fields, heads=family.DIVIDING_HEADS)
