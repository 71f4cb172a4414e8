"""Granite: Llama with factors on embedding, scores, residual stream and logits."""

from jaxprune.lm.models.hf.config_reader import Attributes
from jaxprune.lm.models.hf.families import family
from jaxprune.lm.models.hf.families.family import Family, Fields


def _fields(a: Attributes) -> Fields:
    return {
        **family.like_llama(a),
        **family.biased(a, mlp=True),
        "embedding_scale": a.number("embedding_multiplier", 1.0),
        "residual_scale": a.number("residual_multiplier", 1.0),
        "attention_scale": a.number("attention_multiplier", 1.0),
        "logit_scale": 1 / a.number("logits_scaling", 1.0),
    }


FAMILY = Family(_fields)
