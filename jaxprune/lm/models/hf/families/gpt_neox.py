"""GPT-NeoX and Pythia: q, k and v in one matrix, attention and MLP at once."""

from jaxprune.lm.models.hf import rope_config
from jaxprune.lm.models.hf.config_reader import Attributes
from jaxprune.lm.models.hf.families import family
from jaxprune.lm.models.hf.families.family import Family, Fields


def _fields(a: Attributes) -> Fields:
    fields = family.sizes_of_whole_heads(a, tied=False)
    # Older files give the rotary base and share under two names, which must agree.
    twins = {
        "rope_theta": ("rotary_emb_base", 1e4),
        "partial_rotary_factor": ("rotary_pct", 0.25),
    }
    for name, (original, default) in twins.items():
        value = a.number(original, default)
        if (twin := a.optional(name)) is not None and twin != value:
            a.wrong(name, f"{original}={value}", twin)
    parallel = a.flag("use_parallel_residual", True)
    names = ("rotary_emb_base", "rotary_pct")
    return {
        **fields,
        "activation": family.activation(a, default="gelu"),
        "block": "parallel" if parallel else "pre",
        "mlp_width": a.size("intermediate_size"),
        "norm_epsilon": a.number("layer_norm_eps", 1e-5),
        "fused": True,
        "fused_by_head": True,
        **family.biased(a, default=True),
        "mlp_bias": True,
        "ropes": (rope_config.one(a, fields, share=0.25, names=names),),
    }


_LAYER = {
    "attention/qkv": "attention.query_key_value",
    "attention/out": "attention.dense",
    "mlp/up": "mlp.dense_h_to_4h",
    "mlp/down": "mlp.dense_4h_to_h",
    "norm_attention": "input_layernorm",
    "norm_mlp": "post_attention_layernorm",
}
FAMILY = Family(
    _fields,
    family.modules(
        {"embedding": "embed_in", "norm": "final_layer_norm", "head": "lm_head"}, _LAYER
    ),
    prefix="gpt_neox.",
    skipped=r"layers\.\d+\.attention\.((masked_)?bias|rotary_emb\.inv_freq)",
    renamed={"embed_out.weight": "lm_head.weight"},  # of the published files
    resized=family.WHOLE_HEADS,
)
