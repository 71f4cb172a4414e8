"""Gemma 2: norms around what a block adds, windows, scores and logits capped."""

import math

from jaxprune.lm.models.hf import rope_config
from jaxprune.lm.models.hf.config_reader import Attributes
from jaxprune.lm.models.hf.families import family
from jaxprune.lm.models.hf.families.family import Family, Fields


def _fields(a: Attributes) -> Fields:
    fields = family.common_sizes(a, head_dim=256, kv_heads=4, tied=True)
    size = family.window(a, 4096)
    a.raw("hidden_act")  # transformers goes by `hidden_activation`
    twin = a.raw("sliding_window_size")  # the published 9B says it twice
    if twin not in (None, size):
        a.wrong("sliding_window_size", f"sliding_window = {size}", twin)
    return {
        **fields,
        **family.biased(a),
        "norm": "rms_plus_one",
        "block": "sandwich",
        "activation": family.activation(a, "hidden_activation", "gelu_pytorch_tanh"),
        "embedding_scale": math.sqrt(fields["width"]),
        "embedding_scale_rounded": True,
        "attention_scale": a.number("query_pre_attn_scalar", 256) ** -0.5,
        "attention_softcap": a.optional("attn_logit_softcapping", 50.0),
        "logit_softcap": a.optional("final_logit_softcapping", 30.0),
        "ropes": (rope_config.one(a, fields),),
        "windows": family.alternating(a, size, 2),
    }


FAMILY = Family(
    _fields,
    family.modules(family.OUTER, {**family.LAYER, **family.SANDWICH}),
    only={"use_bidirectional_attention": False},
    layer_attributes=family.layer_types,
    heads=family.DIVIDING_HEADS,
)
