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
