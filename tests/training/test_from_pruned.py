"""From a model that was pruned further than an event asks, nothing comes back."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp

PARAMS = {
    name: jnp.asarray(np.random.default_rng(i).normal(size=(32, 32)), jnp.float32)
    for i, name in enumerate(("a", "b"))
}
# The share that is pruned first, and events that each keep a unit more than that.
CASES = {
    "channels": (jp.patterns.Channel(), 0.5, 0.47),
    "blocks": ("8x8", 0.5, 0.44),
    "weights": ("unstructured", 0.5, 0.499),
    "per output": ("per-output", 0.5, 0.47),
}


GRADIENTS = jax.tree.map(jnp.cos, PARAMS)


def counts_after_events(schedule, share, grow, allocation="layer", pattern=None):
    """Weights left in each leaf after each update, and whether the masks moved."""
    how = {"allocation": allocation, "pattern": pattern or "unstructured"}
    masks = jp.masks.make(jp.scores.magnitude(PARAMS), share, **how)
    params = jp.masks.apply(PARAMS, masks)
    tx = jp.gradual(optax.sgd(0.01), schedule, criterion="magnitude", grow=grow, **how)
    state = jp.masks.replace(tx.init(params), masks)
    step, counts = jax.jit(tx.update), []
    for _ in range(max(schedule) + 1):
        updates, state = step(GRADIENTS, state, params)
        params = optax.apply_updates(params, updates)
        after = jp.masks.get(state)
        moved = any((after[k] != masks[k]).any() for k in PARAMS)
        counts.append([int(after[k].sum()) for k in PARAMS] + [moved])
        masks = after
    return counts


@pytest.mark.parametrize("grow", ["set", "rigl"])
@pytest.mark.parametrize(
    ("pattern", "allocation"),
    [
        ("unstructured", "layer"),
        pytest.param("unstructured", "global", marks=pytest.mark.full),
        pytest.param("8x8", "layer", marks=pytest.mark.full),
    ],
)
def test_growth_waits_until_the_schedule_is_above_the_masks(grow, pattern, allocation):
    schedule = {0: 0.0, 1: 0.25, 2: 0.375, 3: 0.75}
    found = counts_after_events(schedule, 0.5, grow, allocation, pattern)
    totals = [a + b for a, b, _ in found]
    assert totals == [1024, 1024, 1024, 512]
    assert [moved for *_, moved in found] == [False, False, False, True]


@pytest.mark.parametrize("grow", ["set", "rigl"])
def test_growth_goes_on_under_a_schedule_that_falls(grow):
    # From the masks that its own event at step 0 leaves.
    found = counts_after_events({0: 0.75, 1: 0.5, 2: 0.5}, 0.75, grow)
    assert [row[:2] for row in found] == [[256, 256], [512, 512], [512, 512]]


@pytest.mark.full
@pytest.mark.parametrize(
    ("name", "allocation"),
    # Per output each output keeps as many, so there is no global ranking.
    [
        (name, allocation)
        for name in CASES
        for allocation in ("layer", "global", "erk")
        if (name, allocation) != ("per output", "global")
    ],
)
def test_no_unit_comes_back(name, allocation):
    pattern, share, less = CASES[name]
    masks = jp.masks.make(
        jp.scores.magnitude(PARAMS), share, pattern=pattern, allocation=allocation
    )
    params = jp.masks.apply(PARAMS, masks)
    tx = jp.gradual(
        optax.adam(1e-2),
        {0: less, 2: less},
        pattern=pattern,
        allocation=allocation,
        criterion="magnitude",
    )
    state = jp.masks.replace(tx.init(params), masks)
    for _ in range(4):
        updates, state = tx.update(jax.tree.map(jnp.cos, params), state, params)
        params = optax.apply_updates(params, updates)
        after = jp.masks.get(state)
        for leaf in PARAMS:
            assert not (np.asarray(after[leaf]) & ~np.asarray(masks[leaf])).any()
            assert not np.asarray(params[leaf])[~np.asarray(masks[leaf])].any()
