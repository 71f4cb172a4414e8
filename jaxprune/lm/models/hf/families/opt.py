"""OPT: GPT-2 with separate matrices, ReLU, and positions from the third row on."""

from jaxprune.lm.models.hf.config_reader import Attributes
from jaxprune.lm.models.hf.families import family
from jaxprune.lm.models.hf.families.family import Family, Fields


def _fields(a: Attributes) -> Fields:
    fields = family.sizes_of_whole_heads(a, tied=True)
    width = fields["width"]
    # Only OPT-350m has embeddings of another width than its layers.
    if a.size("word_embed_proj_dim", width) != width:
        embedding_width = a.raw("word_embed_proj_dim")
        a.wrong("word_embed_proj_dim", f"hidden_size={width}", embedding_width)
    bias = a.flag("enable_bias", True)
    affine = a.flag("layer_norm_elementwise_affine", True)
    return {
        **fields,
        "position_offset": 2,
        "mlp_width": a.size("ffn_dim"),
        "norm": "layer" if affine else "layer_plain",
        "norm_epsilon": 1e-5,
        "activation": family.activation(a, "activation_function", "relu"),
        **dict.fromkeys(("qkv_bias", "out_bias", "mlp_bias"), bias),
    }


_OUTER = {
    "embedding": "decoder.embed_tokens",
    "position_embedding": "decoder.embed_positions",
    "norm": "decoder.final_layer_norm",
    "head": "lm_head",
}
_LAYER = {
    "attention/out": "self_attn.out_proj",
    "mlp/up": "fc1",
    "mlp/down": "fc2",
    "norm_attention": "self_attn_layer_norm",
    "norm_mlp": "final_layer_norm",
}
FAMILY = Family(
    _fields,
    family.modules(_OUTER, {**family.LAYER, **_LAYER}, "decoder.layers"),
    only={"do_layer_norm_before": True, "_remove_final_layer_norm": False},
    resized={"layers": "num_hidden_layers", "mlp_width": "ffn_dim"},
)
