"""What a transformation with masks wraps, and how it goes on with masks of others."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp

PARAMS = {"w": jnp.arange(1.0, 65.0).reshape(8, 8)}
ONES = jax.tree.map(jnp.ones_like, PARAMS)
MAKE = {
    "keep_masks": lambda own: jp.keep_masks(own, {"w": PARAMS["w"] > 9}),
    "gradual": lambda own: jp.gradual(own, {9: 0.5}, criterion=jp.scores.magnitude),
    "straight_through": lambda own: jp.straight_through(
        own, {9: 0.5}, freeze=9, criterion=jp.scores.magnitude
    ),
    "lora": lambda own: jp.contrib.lora(own, rank=2),
}


@pytest.mark.parametrize("name", MAKE)
def test_multi_steps_inside_gets_the_extra_arguments(name):
    plateau = optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau())
    tx = MAKE[name](optax.MultiSteps(plateau, 1))
    updates, _ = tx.update(ONES, tx.init(PARAMS), PARAMS, value=jnp.float32(1))
    assert np.isfinite(updates["w"]).all()


@pytest.mark.parametrize("name", MAKE)
def test_what_is_no_optimizer_is_refused(name):
    with pytest.raises(TypeError, match=r"as the optimizer; call jp\." + name):
        MAKE[name](optax.adam)


@pytest.mark.parametrize("name", ["gradual", "straight_through"])
def test_the_pairs_of_lookahead_are_refused(name):
    tx = MAKE[name](optax.lookahead(optax.sgd(0.1), 2, 0.5))
    with pytest.raises(ValueError, match="are pairs; choose masks before"):
        tx.init(optax.LookaheadParams.init_synced(PARAMS))


def test_scores_that_are_integers_are_refused_at_the_start():
    whole = lambda params, importance: {"w": jnp.arange(64).reshape(8, 8)}  # noqa: E731
    tx = jp.gradual(optax.sgd(0.1), {1: 0.5}, criterion=whole)
    with pytest.raises(TypeError, match="must be floating, but those of 'w' are not"):
        tx.init(PARAMS)


def test_straight_through_may_begin_at_the_first_step():
    tx = jp.straight_through(optax.adam(0.1), {0: 0.5}, freeze=2)
    updates, _ = tx.update(ONES, tx.init(PARAMS), PARAMS)
    assert jp.sparsity(optax.apply_updates(PARAMS, updates)).zeros == 32


@pytest.mark.full
@pytest.mark.parametrize("pattern", ["unstructured", "channel"])
@pytest.mark.parametrize("allocation", ["global", "layer"])
def test_masks_of_a_pruned_model_stay_until_the_schedule_is_above_them(
    allocation, pattern
):
    how = {"allocation": allocation, "pattern": pattern}
    masks = jp.masks.make(jp.scores.magnitude(PARAMS), 0.5, **how)
    params = jp.masks.apply(PARAMS, masks)
    schedule = {1: 0.0, 2: 0.25, 3: 0.75}
    tx = jp.gradual(optax.sgd(0.01), schedule, criterion=jp.scores.magnitude, **how)
    state, found, step = (
        jp.masks.replace(tx.init(params), masks),
        [],
        jax.jit(tx.update),
    )
    for _ in range(4):
        updates, state = step(ONES, state, params)
        params = optax.apply_updates(params, updates)
        found.append(jp.sparsity(params).zeros)
    assert found == [32, 32, 32, 48]


def test_a_state_that_was_read_without_its_classes_is_a_list():
    tx = optax.chain(optax.adam(0.1), jp.track_importance())
    _, state = tx.update(ONES, tx.init(PARAMS), PARAMS)

    def plain(node):
        if hasattr(node, "_asdict"):
            return {k: plain(v) for k, v in node._asdict().items()}
        if isinstance(node, tuple):
            return [plain(each) for each in node]
        return node

    raw = plain(state)
    assert isinstance(raw, list)
    found, expected = jp.get_importance(raw), jp.get_importance(state)
    np.testing.assert_array_equal(found.square["w"], expected.square["w"])
