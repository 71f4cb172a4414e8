"""Gemma 3 for text: norms around what a block adds, two rotary schemes, windows."""

import math

from jaxprune.lm.models.hf import rope_config
from jaxprune.lm.models.hf.config_reader import Attributes
from jaxprune.lm.models.hf.families import family
from jaxprune.lm.models.hf.families.family import Family, Fields


def _fields(a: Attributes) -> Fields:
    fields = family.common_sizes(a, head_dim=256, kv_heads=4, tied=True)
    size, pattern = family.window(a, 4096), family.window_pattern(a, 6)
    windows = family.alternating(a, size, pattern)
    return {
        **fields,
        "norm": "rms_plus_one",
        "qk_norm": "head",
        "block": "sandwich",
        "activation": family.activation(a, "hidden_activation", "gelu_pytorch_tanh"),
        **family.biased(a),
        "embedding_scale": math.sqrt(fields["width"]),
        "embedding_scale_rounded": True,
        "attention_scale": a.number("query_pre_attn_scalar", 256) ** -0.5,
        "logit_softcap": a.optional("final_logit_softcapping"),
        "ropes": rope_config.full_and_sliding(a, fields),
        "rope_of": tuple(int(size is not None) for size in windows),
        "windows": windows,
    }


FAMILY = Family(
    _fields,
    family.modules(family.OUTER, {**family.LAYER, **family.SANDWICH}),
    only={"attn_logit_softcapping": None, "use_bidirectional_attention": False},
    layer_attributes=family.layer_types,
    heads=family.DIVIDING_HEADS,
)
