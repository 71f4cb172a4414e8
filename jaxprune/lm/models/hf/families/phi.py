"""Phi 1, 1.5 and 2: attention and MLP of one norm, heads that turn in part."""

from jaxprune.lm.models.hf import rope_config
from jaxprune.lm.models.hf.config_reader import Attributes
from jaxprune.lm.models.hf.families import family
from jaxprune.lm.models.hf.families.family import Family, Fields


def _fields(a: Attributes) -> Fields:
    fields = family.common_sizes(a, epsilon=("layer_norm_eps", 1e-5))
    normalised = a.flag("qk_layernorm", False)
    cut = fields["width"] // fields["heads"]
    if normalised and fields["head_dim"] != cut:  # the norms would not fit
        a.wrong("head_dim", f"{cut} where qk_layernorm is true", fields["head_dim"])
    if fields["tie_weights"]:
        a.wrong("tie_word_embeddings", "false, since the head has a bias", True)
    return {
        **fields,
        "activation": family.activation(a, default="gelu_new"),
        "norm": "layer",
        "qk_norm": "head" if normalised else None,
        "block": "parallel_shared",
        "gated": False,
        **dict.fromkeys(("qkv_bias", "out_bias", "mlp_bias", "head_bias"), True),
        "ropes": (rope_config.one(a, fields, share=0.5),),
    }


_LAYER = {
    "attention/out": "self_attn.dense",
    "attention/norm_q": "self_attn.q_layernorm",
    "attention/norm_k": "self_attn.k_layernorm",
    "mlp/up": "mlp.fc1",
    "mlp/down": "mlp.fc2",
}
FAMILY = Family(
    _fields,
    family.modules(
        {**family.OUTER, "norm": "final_layernorm"}, {**family.LAYER, **_LAYER}
    ),
)
