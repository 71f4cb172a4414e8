"""Events and averages where numbers are not finite, and at the ends of counting."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp
from tests.support.compilations import compiled

WEIGHTS = {"a": jnp.arange(1, 9.0).reshape(2, 4)}


def stepped(tx, gradients, params=WEIGHTS):
    """The masks after each of some updates."""
    state, found = tx.init(params), []
    step = jax.jit(tx.update)
    for gradient in gradients:
        updates, state = step(gradient, state, params)
        params = optax.apply_updates(params, updates)
        found.append(np.asarray(jp.masks.get(state)["a"]).ravel().astype(int).tolist())
    return found


def normalised(params, state):
    """0 / 0 where a leaf has had no gradient."""
    square = jp.get_importance(state).square
    return jax.tree.map(lambda w, s: jnp.abs(w) * s / s.max(), params, square)


def logarithm(params, state):
    """Minus infinity for a weight that is zero."""
    return jax.tree.map(lambda w: jnp.log(jnp.abs(w)), params)


def test_scores_that_are_not_numbers_bring_no_pruned_weight_back():
    tx = jp.gradual(
        optax.rmsprop(0.1, decay=0.0),
        {1: 0.5, 2: 0.5},
        criterion=normalised,
        allocation="layer",
    )
    none = {"a": jnp.zeros((2, 4))}
    first, *later = stepped(tx, [WEIGHTS, none, none])[1:]
    assert sum(first) == 4
    assert all(masks == first for masks in later)


def test_a_kept_weight_with_the_lowest_score_stays_before_a_pruned_one():
    # The first goes. Then the third is zero too, and scores as low as what is pruned.
    params = {"a": jnp.array([[0.0, 2.0, 1.0, 4.0], [5.0, 6.0, 7.0, 8.0]])}
    tx = jp.gradual(
        optax.sgd(1.0), {1: 1 / 8, 2: 1 / 8}, criterion=logarithm, allocation="layer"
    )
    none = {"a": jnp.zeros((2, 4))}
    third = {"a": none["a"].at[0, 2].set(1)}
    *_, last = stepped(tx, [none, third, none], params)
    assert last == [0, 1, 1, 1, 1, 1, 1, 1]


@pytest.mark.full
def test_a_gradient_of_nans_grows_nothing_twice():
    tx = jp.gradual(
        optax.chain(optax.zero_nans(), optax.adam(0.1)),
        {1: 0.5, 2: 0.5, 3: 0.5},
        grow=jp.grow.gradient(0.5, decay="constant"),
    )
    nans = {"a": jnp.full((2, 4), jnp.nan)}
    found = stepped(tx, [WEIGHTS, WEIGHTS, nans, WEIGHTS])
    assert [sum(masks) for masks in found] == [8, 4, 4, 4]


def test_a_criterion_may_read_the_optimizer_s_own_state_at_step_0():
    def momentum(params, state):
        return jax.tree.map(lambda w, m: jnp.abs(w) + m, params, state[0].mu)

    tx = jp.gradual(optax.adam(0.1), {0: 0.5}, criterion=momentum)
    assert stepped(tx, [WEIGHTS]) == [[0, 0, 0, 0, 1, 1, 1, 1]]


@pytest.mark.parametrize(
    "make",
    [
        lambda: jp.straight_through(optax.sgd(0.1), {1: 0.5}, freeze=2**31),
        lambda: jp.track_importance(every=2**31),
        lambda: jp.track_gradients(start=2**31),
    ],
)
def test_more_steps_than_are_counted_are_refused(make):
    with pytest.raises(ValueError, match=r"under 2\*\*31, got 2147483648"):
        make()


def test_a_named_chain_is_no_holder_of_masks():
    masks = {"a": WEIGHTS["a"] > 4}
    tx = optax.named_chain(
        ("gradients", jp.track_gradients()),
        ("masks", jp.keep_masks(optax.sgd(0.1), masks)),
    )
    found = jp.masks.get(tx.init(WEIGHTS))
    np.testing.assert_array_equal(found["a"], masks["a"])


@pytest.mark.parametrize("seed", [1, np.int32(1), np.int64(1)])
def test_a_seed_may_be_numpy_s(seed):
    tx = jp.track_importance(storage="int8", seed=seed)
    assert jp.get_importance(tx.init(WEIGHTS)).weight["a"].shape == (2, 4)


@pytest.mark.parametrize("storage", ["bfloat16", "int8"])
def test_a_gradient_that_is_infinite_leaves_other_averages_alone(storage):
    tx = jp.track_gradients(storage=storage)
    state = tx.init(WEIGHTS)
    gradient = {"a": jnp.full((2, 4), 2.0).at[0, 0].set(jnp.inf)}
    for _ in range(3):
        _, state = jax.jit(tx.update)(gradient, state, WEIGHTS)
    found = np.asarray(jp.get_importance(state).square["a"], np.float32).ravel()
    np.testing.assert_allclose(found[1:], 4, rtol=0.02)
    assert found[0] == 0


@pytest.mark.full
@pytest.mark.parametrize(
    "transformation",
    [jp.gradual, functools.partial(jp.straight_through, every=100, freeze=None)],
)
def test_steps_outside_of_jit_compile_nothing_anew(transformation):
    tx = transformation(optax.adam(0.1), {1: 0.5, 6: 0.75})
    params, state, found = WEIGHTS, tx.init(WEIGHTS), []
    for step in range(8):
        with compiled() as seconds:
            updates, state = tx.update(WEIGHTS, state, params)
            params = optax.apply_updates(params, updates)
        found.append(len(seconds))
        kept = 8 if step < 1 else 4 if step < 6 else 2
        assert sum(map(int, (params["a"] != 0).ravel())) == kept
    assert found[3:6] == [0, 0, 0]
    # As under jit.
    gradients = [WEIGHTS] * 8
    assert stepped(tx, gradients)[-1] == (params["a"] != 0).ravel().tolist()


def test_a_schedule_of_shares_by_layer_says_what_to_do():
    with pytest.raises(TypeError, match=r"one sparsity a step, got .* at step 2; for"):
        jp.gradual(optax.adam(0.1), {2: {"a": 0.5}}, allocation="layer")


@pytest.mark.full
def test_what_a_falling_sparsity_returns_is_chosen_by_the_growth():
    params = {"w": jnp.ones((10, 10))}
    late = 1 + jnp.arange(50.0).reshape(5, 10)
    gradient = {"w": jnp.zeros((10, 10)).at[5:].set(late)}
    tx = jp.gradual(
        optax.sgd(0.0),
        {1: 0.9, 2: 0.5},
        grow=jp.grow.gradient(0.3),
        criterion=jp.scores.magnitude,
    )
    state, kept = tx.init(params), []
    for _ in range(3):
        updates, state = tx.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        kept.append(np.asarray(jp.masks.get(state)["w"]))
    back = kept[2] & ~kept[1]
    assert (kept[1].sum(), kept[2].sum(), back.sum()) == (10, 50, 40)
    assert back[5:].sum() == 40


def test_the_last_event_stays_the_last_at_the_end_of_counting():
    scores = jp.scores.magnitude
    tx = jp.straight_through(optax.sgd(0.0), {1: 0.5}, freeze=None, criterion=scores)
    state = tx.init(WEIGHTS)._replace(step=jnp.int32(2**31 - 2))
    for _ in range(3):
        _, state = tx.update(jax.tree.map(jnp.zeros_like, WEIGHTS), state, WEIGHTS)
        assert int(jp.masks.get(state)["a"].sum()) == 4
