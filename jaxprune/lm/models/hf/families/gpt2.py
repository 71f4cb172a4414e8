"""GPT-2: learned positions, and kernels stored [in, out]."""

from jaxprune.lm.models.hf.config_reader import Attributes
from jaxprune.lm.models.hf.families import family
from jaxprune.lm.models.hf.families.family import Family, Fields


def _fields(a: Attributes) -> Fields:
    fields = family.sizes_of_whole_heads(
        a,
        tied=True,
        context="n_positions",
        layers="n_layer",
        width="n_embd",
        heads="n_head",
    )
    context = fields["context"]
    if a.size("n_ctx", context) != context:
        a.wrong("n_ctx", f"n_positions={context}", a.size("n_ctx", context))
    return {
        **fields,
        "mlp_width": a.size("n_inner", 4 * fields["width"]),
        "norm_epsilon": a.number("layer_norm_epsilon", 1e-5),
        "activation": family.activation(a, "activation_function", "gelu_new"),
        "fused": True,
        **dict.fromkeys(("qkv_bias", "out_bias", "mlp_bias"), True),
        "attention_scale": None if a.flag("scale_attn_weights", True) else 1.0,
    }


_OUTER = {
    "embedding": "wte",
    "position_embedding": "wpe",
    "norm": "ln_f",
    "head": "lm_head",
}
_LAYER = {
    "attention/qkv": "attn.c_attn",
    "attention/out": "attn.c_proj",
    "mlp/up": "mlp.c_fc",
    "mlp/down": "mlp.c_proj",
    "norm_attention": "ln_1",
    "norm_mlp": "ln_2",
}
FAMILY = Family(
    _fields,
    family.modules(_OUTER, _LAYER, "h"),
    only={"scale_attn_by_inverse_layer_idx": False},
    prefix="transformer.",
    stored_out_in=False,
    skipped=r"h\.\d+\.attn\.(masked_)?bias",
    resized={"layers": "n_layer", "mlp_width": "n_inner"},
)
