"""An average is of the numbers that the leaf holds, in every float that JAX has."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

import jaxprune as jp
from tests.support import oracles

NARROW = [
    "float16",
    "bfloat16",
    "float8_e3m4",
    "float8_e4m3",
    "float8_e4m3fn",
    "float8_e4m3fnuz",
    "float8_e4m3b11fnuz",
    "float8_e5m2",
    "float8_e5m2fnuz",
]


def every_number(dtype):
    """All finite numbers of a dtype; of 16 bits one in 37, with the ends."""
    bits = 8 * np.dtype(dtype).itemsize
    codes = np.arange(1 << bits, dtype=f"uint{bits}")
    if bits == 16:
        codes = np.concatenate([codes[::37], codes[:40], codes[0x7BF0:0x7C00]])
    values = codes.view(dtype)
    values = values[np.isfinite(values.astype(np.float32))]
    if dtype == "bfloat16":  # its subnormals are float32's, which backends may flush
        size = np.abs(values.astype(np.float64))
        values = values[(size == 0) | (size >= 2.0**-126)]
    return values


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", NARROW)
def test_the_average_of_one_snapshot_is_the_weight(dtype, compiled):
    values = every_number(dtype)
    params = {"w": jnp.asarray(values)}
    tx = jp.track_importance()
    update = jax.jit(tx.update) if compiled else tx.update
    _, state = update({"w": jnp.zeros_like(params["w"])}, tx.init(params), params)
    held = np.asarray(jp.get_importance(state).weight["w"])
    np.testing.assert_array_equal(held, values.astype(np.float32))


@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_where_float16_has_its_smallest_numbers_are_squared(compiled):
    gradient = np.random.default_rng(0).normal(size=(16, 16)) * 2e-5
    gradient = {"w": jnp.asarray(gradient, jnp.float16)}
    tx = jp.track_gradients()
    update = jax.jit(tx.update) if compiled else tx.update
    _, state = update(gradient, tx.init(gradient), gradient)
    want = oracles.mean_square(np.asarray(gradient["w"], np.float64)[None])
    held = np.asarray(jp.get_importance(state).square["w"])
    np.testing.assert_allclose(held, want, rtol=1e-6)


@pytest.mark.parametrize("dtype", NARROW)
def test_a_sum_is_rounded_before_it_is_averaged(dtype):
    """A program that adds, rounds and averages in one, as a training step does."""
    random = np.random.default_rng(0)
    top = min(2.0, float(ml_dtypes.finfo(dtype).max) / 8)
    weight = {"w": jnp.asarray(random.normal(size=4000) * top, dtype)}
    step = {"w": jnp.asarray(random.normal(size=4000) * top * 1e-2, dtype)}
    tx = jp.track_importance()

    @jax.jit
    def one(step, weight):
        after = optax.apply_updates(weight, step)
        return after, tx.update(step, tx.init(weight), weight)[1]

    after, state = one(step, weight)
    held = np.asarray(jp.get_importance(state).weight["w"])
    np.testing.assert_array_equal(held, np.asarray(after["w"]).astype(np.float32))
