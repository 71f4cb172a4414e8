"""A decoder whose residual stream is in another basis: the same function, exactly.

A root mean square does not change under a rotation, but the gains behind it do. So the
gains of each norm that reads the stream go into the matrices behind it, which are all
that read what the norm gives; then embedding, writers and readers are rotated. A head
that is the embedding becomes one of its own, since the embedding takes no gains.

The gains' own root mean square stays in the norm, one gain for all channels, which a
rotation does not change. Where it is far below 1, as in SmolLM2 135M, matrices that
took it too were too small for the learning rate of a recovery
(docs/results/records/smaller_width.toml).

Reference:
  Ashkboos et al., "SliceGPT", 2024, arXiv 2401.15024, section 3.2. There each layer has
  a basis of its own, and the residual additions matrices between them, which no
  config.json can say; here one basis serves all layers.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxprune.arrays import lazy, rules, tree
from jaxprune.arrays.rules import Rule
from jaxprune.lm.models.decoder.config import DecoderConfig
from jaxprune.lm.models.hf.loading import abstract
from jaxprune.lm.models.hf.narrower import WRITERS
from jaxprune.lm.models.hf.smaller import EMBEDDING, changed_axes
from jaxprune.lm.models.hf.smaller_config import with_width

_HEAD = "head/kernel"

_RULES = (
    Rule(
        lambda v: v.norm.startswith("rms"),
        "a stream can be rotated where norms divide by a root mean square alone, but "
        "those of this model subtract the mean of all channels too (LayerNorm)",
    ),
    Rule(
        lambda v: v.block not in ("post", "sandwich"),
        "a stream can be rotated where the matrices behind a norm take its gains, but "
        "this model has norms whose output is added to the stream",
    ),
)


def can_rotate(config: DecoderConfig) -> bool:
    """Whether `rotate_channels` takes decoders of a shape.

    Args:
      config: shape of the decoder.

    Returns:
      Whether it does: its norms are RMSNorms, all before matrices.
    """
    return all(rule.holds(config) for rule in _RULES)


def rotate_channels(
    config: DecoderConfig, params: Any, basis: Float[Array, "width width"]
) -> tuple[DecoderConfig, Any]:
    """A decoder that computes the same with a residual stream of x @ basis for x.

    Args:
      config: shape of the decoder.
      params: parameters of it, arrays or lazy ones, which are read.
      basis: orthogonal matrix (width, width); its columns are the new channels.

    Returns:
      The shape, whose head is not the embedding, and the parameters in the dtypes of
      before; each norm that reads the stream has one gain for all channels.

    Raises:
      ValueError: the model is one that `can_rotate` says no of; the sentence says why.

    Example:
      >>> from jaxprune.lm.models.decoder.model import Decoder
      >>> config = DecoderConfig(
      ...     vocab_size=65, context=32, layers=1, width=16, heads=2, kv_heads=2,
      ...     head_dim=8, mlp_width=32,
      ... )
      >>> decoder = Decoder(config, rngs=nnx.Rngs(0))
      >>> basis = jax.random.orthogonal(jax.random.key(0), 16)
      >>> shape, params = rotate_channels(config, nnx.state(decoder, nnx.Param), basis)
      >>> graphdef, _ = nnx.split(abstract(shape), nnx.Param)
      >>> other, tokens = nnx.merge(graphdef, params), jnp.arange(8)[None]
      >>> bool(jnp.allclose(other(tokens)[0], decoder(tokens)[0], atol=1e-5))
      True
    """
    rules.check(_RULES, **vars(config))
    untied = dataclasses.replace(config, tie_weights=False)
    axes = changed_axes(untied, with_width(untied, config.width - 1))
    named = tree.named_leaves(params)
    if config.tie_weights:
        named[_HEAD] = lazy.array(named[EMBEDDING]).T
    rotated = {}
    for name, leaf in named.items():
        if name in axes:
            leaf = lazy.array(leaf)
            if name.endswith("/scale"):
                leaf = _one_gain(config, leaf)
            else:
                matrix = jnp.asarray(basis, jnp.float32)
                norm = _norm_before(config, name)
                if norm is not None:
                    scale = lazy.array(named[norm])
                    # By what stays as it is stored, rounded.
                    size = _gains(config, _one_gain(config, scale))
                    matrix = (_gains(config, scale) / size)[:, None] * matrix
                leaf = _times(leaf, axes[name], matrix)
        rotated[name] = leaf
    _, state = nnx.split(abstract(untied), nnx.Param)
    leaves = [rotated[name] for name in tree.names(state)]
    return untied, jax.tree.unflatten(jax.tree.structure(state), leaves)


def _norm_before(config: DecoderConfig, name: str) -> str | None:
    """The gains that a matrix takes, or None: it writes into the stream."""
    if name == _HEAD:
        return "norm/scale"
    if WRITERS.match(name) or not name.startswith("layers/"):  # embeddings
        return None
    layer, module = name.split("/")[1:3]
    if config.block == "parallel_shared":
        module = "attention"
    return f"layers/{layer}/norm_{module}/scale"


def _one_gain(
    config: DecoderConfig, scale: Float[Array, " width"]
) -> Float[Array, " width"]:
    """The root mean square of a norm's gains in the place of each, as it is stored."""
    size = jnp.sqrt(jnp.mean(jnp.square(_gains(config, scale))))
    size = jnp.where(size == 0, 1.0, size)
    return jnp.full_like(scale, size - _stored_less(config))


def _gains(
    config: DecoderConfig, scale: Float[Array, " width"]
) -> Float[Array, " width"]:
    return scale.astype(jnp.float32) + _stored_less(config)


def _stored_less(config: DecoderConfig) -> int:
    """What gains are stored less: 1 by Gemma."""
    return int(config.norm == "rms_plus_one")


def _times(
    leaf: Float[Array, "..."], axis: int, matrix: Float[Array, "width width"]
) -> Float[Array, "..."]:
    """A leaf whose channels are multiplied by a matrix; rounded once."""
    weight = jnp.moveaxis(leaf.astype(jnp.float32), axis, -1)
    weight = jnp.matmul(weight, matrix, precision="highest")
    return jnp.moveaxis(weight, -1, axis).astype(leaf.dtype)
