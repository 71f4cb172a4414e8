"""Adamax keeps a maximum of |g|, which is refused where E[g^2] is read."""

import warnings

import jax
import jax.numpy as jnp
import optax
import pytest

import jaxprune as jp

PARAMS = {"a": jnp.ones((4, 4)), "b": jnp.ones((4, 2)), "bias": jnp.ones(4)}
LABELS = {"a": "x", "b": "y", "bias": "y"}
CLIPPED = optax.chain(optax.clip_by_global_norm(1.0), optax.adamax(1e-2))
HALF = optax.partition({"x": optax.adamax(1e-2), "y": optax.adam(1e-2)}, LABELS)
ADAMAX = {
    "adamax": optax.adamax(1e-2),
    "adamaxw": optax.adamaxw(1e-2),
    "clipped": CLIPPED,
    "plateau": optax.chain(optax.adamax(1e-2), optax.contrib.reduce_on_plateau()),
    "injected": optax.inject_hyperparams(optax.adamax)(learning_rate=1e-2),
    "masked": optax.masked(optax.adamax(1e-2), {"a": True, "b": True, "bias": False}),
}
WRAPPERS = {
    "gradual": lambda tx, **rule: jp.gradual(tx, {2: 0.5}, **rule),
    "straight_through": lambda tx, **rule: jp.straight_through(
        tx, {2: 0.5}, freeze=None, **rule
    ),
}


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("name", ADAMAX)
def test_adamax_is_refused_before_the_first_step(name, wrapper, jit):
    init = WRAPPERS[wrapper](ADAMAX[name]).init
    words = r"not tracked \(.*Adamax keeps a maximum of \|g\|\); chain jp\.track_grad"
    with pytest.raises(ValueError, match=words):
        (jax.jit(init) if jit else init)(PARAMS)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_the_leaves_of_adamax_beside_adam_are_named(wrapper):
    with pytest.raises(ValueError, match="must have been tracked, but 'a' were not"):
        WRAPPERS[wrapper](HALF).init(PARAMS)


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("name", ADAMAX)
def test_adamax_serves_beside_a_tracker_or_another_criterion(name, wrapper):
    wrap = WRAPPERS[wrapper]
    wrap(optax.chain(jp.track_gradients(), ADAMAX[name])).init(PARAMS)
    wrap(ADAMAX[name], criterion="magnitude").init(PARAMS)


@pytest.mark.parametrize(
    "tx",
    [
        optax.adam(1e-2),
        optax.nadamw(1e-2),
        optax.radam(1e-2),
        optax.yogi(1e-2),
        optax.lamb(1e-2),
        optax.chain(optax.clip(0.1), optax.adam(1e-2)),
        optax.contrib.adopt(1e-2),
        optax.MultiSteps(optax.adam(1e-2), 3),
        optax.apply_if_finite(optax.adam(1e-2), 3),
    ],
)
def test_adam_is_not_taken_for_adamax(tx):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        state = jax.jit(jp.gradual(tx, {2: 0.5}).init)(PARAMS)
    assert not jp.sparsity(state.masks).total


def test_an_optimizer_that_cannot_take_two_numbers_is_let_through():
    def update(updates, state, params=None):
        assert updates["a"].shape == (4, 4), "the model's own shapes"
        return adam.update(updates, state, params)

    adam = optax.adam(1e-2)
    jp.gradual(optax.GradientTransformation(adam.init, update), {2: 0.5}).init(PARAMS)


def test_reasons_share_one_pair_of_brackets():
    with pytest.raises(ValueError, match=r"tracks nothing; Adafactor keeps [^()]*\);"):
        jp.gradual(optax.adafactor(1e-2), {2: 0.5}).init(PARAMS)
