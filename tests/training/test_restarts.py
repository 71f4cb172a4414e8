"""A weight that comes back has the moments and the count of its own steps alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp

STEPS = 24
SHAPE = (4, 8)
GRADIENTS = np.random.default_rng(1).normal(size=(STEPS, *SHAPE)).astype(np.float32)
WEIGHTS = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)


GROWTH = jp.grow.gradient(0.5, decay="constant")


DECAYS = (0.9, 0.999)


def trained(optimizer, decays=DECAYS, grow=GROWTH, gradients=GRADIENTS):
    """Weights (steps, 4, 8) and masks after each step, of one leaf."""
    schedule = jp.schedules.constant(0.5, begin=8, end=20, every=4)
    tx = jp.gradual(
        optimizer,
        schedule,
        criterion="magnitude",
        allocation="layer",
        grow=grow,
        decays=decays,
    )

    def step(carry, gradient):
        params, state = carry
        updates, state = tx.update({"w": gradient}, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), (params["w"], jp.masks.get(state)["w"])

    params = {"w": jnp.asarray(WEIGHTS)}
    start = (params, tx.init(params))
    (_, state), (weights, masks) = jax.jit(
        lambda start: jax.lax.scan(step, start, gradients)
    )(start)
    return np.asarray(weights), np.asarray(masks), state


def adam_by_hand(masks, rate, first, second, gradients=GRADIENTS):
    """Adam of each weight by itself, in float64, begun anew where one comes back."""
    weight = WEIGHTS.astype(float)
    mean, square, age = (np.zeros(SHAPE) for _ in range(3))
    before, weights = np.ones(SHAPE, bool), []
    for gradient, mask in zip(gradients.astype(float), masks, strict=False):
        for moment in (mean, square, age):
            moment[mask & ~before] = 0
        age += 1
        gradient, weight = gradient * mask, weight * mask
        mean = first * mean + (1 - first) * gradient
        square = second * square + (1 - second) * gradient**2
        step = mean / (1 - first**age) / np.sqrt(square / (1 - second**age) + 1e-300)
        weight = np.where(mask, weight - rate * step, 0)
        before = mask
        weights.append(weight)
    return np.array(weights)


def returned(masks):
    return (masks[1:] & ~masks[:-1]).sum()


GROWTHS = [
    GROWTH,
    pytest.param(jp.grow.random(0.5, decay="constant"), marks=pytest.mark.full),
]


@pytest.mark.parametrize("decays", [DECAYS, (0.8, 0.95), (0.0, 0.999)], ids=str)
@pytest.mark.parametrize("grow", GROWTHS, ids=str)
def test_each_weight_follows_an_adam_that_began_when_it_came_back(grow, decays):
    weights, masks, _ = trained(optax.adam(0.1, *decays), decays, grow)
    assert returned(masks) >= 8
    expected = adam_by_hand(masks, 0.1, *decays)
    # 1 - b2 is a float32 difference, off by 6e-5 of it.
    np.testing.assert_allclose(weights, expected, atol=2e-5)


@pytest.mark.full
@pytest.mark.parametrize(
    "optimizer",
    [
        optax.chain(optax.clip_by_global_norm(1e9), optax.adam(0.1)),
        optax.inject_hyperparams(optax.adam)(0.1),
        optax.partition({"a": optax.adam(0.1), "b": optax.sgd(0.1)}, {"w": "a"}),
        optax.chain(jp.track_gradients(), optax.adam(0.1)),
        optax.apply_if_finite(optax.adam(0.1), 2),
    ],
    ids=["chain", "inject_hyperparams", "partition", "tracker", "apply_if_finite"],
)
def test_adam_is_found_in_any_wrapper(optimizer):
    weights, masks, _ = trained(optimizer)
    expected = adam_by_hand(masks, 0.1, 0.9, 0.999)
    np.testing.assert_allclose(weights, expected, atol=2e-5)


@pytest.mark.full
def test_the_count_is_the_optimizers_where_it_collects_gradients():
    halves = np.repeat(GRADIENTS[: STEPS // 2], 2, axis=0)
    weights, masks, _ = trained(optax.MultiSteps(optax.adam(0.1), 2), gradients=halves)
    expected = adam_by_hand(masks[::2], 0.1, 0.9, 0.999)
    np.testing.assert_allclose(weights[1::2], expected, atol=2e-5)


@pytest.mark.full
def test_an_age_that_two_bytes_do_not_count_is_none():
    tx = jp.gradual(optax.adam(0.1), {1: 0.5}, criterion="magnitude", grow="rigl")
    params = {"w": jnp.asarray(WEIGHTS)}
    state, update = tx.init(params), jax.jit(tx.update)
    ages = []
    for age in (0, 7, 65535):
        held = {"w": jnp.full(SHAPE, age, jnp.uint16)}
        aged = state._replace(ages=held)
        _, after = update(params, aged, params)
        ages.append(np.unique(after.ages["w"]).tolist())
    assert ages == [[0], [8], [0]]


@pytest.mark.parametrize(
    ("optimizer", "decays"),
    [
        pytest.param(
            optimizer,
            # Adamax corrects its first moment alone.
            (0.9, 0.0) if name == "adamax" else DECAYS,
            id=name,
            marks=() if name == "sgd" else pytest.mark.full,
        )
        for name, optimizer in {
            "sgd": optax.sgd(0.1, 0.9),
            "adamw": optax.adamw(0.1, weight_decay=0.1),
            "amsgrad": optax.amsgrad(0.1),
            "adamax": optax.adamax(0.1),
            "adagrad": optax.adagrad(0.1),
            "rmsprop": optax.rmsprop(0.1),
            "lion": optax.lion(0.1),
        }.items()
    ],
)
def test_the_first_step_is_that_of_an_optimizer_that_begins(optimizer, decays):
    weights, masks, _ = trained(optimizer, decays)
    before = np.concatenate([np.ones((1, *SHAPE), bool), masks[:-1]])
    returned = masks & ~before
    start = {"w": jnp.zeros((STEPS, *SHAPE))}
    first, _ = optimizer.update({"w": GRADIENTS}, optimizer.init(start), start)
    assert returned.sum() >= 8
    np.testing.assert_allclose(weights[returned], first["w"][returned], rtol=1e-4)


@pytest.mark.parametrize(
    "optimizer", [optax.rmsprop(0.1, bias_correction=True), optax.adabelief(0.1)]
)
def test_a_bias_correction_that_is_not_adams_warns(optimizer):
    tx = jp.gradual(optimizer, {1: 0.5}, criterion="magnitude", grow="rigl")
    with pytest.warns(UserWarning, match="bias correction is not Adam's"):
        tx.init({"w": jnp.ones(SHAPE)})


def test_init_takes_no_step_of_the_optimizer():
    adam = optax.adam(0.1)

    def update(updates, state, params=None):
        raise AssertionError

    tx = optax.GradientTransformation(adam.init, update)
    tx = jp.gradual(optax.MultiSteps(tx, 500), {1: 0.5}, grow="rigl")
    assert not tx.init({"w": jnp.ones(SHAPE)}).ages["w"].any()


def test_ages_need_growth_and_adams_count():
    for optimizer, grow in ((optax.adam(0.1), None), (optax.sgd(0.1, 0.9), "set")):
        tx = jp.gradual(optimizer, {1: 0.5}, criterion="magnitude", grow=grow)
        assert tx.init({"w": jnp.ones(SHAPE)}).ages == ()
