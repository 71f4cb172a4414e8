"""An average is of the numbers that the leaf holds, in every float that JAX has."""

import functools
import os

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
    "float8_e4m3fn",
    *(
        pytest.param(name, marks=pytest.mark.full)
        for name in (
            "float8_e3m4",
            "float8_e4m3",
            "float8_e4m3fnuz",
            "float8_e4m3b11fnuz",
            "float8_e5m2",
            "float8_e5m2fnuz",
        )
    ),
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


@pytest.mark.full
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", NARROW)
def test_the_average_of_one_snapshot_is_the_weight(dtype, compiled):
    if (
        dtype == "float8_e5m2fnuz"
        and "fusion_emitters=false" in os.environ["XLA_FLAGS"]
    ):
        pytest.skip("without its fusion emitters XLA rounds the least of them up")
    values = every_number(dtype)
    params = {"w": jnp.asarray(values)}
    tx = jp.track_importance()
    update = jax.jit(tx.update) if compiled else tx.update
    _, state = update({"w": np.zeros_like(values)}, tx.init(params), params)
    held = np.asarray(jp.get_importance(state).weight["w"])
    np.testing.assert_array_equal(held, values.astype(np.float32))


@pytest.mark.full
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


@functools.cache
def noise(field, snapshots=2000):
    """The exact average of every number, and what each storage holds."""
    track = jp.track_gradients if field == "square" else jp.track_importance
    storages = {"bfloat16", "int8"}
    txs = {storage: track(storage=storage) for storage in storages}

    def one(states, key):
        x = jax.random.normal(key, (4096,))
        x = x if field == "square" else 0.1 + 0.02 * x
        nothing = jnp.zeros_like(x)
        return {k: txs[k].update(x, states[k], nothing)[1] for k in storages}, x

    @jax.jit
    def run():
        states = {k: tx.init(jnp.zeros(4096)) for k, tx in txs.items()}
        keys = jax.random.split(jax.random.key(0), snapshots)
        return jax.lax.scan(one, states, keys)

    states, values = run()
    values = np.asarray(values, np.float64)
    if field == "square":
        exact = oracles.mean_square(values)
    else:
        exact = oracles.average(values, "power", 0.5)
    held = {k: getattr(jp.get_importance(states[k]), field) for k in storages}
    return exact, {k: np.asarray(v, np.float64) for k, v in held.items()}


# Percent: off by, too low by. The docstring of `track_importance` quotes the largest.
DOCUMENTED = [
    ("square", "bfloat16", 3.2, 0.4),
    ("square", "int8", 11.4, 1.5),
    ("weight", "bfloat16", 1.6, 0.0),
    ("weight", "int8", 4.9, 0.0),
]


@pytest.mark.full
@pytest.mark.parametrize(("field", "storage", "off", "low"), DOCUMENTED)
def test_noise_puts_a_lean_average_off_by_as_much_as_documented(
    field, storage, off, low
):
    exact, held = noise(field)
    error = 100 * (held[storage] / exact - 1)
    assert np.sqrt(np.mean(error**2)) == pytest.approx(off, abs=0.2)
    assert -error.mean() == pytest.approx(low, abs=0.15)


@pytest.mark.full
def test_before_its_start_a_tracker_makes_no_infinity():
    params = {"w": jnp.ones((2, 2), jnp.float16)}
    with jax.debug_infs(True), jax.debug_nans(True):
        for weighting in (jp.weightings.exponential(0.9), jp.weightings.power(0.5)):
            tx = jp.track_importance(weighting, start=2)
            state = tx.init(params)
            for _ in range(4):
                _, state = tx.update(params, state, params)
    held = jp.get_importance(state).weight["w"]
    np.testing.assert_array_equal(held, np.full((2, 2), 2.0))


@pytest.mark.full
def test_with_x64_everything_is_float32_still():
    with jax.enable_x64(True):
        params = {"w": jnp.asarray(np.arange(1.0, 17.0).reshape(4, 4))}
        assert params["w"].dtype == jnp.float64
        tx = jp.track_importance(average=("weight", "magnitude"))
        gradients = jp.track_gradients(average=("square", "taylor"))
        whole = optax.chain(gradients, optax.adam(0.1), tx)
        state = jax.jit(lambda own: whole.update(own, whole.init(own), own)[1])(params)
        importance = jp.get_importance(state)
        for average in importance:
            assert average["w"].dtype == jnp.float32
        names = (
            "random",
            "magnitude",
            "preconditioned_magnitude",
            "obd",
            "taylor",
            "threshold",
        )
        scores = jax.jit(
            lambda *read: {name: getattr(jp.scores, name)(*read) for name in names}
        )(params, importance)
        for name in names:
            assert scores[name]["w"].dtype == np.float32
        adapters = jp.contrib.lora(optax.sgd(0.1), rank=2).init(params).adapters
        assert {x["w"].dtype for x in adapters} == {np.dtype("float32")}
        tiny = {"w": jnp.asarray(np.array([[1e-50, 2e-50], [3e-50, 4e-50]]))}
        kept = jp.masks.make(tiny, 0.5)["w"]
        assert kept.tolist() == [[False, False], [True, True]]
