"""A GPT of two layers, and its calls."""

import functools

import jax
import numpy as np
from flax import nnx

from experiments import gpt
from experiments.gpt.config import (
    GPTConfig,
)

TINY = GPTConfig(vocab_size=11, context=8, layers=2, heads=2, width=8)


@functools.cache
def make_model(config=TINY, seed=0):
    return gpt.GPT(config, rngs=nnx.Rngs(seed))


def larger(factor):
    """The model with all weights larger: at initialisation each repeats itself."""
    graphdef, params = nnx.split(make_model(), nnx.Param)
    return nnx.merge(graphdef, jax.tree.map(lambda x: factor * np.asarray(x), params))


@functools.partial(jax.jit, static_argnames="graphdef")
def call(graphdef, params, tokens, **options):
    return nnx.merge(graphdef, params)(tokens, **options)


def run(model, tokens, **options):
    """What the model gives; one program for each shape of one model."""
    return call(*nnx.split(model, nnx.Param), tokens, **options)


def make_tokens(shape=(3, 8), seed=0, config=TINY):
    rng = np.random.default_rng(seed)
    return rng.integers(0, config.vocab_size, shape).astype(np.int32)
