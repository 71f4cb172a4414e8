"""StarCoder 2: Llama with GPT-2's norms, biases and MLP, and a window."""

from jaxprune.lm.models.hf.config_reader import Attributes
from jaxprune.lm.models.hf.families import family
from jaxprune.lm.models.hf.families.family import Family, Fields


def _fields(a: Attributes) -> Fields:
    fields = family.like_llama(a, kv_heads=2, tied=True, epsilon=("norm_epsilon", 1e-5))
    bias = a.flag("use_bias", True)
    # Of the published files; transformers does not look at them.
    for name in ("activation_function", "layer_norm_epsilon"):
        a.raw(name)
    return {
        **fields,
        "activation": family.activation(a, default="gelu_pytorch_tanh"),
        "norm": "layer",
        "gated": False,
        **dict.fromkeys(("qkv_bias", "out_bias", "mlp_bias"), bias),
        "windows": (family.window(a, None),) * fields["layers"],
    }


FAMILY = Family(
    _fields,
    family.modules(
        family.OUTER,
        {**family.LAYER, "mlp/up": "mlp.c_fc", "mlp/down": "mlp.c_proj"},
    ),
    only={
        "mlp_type": "default",
        "norm_type": "layer_norm",
        "scale_attn_weights": True,
        "attention_softmax_in_fp32": True,
        "scale_attention_softmax_in_fp32": True,
    },
)
