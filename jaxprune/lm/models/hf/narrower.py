"""A decoder with a narrower residual stream: the one whose channels are zero, exactly.

A root mean square over d channels of which all but k are zero is sqrt(k/d) times that
over the k. So the narrower model carries sqrt(k/d) times the residual stream: what
writes into it is scaled by that, and the gains of the norms that read it by the
inverse. Then the mean squares are those of before, so the epsilon that all norms share
stays, and norms of queries and keys, which are over other axes, are not touched. Gemma,
whose embedding is scaled by the square root of the width, scales it so by itself.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxprune.arrays import lazy, rules, tree
from jaxprune.arrays.rules import Rule
from jaxprune.lm.models.decoder.config import DecoderConfig
from jaxprune.lm.models.hf.smaller import EMBEDDING, changed_axes
from jaxprune.lm.models.hf.smaller_config import with_width

WRITERS = re.compile(r"layers/\d+/(attention/out|mlp/(shared/)?down)/")
"""The beginnings of leaves that write into the stream, the embedding aside."""

_READING_NORMS = re.compile(r"layers/\d+/(norm_attention|norm_mlp)/")

_RULES = (
    # A LayerNorm subtracts a mean, which the channels that stay do not have.
    Rule(
        lambda v: v.norm.startswith("rms"),
        "channels can go where norms divide by a root mean square alone, but those of "
        "this model subtract the mean of all channels too (LayerNorm)",
        "remove neurons, heads or layers instead",
    ),
    Rule(
        lambda v: v.kept and v.kept == sorted({*v.kept} & {*range(v.width)}),
        "kept channels must be ascending numbers from 0 to {last}, at least one, got "
        "{count} of them",
    ),
)


def check_channels(config: DecoderConfig, kept: Sequence[int]) -> None:
    """Refuses channels that are none, and norms that need all of them.

    Args:
      config: shape of the decoder.
      kept: numbers of the channels that stay.

    Raises:
      ValueError: the norms subtract a mean, or `kept` are not ascending numbers of
        channels.
    """
    width = config.width
    rules.check(
        _RULES,
        norm=config.norm,
        kept=[*map(int, kept)],
        width=width,
        last=width - 1,
        count=len(kept),
    )


def keep_channels(
    config: DecoderConfig, params: Any, kept: Sequence[int]
) -> tuple[DecoderConfig, Any]:
    """A decoder with some channels of its residual stream only.

    It computes what the decoder computes where nothing writes into the channels that
    go: their columns of the embedding, of the output and the down projections are zero.

    Args:
      config: shape of the decoder.
      params: parameters of it, arrays or lazy ones, which are read.
      kept: numbers of the channels that stay, ascending.

    Returns:
      The smaller shape and its parameters.

    Raises:
      ValueError: the norms subtract a mean, or `kept` are not ascending numbers of
        channels.

    Example:
      >>> from flax import nnx
      >>> from jaxprune.lm.models.decoder.model import Decoder
      >>> config = DecoderConfig(
      ...     vocab_size=65, context=32, layers=1, width=16, heads=2, kv_heads=2,
      ...     head_dim=8, mlp_width=32,
      ... )
      >>> params = nnx.state(Decoder(config, rngs=nnx.Rngs(0)), nnx.Param)
      >>> small, params = keep_channels(config, params, range(0, 16, 2))
      >>> small.width, params["layers"][0]["mlp"]["down"]["kernel"].shape
      (8, (32, 8))
    """
    check_channels(config, kept)
    channels = np.asarray(kept)
    small = with_width(config, len(channels))
    axes = changed_axes(config, small)
    factors = _Factors(config, small)
    leaves = []
    for name, leaf in tree.named_leaves(params).items():
        if name in axes:
            factor = factors.of(name)
            leaf = jnp.take(lazy.array(leaf), channels, axes[name])
            leaf = _scaled(leaf, factor, plus_one=factors.holds_gain_less_one(name))
        leaves.append(leaf)
    return small, jax.tree.unflatten(jax.tree.structure(params), leaves)


class _Factors:
    """What each leaf is multiplied by."""

    def __init__(self, config: DecoderConfig, small: DecoderConfig) -> None:
        self._config = config
        self.stream = math.sqrt(small.width / config.width)
        # What the factor on the embedding does not do by itself, its rows do.
        scale = config.embedding_scale / small.embedding_scale
        self.embedding = self.stream * scale

    def of(self, name: str) -> float:
        """The factor of a leaf that has an axis of channels."""
        if name == EMBEDDING:
            return self.embedding
        if name == "norm/scale":
            # A tied head is the embedding, so the norm before it undoes its factor.
            undone = self.embedding if self._config.tie_weights else 1.0
            return 1 / (self.stream * undone)
        if WRITERS.match(name):
            return self.stream
        if _READING_NORMS.match(name):
            return 1 / self.stream
        # Norms behind attention and MLP are given sqrt(k/d) times what they were, and
        # so pass on. Without norms before them the matrices read the stream itself.
        reads_stream = self._config.block == "post" and name.endswith("/kernel")
        return 1 / self.stream if reads_stream and name != "head/kernel" else 1.0

    def holds_gain_less_one(self, name: str) -> bool:
        """Whether a leaf is a gain of Gemma's, which is stored less 1."""
        return self._config.norm == "rms_plus_one" and name.endswith("/scale")


def _scaled(
    leaf: Float[Array, "..."], factor: float, *, plus_one: bool
) -> Float[Array, "..."]:
    """A leaf times a factor, rounded once to its dtype."""
    if factor == 1:
        return leaf
    weight = leaf.astype(jnp.float32)
    weight = (1 + weight) * factor - 1 if plus_one else weight * factor
    return weight.astype(leaf.dtype)
