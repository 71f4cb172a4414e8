"""Falcon: q, k and v in one matrix, attention and MLP at once, with one norm or two.

Three generations have one class: `multi_query` (7B), without it, and
`new_decoder_architecture` (40B and later), whose key heads serve groups.
"""

from collections.abc import Mapping
from typing import Any

from jaxprune.lm.models.decoder.config import Blocks
from jaxprune.lm.models.hf import rope_config
from jaxprune.lm.models.hf.config_reader import Attributes
from jaxprune.lm.models.hf.families import family
from jaxprune.lm.models.hf.families.family import Family, Fields


def _fields(a: Attributes) -> Fields:
    fields = family.sizes_of_whole_heads(a, tied=True, longest=2048)
    return {
        **fields,
        "activation": family.activation(a, "activation", "gelu"),
        "kv_heads": _kv_heads(a, fields["heads"]),
        "mlp_width": a.size("ffn_hidden_size", 4 * fields["width"]),
        "norm_epsilon": a.number("layer_norm_epsilon", 1e-5),
        "block": _block(a),
        "fused": True,
        "fused_by_head": True,
        **dict.fromkeys(("qkv_bias", "out_bias", "mlp_bias"), a.flag("bias", False)),
        "ropes": (rope_config.one(a, fields),),
    }


def _kv_heads(a: Attributes, heads: int) -> int:
    new = a.flag("new_decoder_architecture", False)
    per_head = not a.flag("multi_query", True)
    kv_heads = a.size("num_kv_heads", heads)
    if per_head and not new and kv_heads != heads:
        a.wrong("num_kv_heads", f"num_attention_heads={heads} here", kv_heads)
    return kv_heads if new or per_head else 1


def _block(a: Attributes) -> Blocks:
    new, parallel = (
        a.flag("new_decoder_architecture", False),
        a.flag("parallel_attn", True),
    )
    norms = a.size("num_ln_in_parallel_attn", 2 if new else 1)
    if norms > 2 or (norms == 2 and not new):
        rule = "1 or 2" if new else "1, unless new_decoder_architecture is true"
        a.wrong("num_ln_in_parallel_attn", rule, norms)
    if new and not parallel:
        a.wrong("parallel_attn", "true with new_decoder_architecture", parallel)
    if not parallel:
        return "pre"
    return "parallel" if norms == 2 else "parallel_shared"


def _names_of_norms(config: Mapping[str, Any]) -> dict[str, str]:
    """The two norms of the newest generation have names of their own."""
    two_norms = config.get("num_ln_in_parallel_attn") in (None, 2)
    if not config.get("new_decoder_architecture") or not two_norms:
        return {}
    return {"layers/norm_attention": "h.{}.ln_attn", "layers/norm_mlp": "h.{}.ln_mlp"}


_LAYER = {
    "attention/qkv": "self_attention.query_key_value",
    "attention/out": "self_attention.dense",
    "mlp/up": "mlp.dense_h_to_4h",
    "mlp/down": "mlp.dense_4h_to_h",
    "norm_attention": "input_layernorm",
    "norm_mlp": "post_attention_layernorm",
}
FAMILY = Family(
    _fields,
    family.modules(
        {"embedding": "word_embeddings", "norm": "ln_f", "head": "lm_head"}, _LAYER, "h"
    ),
    only={"alibi": False, "apply_residual_connection_post_layernorm": False},
    prefix="transformer.",
    skipped=r"h\.\d+\.self_attention\.rotary_emb\.inv_freq",
    variant=_names_of_norms,
    resized={"layers": "num_hidden_layers", "mlp_width": "ffn_hidden_size"},
)
