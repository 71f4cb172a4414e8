"""Where each tensor of a directory lies in Tunix's parameters, and how.

Tunix reads safetensors itself; this is the way back. Its kernels have inputs first and
heads apart, and a Gemma 3's keys and values, or all three, are one parameter.
"""

import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from jaxprune.lm.checkpoints.checkpoint_dir import CheckpointDir
from jaxprune.lm.models.decoder.config import DecoderConfig

_IN_LAYER = {
    "self_attn.q_proj": "attn/q_proj/w",
    "self_attn.k_proj": "attn/k_proj/w",
    "self_attn.v_proj": "attn/v_proj/w",
    "self_attn.o_proj": "attn/o_proj/w",
    "self_attn.q_norm": "attn/q_norm/w",
    "self_attn.k_norm": "attn/k_norm/w",
    "mlp.gate_proj": "mlp/gate_proj/kernel",
    "mlp.up_proj": "mlp/up_proj/kernel",
    "mlp.down_proj": "mlp/down_proj/kernel",
    "input_layernorm": "input_layernorm/w",
    "post_attention_layernorm": "post_attention_layernorm/w",
}
_OUTSIDE = {
    "embed_tokens": "embedder/input_embedding",
    "norm": "final_norm/w",
    "lm_head": "lm_head/w",
}
# What a Gemma 3 has in another place than a Llama or Qwen 3.
_IN_GEMMA_LAYER = {
    "self_attn.o_proj": "attn/attn_vec_einsum/w",
    "self_attn.q_norm": "attn/_query_norm/scale",
    "self_attn.k_norm": "attn/_key_norm/scale",
    "input_layernorm": "pre_attention_norm/scale",
    "post_attention_layernorm": "post_attention_norm/scale",
    "pre_feedforward_layernorm": "pre_ffw_norm/scale",
    "post_feedforward_layernorm": "post_ffw_norm/scale",
}
# A Gemma 3's einsums, with as many heads for keys as for queries and with fewer.
_FUSED = {
    "self_attn.q_proj": ("attn/qkv_einsum/w", 0),
    "self_attn.k_proj": ("attn/qkv_einsum/w", 1),
    "self_attn.v_proj": ("attn/qkv_einsum/w", 2),
}
_GROUPED = {
    "self_attn.q_proj": ("attn/q_einsum/w", None),
    "self_attn.k_proj": ("attn/kv_einsum/w", 0),
    "self_attn.v_proj": ("attn/kv_einsum/w", 1),
}


class Place(NamedTuple):
    """Where a tensor lies.

    Attributes:
      path: name of the parameter.
      position: number of the einsum in it; None where it is one.
      heads_first: whether heads come before inputs: (heads, in, size).
    """

    path: str
    position: int | None = None
    heads_first: bool = False


def tunix_place(name: str, *, gemma: bool, grouped: bool) -> Place:
    """The place of a tensor of a directory."""
    short = name.removeprefix("model.").removesuffix(".weight")
    if not (match := re.fullmatch(r"layers\.(\d+)\.(.*)", short)):
        path = _OUTSIDE[short]
        # A Gemma's norms have scales, the others' weights; its head is its embedding.
        return Place(path.replace("/w", "/scale") if gemma else path)
    layer, part = f"layers/{match[1]}/", match[2]
    einsums = _GROUPED if grouped else _FUSED
    if gemma and part in einsums:
        path, position = einsums[part]
        return Place(layer + path, position, heads_first=True)
    return Place(layer + (_IN_LAYER | (_IN_GEMMA_LAYER if gemma else {}))[part])


def from_tunix(leaf: Any, place: Place, shape: tuple[int, ...]) -> np.ndarray:
    """The tensor that Tunix made a parameter, or a part of it, of."""
    array = np.asarray(leaf)
    if place.position is not None:
        array = array[place.position]  # (einsums, heads, in, size)
    if place.heads_first:
        array = np.moveaxis(array, 0, 1)  # (in, heads, size)
    # Norms and the embedding lie as they are stored: (width,), (vocabulary, width).
    if len(shape) < 2 or place.path == _OUTSIDE["embed_tokens"]:
        return array
    return array.reshape(shape[::-1]).T  # (out, in)


def tunix_origin(
    name: str, opened: CheckpointDir, config: DecoderConfig
) -> tuple[str, Callable[[Any], np.ndarray]]:
    """Where a tensor of a directory comes from, once Tunix has trained it.

    Args:
      name: name of the tensor.
      opened: the directory.
      config: shape of its model.

    Returns:
      The path of Tunix's parameter, and the function that takes the tensor out of it.
    """
    gemma = opened.config["model_type"] == "gemma3_text"
    place = tunix_place(name, gemma=gemma, grouped=config.heads != config.kv_heads)
    shape = opened.tensors[name].shape
    return place.path, functools.partial(from_tunix, place=place, shape=shape)
