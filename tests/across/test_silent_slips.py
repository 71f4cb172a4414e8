"""Slips that give a wrong number are told: no scores, a tracker too early."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp

PARAMS = {
    "kernel": jnp.asarray(np.random.default_rng(0).normal(size=(4, 4)), jnp.float32),
    "bias": jnp.array([-1.0, 1.0, 0.0, 2.0]),
}


def after_a_step(*steps):
    tx = optax.chain(*steps)
    _, state = tx.update(jax.tree.map(jnp.cos, PARAMS), tx.init(PARAMS), PARAMS)
    return state


def test_parameters_in_the_place_of_scores_are_told():
    with pytest.warns(UserWarning, match="negative at 'bias'.*scores.magnitude"):
        jp.masks.make(PARAMS, 0.5)


@pytest.mark.parametrize(
    "scores",
    [
        jp.scores.magnitude(PARAMS),
        jp.scores.magnitude(PARAMS, prunable=lambda name, leaf: True),
        {"kernel": -jnp.ones((4, 4)), "bias": optax.MaskedNode()},
    ],
)
def test_scores_are_ranked_without_a_word(scores):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jp.masks.make(scores, 0.5)


def test_a_tracker_in_front_of_the_optimizer_is_told():
    state = after_a_step(jp.track_importance(), optax.adamw(1e-2))
    with pytest.warns(UserWarning, match="put it last"):
        jp.get_importance(state)
    with pytest.warns(UserWarning, match="put it last"):
        jp.scores.averaged_weight(PARAMS, state)


def test_a_state_that_a_jitted_function_closes_over_is_read():
    state = after_a_step(optax.adam(1e-2))
    closed = jax.jit(lambda params: jp.scores.obd(params, state))(PARAMS)
    np.testing.assert_allclose(
        closed["kernel"], jp.scores.obd(PARAMS, state)["kernel"], rtol=1e-6
    )


@pytest.mark.parametrize(
    "steps",
    [
        (optax.adamw(1e-2), jp.track_importance()),
        (jp.track_gradients(), optax.adamw(1e-2), jp.track_importance()),
        (optax.chain(optax.clip(1.0), optax.adam(1e-2)), jp.track_importance()),
        (jp.track_importance(),),
    ],
)
def test_a_tracker_behind_it_is_read_without_a_word(steps):
    state = after_a_step(*steps)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jp.get_importance(state)
