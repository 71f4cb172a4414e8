"""Where each tensor of a directory lies in MaxText's parameters, and how.

Layers are stacked on axis 1, as MaxText scans over them; inputs come first and heads
have an axis of their own.
"""

import functools
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jaxprune.lm.checkpoints.checkpoint_dir import CheckpointDir
from jaxprune.lm.models.decoder.config import DecoderConfig

_PERIOD = 6  # MaxText scans over five windows and a layer without, and their like
# Hugging Face's names inside a layer, and MaxText's.
_IN_LAYER = {
    "self_attn.q_proj": "self_attention/query/kernel",
    "self_attn.k_proj": "self_attention/key/kernel",
    "self_attn.v_proj": "self_attention/value/kernel",
    "self_attn.o_proj": "self_attention/out/kernel",
    "self_attn.q_norm": "self_attention/query_norm/scale",
    "self_attn.k_norm": "self_attention/key_norm/scale",
    "mlp.gate_proj": "mlp/wi_0/kernel",
    "mlp.up_proj": "mlp/wi_1/kernel",
    "mlp.down_proj": "mlp/wo/kernel",
    "input_layernorm": "pre_self_attention_layer_norm/scale",
    "post_attention_layernorm": "post_self_attention_layer_norm/scale",
}
_GEMMA_NORMS = {
    "input_layernorm": "pre_self_attention_norm/scale",
    "post_attention_layernorm": "post_self_attention_norm/scale",
    "pre_feedforward_layernorm": "pre_ffw_norm/scale",
    "post_feedforward_layernorm": "post_ffw_norm/scale",
}
_OUTSIDE = {
    "embed_tokens": "token_embedder/embedding",
    "norm": "decoder/decoder_norm/scale",
    "lm_head": "decoder/logits_dense/kernel",
}


class Place(NamedTuple):
    """Where a tensor lies.

    Attributes:
      path: name of the parameter.
      position: number of the layer in its stack; None where there is no stack.
    """

    path: str
    position: int | None = None


def maxtext_place(name: str, config: DecoderConfig, *, gemma: bool) -> Place:
    """The place of a tensor of a directory."""
    short = name.removeprefix("model.").removesuffix(".weight")
    if not (match := re.fullmatch(r"layers\.(\d+)\.(.*)", short)):
        return Place(_OUTSIDE[short])
    layer, in_layer = int(match[1]), (_IN_LAYER | (_GEMMA_NORMS if gemma else {}))
    path = in_layer[match[2]]
    if not gemma:
        return Place(f"decoder/layers/{path}", layer)
    # Whole periods are scanned over, what is left over is not.
    scanned = config.layers - config.layers % _PERIOD
    if layer < scanned:
        position, number = divmod(layer, _PERIOD)
        return Place(f"decoder/layers/layers_{number}/{path}", position)
    return Place(f"decoder/layers_remainder/layers_{layer - scanned}/{path}")


def to_maxtext(
    tensor: np.ndarray, path: str, config: DecoderConfig, *, gemma: bool
) -> np.ndarray:
    """A tensor as MaxText has it: inputs first, heads apart."""
    if path.endswith("/scale"):
        # A Gemma's norm scales by 1 + w in its files, by w in MaxText.
        return (tensor + np.asarray(1, tensor.dtype)) if gemma else tensor
    if path.endswith("/embedding"):
        factor = _embedding_factor(config)
        return (tensor * factor).astype(tensor.dtype) if gemma else tensor
    # Torch stores (out, in); zeros stay zeros through all that follows.
    kernel = np.ascontiguousarray(tensor.T)  # (in, out)
    part = path.split("/")[-2]
    if part == "out":
        # (heads, size, width)
        return kernel.reshape(config.heads, config.head_dim, config.width)
    if part not in ("query", "key", "value"):
        return kernel
    heads = config.heads if part == "query" else config.kv_heads
    if _is_scaled(part, config):
        kernel = (kernel.astype(np.float32) * _score_scale(config)).astype(tensor.dtype)
    return kernel.reshape(config.width, heads, config.head_dim)  # (width, heads, size)


def from_maxtext(
    leaf: Any, place: Place, config: DecoderConfig, *, gemma: bool
) -> np.ndarray:
    """The tensor that `to_maxtext` made a parameter, or its layer, of; in float32."""
    array = np.asarray(leaf, np.float32)  # so that the factors do not round it
    if place.position is not None:
        array = array[:, place.position]  # (in, layers, ...)
    if place.path.endswith("/scale"):
        return (array - 1) if gemma else array
    if place.path.endswith("/embedding"):
        return array / np.float32(_embedding_factor(config)) if gemma else array
    part = place.path.split("/")[-2]
    if part == "out":  # (heads, size, width)
        return array.reshape(-1, config.width).T
    if _is_scaled(part, config):
        array = array / _score_scale(config)
    return array.reshape(len(array), -1).T  # (out, in)


def _embedding_factor(config: DecoderConfig) -> np.ndarray:
    """What a Gemma multiplies its embedding by, which MaxText keeps in it."""
    return ml_dtypes.bfloat16(math.sqrt(config.width))


def _is_scaled(part: str, config: DecoderConfig) -> bool:
    """Whether MaxText has the scale of the scores in this kernel: its Llama has."""
    return part == "query" and config.qk_norm is None


def _score_scale(config: DecoderConfig) -> np.floating[Any]:
    return np.float32(1 / math.sqrt(config.head_dim))


def maxtext_origin(
    name: str, opened: CheckpointDir, config: DecoderConfig
) -> tuple[str, Callable[[Any], np.ndarray]]:
    """Where a tensor of a directory comes from, once MaxText has trained it.

    Args:
      name: name of the tensor.
      opened: the directory.
      config: shape of its model.

    Returns:
      The path of MaxText's parameter, and the function that takes the tensor out of it.
    """
    gemma = opened.config["model_type"] == "gemma3_text"
    place = maxtext_place(name, config, gemma=gemma)
    return place.path, functools.partial(
        from_maxtext, place=place, config=config, gemma=gemma
    )
