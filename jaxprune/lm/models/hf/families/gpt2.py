"""GPT-2: learned positions, and kernels stored [in, out]."""

from jaxprune.lm.models.hf.config_reader import Attributes
from jaxprune.lm.models.hf.families import family
from jaxprune.lm.models.hf.families.family import Family, Fields


def _fields(a: Attributes) -> Fields:
    width, heads, context = a.size("n_embd"), a.size("n_head"), a.size("n_positions")
    if width % heads:
        a.wrong("n_embd", f"divisible by n_head={heads}", width)
    if a.size("n_ctx", context) != context:
        a.wrong("n_ctx", f"n_positions={context}", a.size("n_ctx", context))
    return {
        "vocab_size": a.size("vocab_size"),
        "context": context,
        "layers": a.size("n_layer", most=family.LAYERS),
        "width": width,
        "heads": heads,
        "kv_heads": heads,
        "head_dim": max(1, width // heads),
        "mlp_width": a.size("n_inner", 4 * width),
        "norm": "layer",
        "norm_epsilon": a.number("layer_norm_epsilon", 1e-5),
        "activation": family.activation(a, "activation_function", "gelu_new"),
        "gated": False,
        "fused": True,
        "qkv_bias": True,
        "out_bias": True,
        "mlp_bias": True,
        "tie_weights": a.flag("tie_word_embeddings", True),
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
