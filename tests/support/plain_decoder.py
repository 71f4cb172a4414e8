"""A small decoder without options, and decoders as they begin."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxprune.arrays import tree
from jaxprune.lm.models import hf
from jaxprune.lm.models.decoder import rope
from jaxprune.lm.models.decoder.model import DecoderConfig

PLAIN = DecoderConfig(
    vocab_size=97,
    context=64,
    layers=2,
    width=32,
    heads=4,
    kv_heads=2,
    head_dim=8,
    mlp_width=48,
    ropes=(rope.linear(1e4, 8),),
)


def initial(config, seed=0, scale=1.0):
    """A decoder as it begins, times `scale`, by NumPy: nothing is compiled for it."""
    graphdef, shapes = nnx.split(hf.abstract(config), nnx.Param)
    rng, leaves = np.random.default_rng(seed), []
    for name, leaf in tree.named_leaves(shapes).items():
        kind = name.rpartition("/")[2]
        value = {"scale": 1.0, "bias": 0.0}.get(kind, rng.normal(0, 0.02, leaf.shape))
        leaves.append(jnp.asarray(np.full(leaf.shape, scale * value, leaf.dtype)))
    return nnx.merge(graphdef, jax.tree.unflatten(jax.tree.structure(shapes), leaves))


@functools.cache
def plain():
    return initial(PLAIN)
