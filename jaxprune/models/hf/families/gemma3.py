"""Gemma 3 for text: norms around what a block adds, two rotary schemes, windows."""

import math

from jaxprune.models.hf import rope_config
from jaxprune.models.hf.config_reader import Attributes
from jaxprune.models.hf.families import family
from jaxprune.models.hf.families.family import Family, Fields


def _fields(a: Attributes) -> Fields:
    fields = family.sizes(a, head_dim=256, tied=True)
    layers, bias = fields["layers"], a.flag("attention_bias", False)
    size = family.window(a, 4096)
    every = a.size("_sliding_window_pattern", a.size("sliding_window_pattern", 6))
    sliding = family.sliding_layers(a, [bool((i + 1) % every) for i in range(layers)])
    if any(sliding) and size is None:
        a.wrong("sliding_window", "given where layers slide", None)
    return {
        **fields,
        "norm": "rms_plus_one",
        "qk_norm": True,
        "post_norms": True,
        "activation": family.activation(a, "hidden_activation", "gelu_pytorch_tanh"),
        "qkv_bias": bias,
        "out_bias": bias,
        "embedding_scale": math.sqrt(fields["width"]),
        "attention_scale": a.number("query_pre_attn_scalar", 256) ** -0.5,
        "logit_softcap": a.optional("final_logit_softcapping"),
        "ropes": rope_config.full_and_sliding(a, fields),
        "rope_of": tuple(int(slides) for slides in sliding),
        "windows": tuple(size if slides else None for slides in sliding),
    }


_SANDWICH = {
    "norm_attended": "post_attention_layernorm",
    "norm_mlp": "pre_feedforward_layernorm",
    "norm_added": "post_feedforward_layernorm",
}
FAMILY = Family(
    _fields,
    family.modules(family.OUTER, {**family.LAYER, **_SANDWICH}),
    only={"attn_logit_softcapping": None, "use_bidirectional_attention": False},
)
