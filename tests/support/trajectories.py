"""Runs an optimizer over given gradients and writes down every step it takes."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx


class Recorded(NamedTuple):
    """What a run leaves; every leaf of `weights` and `updates` is (steps, ...)."""

    params: Any  # after the last step
    state: Any
    weights: Any  # after each step
    updates: Any  # as they leave the optimizer


class Pair(NamedTuple):
    """A pytree that is a tuple with names."""

    kernel: Any
    bias: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Module:
    """A pytree that is a dataclass, as Equinox's modules are."""

    kernel: Any
    bias: Any


def weights(dtype=jnp.float32, seed=0):
    """A matrix with a bias, and an embedding."""
    key = jax.random.split(jax.random.key(seed), 3)
    return {
        "layer": {
            "bias": jax.random.normal(key[0], (3,), dtype) * 0.1,
            "kernel": jax.random.normal(key[1], (4, 3), dtype),
        },
        "token_embedding": jax.random.normal(key[2], (5, 2), dtype),
    }


def containers():
    """The same two arrays in every kind of tree that users have."""
    kernel = jax.random.normal(jax.random.key(1), (4, 3))
    bias = jax.random.normal(jax.random.key(2), (3,))
    return {
        "dict": {"kernel": kernel, "bias": bias},
        "list in dict": {"blocks": [{"kernel": kernel}, {"bias": bias}]},
        "tuple": (kernel, (bias,)),
        "namedtuple": Pair(kernel, bias),
        "dataclass": Module(kernel, bias),
        "nnx.State": nnx.State(
            {"dense": {"kernel": nnx.Param(kernel), "bias": nnx.Param(bias)}}
        ),
    }


def gradients(params, steps, seed=7):
    """Random gradients, (steps, ...) a leaf, of very different sizes."""
    leaves, treedef = jax.tree.flatten(params)
    random = np.random.default_rng(seed)
    made = [
        random.normal(size=(steps, *x.shape)) * 10.0 ** random.integers(-3, 1, x.shape)
        for x in leaves
    ]
    return treedef.unflatten(
        [jnp.asarray(g, x.dtype) for g, x in zip(made, leaves, strict=True)]
    )


def record(tx, params, grads, **extra) -> Recorded:
    """Scans `tx` over `grads`; one compilation."""

    def step(carry, gradient):
        params, state = carry
        updates, state = tx.update(gradient, state, params, **extra)
        params = optax.apply_updates(params, updates)
        return (params, state), (params, updates)

    @jax.jit
    def run(params, state):
        return jax.lax.scan(step, (params, state), grads)

    (params, state), (after, updates) = run(params, tx.init(params))
    return Recorded(params, state, after, updates)


def array(x) -> np.ndarray:
    """Any leaf as float64, exactly."""
    return np.asarray(x).astype(np.float64)


def leaves(tree) -> list[np.ndarray]:
    """All leaves as float64."""
    return [array(x) for x in jax.tree.leaves(tree)]


def bits(x) -> np.ndarray:
    """The bit pattern, so that NaN equals NaN and -0 does not equal 0."""
    x = np.asarray(x)
    return x.view(np.dtype(f"u{x.dtype.itemsize}")) if x.size else x


def same_bits(a, b) -> bool:
    """Whether two trees are equal to the last bit, in dtype and in structure."""
    x, y = jax.tree.leaves(a), jax.tree.leaves(b)
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        p.dtype == q.dtype and np.array_equal(bits(p), bits(q))
        for p, q in zip(x, y, strict=True)
    )


def find(state, name):
    """Every field called `name` in an optimizer state, as a list of trees."""
    return [value for _, value in optax.tree.get_all_with_path(state, name)]
