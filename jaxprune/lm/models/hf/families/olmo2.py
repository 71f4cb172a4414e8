"""OLMo 2: norms behind attention and MLP, and of all queries and keys as a whole."""

from jaxprune.lm.models.hf.config_reader import Attributes
from jaxprune.lm.models.hf.families import family
from jaxprune.lm.models.hf.families.family import Family, Fields


def _fields(a: Attributes) -> Fields:
    return {
        **family.like_llama(a, epsilon=("rms_norm_eps", 1e-5)),
        **family.biased(a),
        "norm": "rms_float32",
        "qk_norm": "whole",
        "block": "post",
    }


_BEHIND = {
    "norm_attended": "post_attention_layernorm",
    "norm_added": "post_feedforward_layernorm",
}
FAMILY = Family(
    _fields,
    family.modules(family.OUTER, {**family.LAYER, **_BEHIND}),
    # The mean square of all heads would be another one with fewer of them.
    resized=family.WHOLE_HEADS,
)
