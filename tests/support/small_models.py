"""Tiny models that tests share, and what pruning must make of them, by hand.

What is done by hand is float64 NumPy, layer after layer, written from what the public
docstrings say and with no use of the traced program.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from jaxprune.posttraining.passes.chaining import as_chain
from tests.support import oracles


@pytest.fixture(autouse=True, scope="module")
def quick_compilation():
    """For a module that imports it: programs run once, so XLA need not polish them."""
    asked = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", asked)


def prune(fn, params, batches, method="magnitude", sparsity=0.5, **options):
    """`jp.prune_trained`; options that it lacks are settings of the pass."""
    settings = {"pattern", "allocation", "inputs", "damping", "relative"} & {*options}
    passes = as_chain(method).with_settings(**{k: options.pop(k) for k in settings})
    return jp.prune_trained(fn, params, batches, passes, sparsity, **options)


def draw(seed, *shape):
    """Normal float32 numbers; no two weights of a test have nearly equal scores."""
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def correlated(seed, samples, width):
    """Inputs whose features go together and differ in scale, as in real layers."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(width // 2, width)) + 0.1
    noise = 0.3 * rng.normal(size=(samples, width))
    scale = np.exp(rng.normal(size=width))
    x = (rng.normal(size=(samples, width // 2)) @ mixing + noise) * scale
    return x.astype(np.float32)


def hessian(x, counted=None):
    """X^T X / samples of (batch, samples, in), over the samples that count."""
    x = np.asarray(x, np.float64)
    if counted is not None:
        x = x[:, np.ravel(counted)]
    return np.einsum("bsi,bsj->bij", x, x) / x.shape[1]


def mean_square(x, counted=None):
    """The mean square of each feature, (batch, in)."""
    return np.einsum("bii->bi", hessian(x, counted))


def filled(abstract, seed=0):
    """Numbers in the place of `ShapeDtypeStruct`s; nothing is compiled for it."""
    leaves, structure = jax.tree.flatten(abstract)
    drawn = [
        jnp.asarray(draw(seed + i, *leaf.shape) / 2, leaf.dtype)
        for i, leaf in enumerate(leaves)
    ]
    return jax.tree.unflatten(structure, drawn)


# A chain of layers: x <- tanh(x @ kernel + bias), the last one without tanh.


def chain(widths, seed=0, dtype=np.float32):
    """Parameters {"layer_0": {"kernel", "bias"}, ...}."""
    return {
        f"layer_{i}": {
            "kernel": jnp.asarray(draw(seed + i, a, b) / np.sqrt(a), dtype),
            "bias": jnp.asarray(draw(seed + 100 + i, b) / 10, dtype),
        }
        for i, (a, b) in enumerate(itertools.pairwise(widths))
    }


def run_chain(params, x):
    """The chain in JAX."""
    for i in range(len(params)):
        layer = params[f"layer_{i}"]
        x = x @ layer["kernel"] + layer["bias"][None]
        x = jnp.tanh(x) if i < len(params) - 1 else x
    return x


def chain_by_hand(params, batches, prune=None):
    """Layer by layer: each one's inputs, and its kernel after `prune`.

    Args:
      params: the chain's.
      batches: arrays (samples, in).
      prune: (number, kernel, the layer's inputs of all batches) to a new kernel.

    Returns:
      Inputs of each layer, all batches joined, and kernels.
    """
    values = [np.asarray(x, np.float64) for x in batches]
    inputs, kernels = [], []
    for i in range(len(params)):
        layer = jax.tree.map(lambda a: np.asarray(a, np.float64), params[f"layer_{i}"])
        inputs.append(np.concatenate(values))
        kernel = layer["kernel"]
        if prune is not None:
            kernel = np.asarray(prune(i, kernel, inputs[-1]), np.float64)
        kernels.append(kernel)
        values = [x @ kernel + layer["bias"] for x in values]
        values = [np.tanh(x) if i < len(params) - 1 else x for x in values]
    return inputs, kernels


def kernels_of(params):
    """A chain's kernels as NumPy, in order."""
    return [np.asarray(params[f"layer_{i}"]["kernel"]) for i in range(len(params))]


def keep_per_output(scores, removed):
    """Each output keeps its best inputs; the first outputs lose one more."""
    outputs = scores.shape[1]
    share, more = divmod(removed, outputs)
    columns = [
        oracles.keep_top(scores[:, j], share + (j < more)) for j in range(outputs)
    ]
    return np.stack(columns, 1)


def keep_tiles(scores, rows, columns, sparsity):
    """Whole tiles, those at the edge may be smaller, ranked by their mean."""
    height, width = -(-scores.shape[0] // rows), -(-scores.shape[1] // columns)
    tiles = [
        [
            np.s_[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
            for j in range(width)
        ]
        for i in range(height)
    ]
    means = np.array([[scores[tile].mean() for tile in row] for row in tiles])
    best = oracles.keep_top(means, oracles.removed_count(sparsity, means.size))
    kept = np.zeros(scores.shape, bool)
    for i, row in enumerate(tiles):
        for j, tile in enumerate(row):
            kept[tile] = best[i, j]
    return kept
