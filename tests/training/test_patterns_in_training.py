"""Events under every pattern keep what `masks.make` keeps, and bring nothing back."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp
from tests.support.small_models import draw

PARAMS = {"up": jnp.asarray(draw(0, 8, 16)), "down": jnp.asarray(draw(1, 16, 8))}


def run(params, state, tx, steps):
    """The state and the parameters after so many steps without a gradient."""
    zero = jax.tree.map(jnp.zeros_like, params)
    update = jax.jit(tx.update)
    for _ in range(steps):
        updates, state = update(zero, state, params)
        params = optax.apply_updates(params, updates)
    return state, params


@pytest.mark.full
@pytest.mark.parametrize(
    ("pattern", "allocation"),
    [
        ("per-output", "layer"),
        ("channel", "global"),
        ("unstructured", "erk"),
        ("per-output", "global"),
        ("per-output", "erk"),
        ("channel", "layer"),
        ("4x4", "global"),
        ("4x4", "erk"),
    ],
)
def test_an_event_keeps_what_make_keeps(pattern, allocation):
    how = {"pattern": pattern, "allocation": allocation}
    schedule = {0: 0.25, 1: 0.5}
    tx = jp.gradual(optax.sgd(1.0), schedule, criterion=jp.scores.magnitude, **how)
    state, params = run(PARAMS, tx.init(PARAMS), tx, 2)
    wanted = jp.masks.make(jp.scores.magnitude(params), 0.5, **how)
    assert jp.masks.overlap(jp.masks.get(state), wanted).total == 1
    assert jp.sparsity(params).zeros == jp.sparsity(wanted).zeros


@pytest.mark.parametrize(
    ("pattern", "sparsity"),
    [
        ("channel", 0.25),
        pytest.param("channel", 0.6, marks=pytest.mark.full),
        pytest.param("4x4", 0.6, marks=pytest.mark.full),
    ],
)
def test_units_bring_no_weight_back_that_was_pruned_by_itself(pattern, sparsity):
    params = {"w": PARAMS["up"]}
    old = jp.masks.make(jp.scores.magnitude(params), 0.5)
    tx = jp.gradual(
        optax.sgd(1.0), {0: sparsity}, criterion=jp.scores.magnitude, pattern=pattern
    )
    begun = jp.masks.replace(tx.init(params), old)
    state, _ = run(jp.masks.apply(params, old), begun, tx, 1)
    new = np.asarray(jp.masks.get(state)["w"])
    assert not (new & ~np.asarray(old["w"])).any()
    if pattern == "channel":  # those of the least that is left go
        sizes = np.where(old["w"], np.abs(params["w"]), 0).sum(0)
        gone = np.argsort(sizes)[: round(sparsity * 16)]
        assert {*np.flatnonzero(~new.any(0))} == {*gone}
