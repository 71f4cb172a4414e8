"""Zeroing a group is removing it, in random functions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import jaxprune as jp
from tests.support.removal import check
from tests.support.small_models import draw

X = draw(0, 3, 8)


def dense(rng, params, x, width, name):
    kernel = rng.normal(0, 0.5, (x.shape[-1], width)).astype(np.float32)
    params.setdefault(name, kernel)
    return x @ params[name]


def random_function(seed, depth):
    """A function of random steps, and its parameters: made as it runs first."""

    def fn(params, x):
        rng = np.random.default_rng(seed)
        for i in range(depth):
            x = random_step(rng, params, x, i)
        return dense(rng, params, x, 3, "last")

    params = {}
    jax.eval_shape(functools.partial(fn, params), jnp.zeros((3, 8)))
    return fn, params


def random_step(rng, params, x, i):
    kind = rng.integers(12)
    act = [jnp.tanh, jax.nn.relu, jax.nn.gelu, jax.nn.sigmoid, jnp.exp][rng.integers(5)]
    wide = int(rng.choice([4, 6, 8, 12]))
    layer = functools.partial(dense, rng, params)
    if kind == 0:
        return act(jnp.clip(layer(x, wide, f"{i}"), -2, 2))
    if kind == 1:
        return act(jnp.tanh(layer(x, wide, f"{i}a"))) * layer(x, wide, f"{i}b")
    if kind == 2:
        return x + layer(act(jnp.tanh(layer(x, wide, f"{i}a"))), x.shape[-1], f"{i}b")
    if kind == 3:
        square = jnp.mean(jnp.square(x), -1, keepdims=True)
        return x * jax.lax.rsqrt(square + 1e-3)
    if kind == 4:
        return jax.nn.standardize(x, epsilon=1e-3)
    if kind == 5:
        half = x.shape[-1] // 2
        return jnp.concatenate([x[:, half:], jnp.tanh(x[:, :half])], -1)
    if kind == 6:
        heads = layer(x, 12, f"{i}").reshape(x.shape[0], 3, 4)
        heads = jax.nn.softmax(heads, -1) if rng.integers(2) else jnp.tanh(heads)
        return heads.reshape(x.shape[0], 12)
    if kind == 7:
        one, two = jnp.split(layer(x, 2 * wide, f"{i}"), 2, -1)
        return jnp.maximum(one, two)
    if kind == 8:
        heads = layer(x, 12, f"{i}").reshape(x.shape[0], 4, 3)
        return jnp.sum(jnp.square(heads), 1) + jnp.max(heads, 1)
    if kind == 9:
        return jnp.where(x > 0, x, 0.1 * x) / (1 + jnp.abs(x))
    if kind == 10:
        return jnp.repeat(jnp.tanh(x), 2, -1)
    return jnp.pad(x, ((0, 0), (1, 1))) * 0.5


def zeroing_is_removing(seed, depth):
    fn, params = random_function(seed, depth)
    groups = jp.axis_groups(fn, params, X)
    rng = np.random.default_rng(seed)
    shares = {
        group.name: float(rng.choice([1.0, 0.7, 0.5]))
        for group in groups
        if group.removable
    }
    assume(any(share < 1 for share in shares.values()))
    check(fn, params, X, shares, seed=seed)


@settings(max_examples=5)
@given(seed=st.integers(0, 10**6), depth=st.integers(2, 6))
def test_zeroing_is_removing_in_random_functions(seed, depth):
    zeroing_is_removing(seed, depth)


@pytest.mark.full
@settings(max_examples=60)
@given(seed=st.integers(0, 10**6), depth=st.integers(1, 6))
def test_zeroing_is_removing_in_many_random_functions(seed, depth):
    zeroing_is_removing(seed, depth)
