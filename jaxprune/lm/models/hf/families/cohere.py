"""Cohere's Command R: one norm for attention and MLP, interleaved RoPE, scaled logits.

The second family (Command R7B) has layers with a sliding window and rotary positions,
and layers that see all tokens and have no positions.
"""

import dataclasses

from jaxprune.lm.models.hf.config_reader import Attributes
from jaxprune.lm.models.hf.families import family
from jaxprune.lm.models.hf.families.family import Family, Fields


def _common(a: Attributes, theta: float) -> Fields:
    fields = family.like_llama(
        a, tied=True, theta=theta, epsilon=("layer_norm_eps", 1e-5)
    )
    ropes = (dataclasses.replace(fields["ropes"][0], interleaved=True),)
    return {
        **fields,
        **family.biased(a),
        "ropes": ropes,
        "norm": "layer_scale",
        "block": "parallel_shared",
        "logit_scale": a.number("logit_scale", 0.0625),
    }


def _fields(a: Attributes) -> Fields:
    normalised = a.flag("use_qk_norm", False)
    return {**_common(a, 5e5), "qk_norm": "heads" if normalised else None}


def _fields_2(a: Attributes) -> Fields:
    fields = _common(a, 1e4)
    family.whole_heads(a, fields)  # transformers computes it, whatever is said
    pattern = family.window_pattern(a, 4)
    if (switch := a.size("layer_switch", pattern)) != pattern:  # its older name
        a.wrong("layer_switch", f"sliding_window_pattern={pattern}", switch)
    windows = family.alternating(a, family.window(a, 4096), pattern)
    return {
        **fields,
        "rope_of": tuple(None if size is None else 0 for size in windows),
        "windows": windows,
    }


COHERE = Family(_fields)
COHERE2 = Family(
    _fields_2,
    only={
        "use_qk_norm": False,
        "rotary_pct": 1,
        "position_embedding_type": "rope_gptj",
        "order_of_interleaved_layers": "local_attn_first",
        "use_embedding_sharing": True,
        "use_gated_activation": True,
        "use_parallel_block": True,
        "use_parallel_embedding": False,
    },
    resized=family.WHOLE_HEADS,
    layer_attributes=family.layer_types,
)
