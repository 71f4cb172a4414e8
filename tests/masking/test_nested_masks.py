"""Masks inside masks: what all of them keep is found, and replaced as a whole."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp

KEPT = jp.masks.make({"w": jnp.arange(64.0).reshape(8, 8)}, 0.25)


def params():
    return {"w": jnp.asarray(np.random.default_rng(0).normal(size=(8, 8)), jnp.float32)}


def trained(tx, steps=3):
    values = jp.masks.apply(params(), KEPT)
    state = tx.init(values)
    for _ in range(steps):
        updates, state = tx.update(jax.tree.map(jnp.cos, values), state, values)
        values = optax.apply_updates(values, updates)
    return values, state


OTHER = {"w": jnp.asarray(np.random.default_rng(1).random((8, 8)) < 0.5)}
NESTED = {
    "keep_masks in keep_masks": lambda: jp.keep_masks(
        jp.keep_masks(optax.adamw(1e-2), OTHER), KEPT
    ),
    "gradual in keep_masks": lambda: jp.keep_masks(
        jp.gradual(optax.adamw(1e-2), {1: 0.75}), KEPT
    ),
    "gradual in a chain in keep_masks": lambda: jp.keep_masks(
        optax.chain(
            optax.clip(1.0),
            jp.gradual(optax.sgd(1e-2), {1: 0.75}, criterion=jp.scores.magnitude),
        ),
        KEPT,
    ),
    "straight_through in keep_masks, packed": lambda: jp.keep_masks(
        jp.straight_through(optax.adam(1e-2), {0: 0.75}, freeze=2), KEPT, packed=True
    ),
}


@pytest.mark.parametrize("name", NESTED)
def test_the_masks_of_all_levels_are_found(name):
    values, state = trained(NESTED[name]())
    masks = jp.masks.get(state)["w"]
    np.testing.assert_array_equal(masks, masks & KEPT["w"])
    assert not values["w"][~masks].any()
    assert values["w"][masks].all()
    assert int(masks.sum()) < 48


@pytest.mark.parametrize("name", NESTED)
def test_all_levels_are_replaced(name):
    _, state = trained(NESTED[name]())
    new = {"w": jnp.arange(64).reshape(8, 8) % 3 == 0}
    replaced = jp.masks.replace(state, new)
    assert jax.tree.structure(replaced) == jax.tree.structure(state)
    np.testing.assert_array_equal(jp.masks.get(replaced)["w"], new["w"])


def test_masks_side_by_side_are_still_refused():
    tx = optax.chain(
        jp.keep_masks(optax.sgd(0.1), KEPT), jp.keep_masks(optax.sgd(0.1), OTHER)
    )
    with pytest.raises(ValueError, match="remove all but one"):
        jp.masks.get(tx.init(params()))
