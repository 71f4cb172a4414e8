"""Weights used twice, batches of two kinds, keys, float64, samples left out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from tests.support.small_models import quick_compilation as quick_compilation


def draw(i, *shape):
    return jnp.asarray(np.random.default_rng(i).normal(size=shape), jnp.float32)


def prune(fn, params, batches, sparsity=0.5, method="wanda", **how):
    return jp.prune_trained(fn, params, batches, method, sparsity, **how)


def test_a_weight_used_twice_is_pruned_for_both_inputs_whichever_comes_first():
    def fn(params, x):
        hidden = 100 * jnp.tanh(x @ params["A"])
        return hidden @ params["W"], x @ params["W"]

    params, x = {"A": draw(0, 8, 8), "W": draw(1, 8, 8)}, draw(2, 64, 8)
    found = prune(fn, params, [x], prunable=lambda name, leaf: name == "W").params["W"]
    both = jnp.concatenate([x, 100 * jnp.tanh(x @ params["A"])])
    alone = prune(lambda p, x: x @ p["W"], {"W": params["W"]}, [both]).params["W"]
    np.testing.assert_array_equal(found == 0, alone == 0)
    only = prune(lambda p, x: x @ p["W"], {"W": params["W"]}, [x]).params["W"]
    assert ((only == 0) != (alone == 0)).any()


def test_batches_that_group_the_weights_in_two_ways_are_added_up():
    def fn(params, batch):
        out = batch["a"] @ params["q"], batch["a"] @ params["k"]
        if "b" in batch:
            out += (batch["b"] @ params["q"], batch["b"] @ params["k"])
        return out

    ones = jnp.ones((4, 8))
    batches = [{"a": 100 * ones}, {"a": ones, "b": ones}]
    params = {"q": draw(0, 8, 8), "k": draw(1, 8, 8)}
    for order in (batches, batches[::-1]):
        for own in jp.calibrate(fn, params, order).values():
            assert own.samples == 12
            np.testing.assert_allclose(own.mean_square, 40_008 / 12, rtol=1e-6)


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_float64_keeps_its_digits_where_a_weight_stays(method):
    with jax.enable_x64(True):
        weight = jnp.asarray(np.random.default_rng(0).normal(size=(8, 8)))
        x = jnp.asarray(np.random.default_rng(1).normal(size=(32, 8)))
        found = prune(lambda p, x: x @ p["w"], {"w": weight}, [x], method=method)
        kept = np.asarray(found.params["w"])
        assert (kept == 0).sum() == 32
        np.testing.assert_array_equal(kept[kept != 0], np.asarray(weight)[kept != 0])


@pytest.mark.full
@pytest.mark.parametrize("wrong", [jnp.nan, 1e6])
def test_samples_that_do_not_count_are_in_no_error(wrong):
    def fn(params, x):
        return jnp.tanh(x @ params["A"]) @ params["B"]

    params, x = {"A": draw(0, 8, 8), "B": draw(1, 8, 8)}, draw(2, 600, 8)
    long = jnp.concatenate([jnp.full((300, 8), wrong), x])
    counts = jnp.arange(900) >= 300
    found = prune(fn, params, [long], positions=lambda x: counts)
    alone = prune(fn, params, [x])
    for own, expected in zip(
        found.report["weights"], alone.report["weights"], strict=True
    ):
        np.testing.assert_allclose(own["error"], expected["error"], rtol=1e-4)
        assert 0 < own["error"] < 1
    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])
    over = prune(fn, params, [long] * 2, positions=lambda x: counts, mesh=mesh)
    for own, row in zip(found.report["weights"], over.report["weights"], strict=True):
        np.testing.assert_allclose(own["error"], row["error"], rtol=1e-4)


@pytest.mark.parametrize(
    "positions", [jnp.arange(16), [True] * 16], ids=["ids", "list"]
)
def test_positions_that_are_no_booleans_are_refused(positions):
    with pytest.raises(TypeError, match="positions must be an array of booleans, got"):
        prune(
            lambda p, x: x @ p["A"], {"A": draw(0, 8, 8)}, [draw(1, 16, 8)],
            positions=lambda x: positions,
        )  # fmt: skip


def test_keys_among_parameters_and_batches_are_carried_along(tmp_path):
    def fn(params, batch):
        kept = jax.random.bernoulli(params["key"], 0.5, (16, 8))
        more = jax.random.bernoulli(batch["key"], 0.5, (16, 8))
        return jnp.where(kept & more, jnp.tanh(batch["x"] @ params["A"]), 0)

    params = {"A": draw(0, 8, 8), "key": jax.random.key(1)}
    batches = [{"x": draw(i, 16, 8), "key": jax.random.key(i)} for i in (2, 3)]
    found = prune(fn, params, batches, directory=tmp_path).params["A"]
    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])
    other = prune(fn, params, batches, mesh=mesh).params["A"]
    np.testing.assert_array_equal(np.asarray(found), np.asarray(other))


def test_a_complex_input_is_not_seen_rather_than_halved():
    x = draw(0, 8, 8) + 100j * draw(1, 8, 8)
    found = jp.trace(lambda p, x: jnp.abs(x @ p["A"]), {"A": draw(2, 8, 8)}, x)
    assert not found.linear_ops
    assert "A" in found.unseen
