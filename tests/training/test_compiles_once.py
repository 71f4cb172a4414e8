"""A step is compiled once, by XLA and not only by the tracer's count.

A step that takes arrays committed to a device beside arrays that are not gives back
committed ones only, and the next step is another program. So nothing that the package
makes may be committed where the parameters are not.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp
from tests.support.compilations import compiled

pytestmark = pytest.mark.jax_api

PARAMS = {
    "up": {"kernel": jnp.asarray(np.random.default_rng(0).normal(size=(16, 8)), "f4")},
    "down": {"kernel": jnp.ones((16, 8)), "bias": jnp.zeros(8)},
}
TRACKED = {
    "float32": jp.track_importance(),
    "int8": jp.track_importance(storage="int8"),
    "gradients": jp.track_gradients(average=("square", "taylor")),
}


def compiles(tx, params, steps=4, *, init=None):
    """How many programs XLA compiles in each of the first steps."""

    @jax.jit
    def step(params, state):
        grads = jax.tree.map(jnp.cos, params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    counts, state = [], (init or tx.init)(params)
    for _ in range(steps):
        with compiled() as programs:
            params, state = step(params, state)
        counts.append(len(programs))
    return counts


def masked(allocation="layer", pattern="unstructured"):
    importance = jp.get_importance(optax.adam(0.1).init(PARAMS))
    scores = jp.scores.preconditioned_magnitude(PARAMS, importance)
    sparsity = None if pattern == "2:4" else 0.5
    return scores, jp.masks.make(
        scores, sparsity, allocation=allocation, pattern=pattern
    )


# What chooses masks as it trains: test_eight_devices_prune_what_one_prunes.
FLOWS = {
    "training": lambda: (optax.adamw(1e-3), PARAMS),
    "apply": lambda: (optax.adamw(1e-3), jp.masks.apply(PARAMS, masked()[1])),
    "prune": lambda: (optax.adamw(1e-3), jp.prune(PARAMS, masked()[0], 0.5)),
    "prune globally": lambda: (
        optax.adamw(1e-3),
        jp.prune(PARAMS, masked()[0], 0.5, allocation="global", pattern="4x4"),
    ),
    "keep_masks": lambda: (jp.keep_masks(optax.adamw(1e-3), masked()[1]), PARAMS),
    "README": lambda: (
        jp.keep_masks(optax.adamw(1e-3), masked("global", "2:4")[1]),
        jp.prune(PARAMS, masked()[0], pattern="2:4"),
    ),
    "lora": lambda: (jp.contrib.lora(optax.adamw(1e-3), rank=2), PARAMS),
    **{
        name: lambda tx=tx: (optax.chain(optax.adamw(1e-3), tx), PARAMS)
        for name, tx in TRACKED.items()
    },
}


# One of each kind; the rest in the full suite.
SOME = {"training", "prune", "README"}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in SOME else pytest.mark.full)
        for name in FLOWS
    ],
)
def test_four_steps_are_one_program(name):
    assert compiles(*FLOWS[name]()) == [1, 0, 0, 0]


def test_the_count_sees_a_step_that_compiles_twice():
    """The very mixture that is to be avoided."""
    committed = {**PARAMS, "up": jax.device_put(PARAMS["up"], jax.devices()[0])}
    assert compiles(optax.adamw(1e-3), committed) == [1, 1, 0, 0]


def test_averages_in_host_memory_are_one_program_where_all_is_committed():
    """JAX commits whatever a program with two memories returns."""
    tx = optax.chain(optax.adamw(1e-3), jp.track_importance(memory="pinned_host"))
    placed = jax.device_put(PARAMS, jax.devices()[0])
    assert compiles(tx, placed, init=jax.jit(tx.init)) == [1, 0, 0, 0]


def test_scores_and_masks_are_committed_where_the_parameters_are():
    placed = jax.device_put(PARAMS["down"], jax.devices()[1])
    scores = jp.scores.magnitude(placed)
    masks = jp.masks.make(scores, 0.5)
    for tree in (scores, masks, jp.masks.apply(placed, masks)):
        for leaf in jax.tree.leaves(tree):
            assert leaf.committed
            assert leaf.devices() == {jax.devices()[1]}
    for tree in masked():
        assert not any(leaf.committed for leaf in jax.tree.leaves(tree))
