"""Tracking inside the containers of optax and Flax."""

import jax
import numpy as np
import optax
import pytest
from flax import nnx

import jaxprune as jp
from tests.support import oracles
from tests.support.averages import STEPS, assert_averages
from tests.support.trajectories import (
    gradients,
    leaves,
    record,
    weights,
)


def is_excluded(x):
    return isinstance(x, optax.MaskedNode)


def wrapped(name, track):
    """(optimizer, paths that are tracked) for each of optax's containers."""
    inner = optax.chain(optax.adamw(0.05), track)
    only = {"layer": {"kernel": True, "bias": False}, "token_embedding": False}
    labels = {"layer": {"kernel": "a", "bias": "b"}, "token_embedding": "b"}
    every = ["layer/bias", "layer/kernel", "token_embedding"]
    made = {
        "chain": (optax.chain(optax.clip(1.0), inner), every),
        "masked": (optax.masked(inner, only), ["layer/kernel"]),
        "masked by function": (optax.masked(inner, lambda p: only), ["layer/kernel"]),
        "partition": (
            optax.partition({"a": inner, "b": optax.sgd(0.1)}, labels),
            ["layer/kernel"],
        ),
        "two partitions": (
            optax.partition(
                {"a": inner, "b": optax.chain(optax.sgd(0.1), track)}, labels
            ),
            every,
        ),
        "apply_if_finite": (optax.apply_if_finite(inner, 3), every),
        "inject_hyperparams": (
            optax.inject_hyperparams(lambda rate: optax.chain(optax.sgd(rate), track))(
                rate=optax.linear_schedule(0.1, 0.01, 20)
            ),
            every,
        ),
        "MultiSteps outside": (
            optax.MultiSteps(inner, 1).gradient_transformation(),
            every,
        ),
        "named_chain": (optax.named_chain(("a", optax.sgd(0.1)), ("b", track)), every),
        "flatten": (
            optax.chain(optax.flatten(optax.adam(0.1)), track),
            every,
        ),
    }
    return made if name is None else made[name]


@pytest.mark.parametrize("name", wrapped(None, jp.track_importance()))
def test_works_inside_optax_containers(name):
    params = weights()
    tx, tracked = wrapped(name, jp.track_importance())
    run = record(tx, params, gradients(params, STEPS))
    average = jp.get_importance(run.state).weight
    flat = dict(zip(jp.tree.names(params), leaves(run.weights), strict=True))
    assert_averages(average, [flat[path] for path in tracked])
    entries, shape = jax.tree.flatten(average, is_leaf=is_excluded)
    assert shape == jax.tree.structure(params)
    assert [
        x for x, e in zip(flat, entries, strict=True) if not is_excluded(e)
    ] == tracked


def test_multi_steps_counts_real_steps_only():
    params = weights()
    inner = optax.chain(optax.sgd(0.1), jp.track_importance())
    tx = optax.MultiSteps(inner, 4).gradient_transformation()
    run = record(tx, params, gradients(params, 24))
    real = jax.tree.map(lambda w: np.asarray(w)[3::4], run.weights)
    assert_averages(jp.get_importance(run.state).weight, real)


def test_skipped_step_does_not_enter_the_average():
    params = weights()
    grads = jax.tree.map(np.array, gradients(params, 12))
    grads["layer"]["kernel"][4, 0, 0] = np.nan
    grads["token_embedding"][7, 0, 0] = np.inf
    inner = optax.chain(jp.track_gradients(), optax.adam(0.1), jp.track_importance())
    run = record(optax.apply_if_finite(inner, 5), params, grads)
    good = np.delete(np.arange(12), [4, 7])
    importance = jp.get_importance(run.state)
    real = jax.tree.map(lambda w: np.asarray(w)[good], run.weights)
    assert_averages(importance.weight, real)
    for square, g in zip(leaves(importance.square), leaves(grads), strict=True):
        expected = oracles.mean_square(g[good])
        np.testing.assert_allclose(square, expected, rtol=0, atol=1e-6 * expected.max())


def test_nnx_optimizer_tracks_its_model():
    model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    tx = optax.chain(optax.adam(0.05), jp.track_importance())
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    history = []

    @nnx.jit
    def train(model, optimizer, x):
        optimizer.update(model, nnx.grad(lambda m: (m(x) ** 2).mean())(model))

    for step in range(6):
        train(model, optimizer, np.random.default_rng(step).normal(size=(5, 4)))
        history.append(leaves(nnx.state(model, nnx.Param)))
    params = nnx.state(model, nnx.Param)
    stacked = [np.stack(w) for w in zip(*history, strict=True)]
    for held in (optimizer, optimizer.opt_state):
        importance = jp.get_importance(held)
        assert_averages(importance.weight, stacked)
        scores = jp.scores.preconditioned_magnitude(params, importance)
        pruned = jp.prune(params, scores, 0.5)
    nnx.update(model, pruned)
    assert np.count_nonzero(np.asarray(model.kernel[...])) == 6
    assert jp.tree.names(params) == ["bias", "kernel"]
