"""Each criterion of the experiments is its formula, over what a run has watched."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp
from experiments.harness.criteria import CRITERIA, EXPONENTS, Watched, averages
from experiments.harness.optimizer import ADAMW, EVERYTHING, optimizer

STEPS, CLIP, B2 = 5, 1.0, 0.99
NAME = "mlp/kernel"
EMPTY = dict.fromkeys(jp.Importance._fields)


@pytest.fixture(scope="module")
def watched():
    """What five steps have seen, and the same by hand in float64."""
    rng = np.random.default_rng(0)
    params = {"mlp": {"kernel": jnp.asarray(rng.normal(size=(6, 5)), jnp.float32)}}
    start = jax.tree.map(np.array, params)
    tx = optimizer(optax.constant_schedule(0.1), track=EVERYTHING)
    state, weights, gradients = jax.jit(tx.init)(params), [], []

    @jax.jit
    def step(params, state, gradient):
        updates, state = tx.update({"mlp": {"kernel": gradient}}, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(STEPS):
        gradient = rng.normal(size=(6, 5)).astype(np.float32)
        before = np.asarray(params["mlp"]["kernel"], np.float64)
        params, state = step(params, state, gradient)
        gradients.append((before, np.asarray(gradient, np.float64)))
        weights.append(np.asarray(params["mlp"]["kernel"], np.float64))
    tracked = jp.get_importance(state)
    adam = jp.get_importance(state[ADAMW])
    adam = tracked._replace(square=adam.square)
    record = Watched(params, tracked, adam, lambda: start)
    return record, by_hand(weights, gradients)


def by_hand(weights, gradients):
    gain = np.sqrt(np.arange(1, STEPS + 1))
    gain /= gain.sum()
    second = np.zeros_like(weights[0])
    for _, gradient in gradients:
        clipped = gradient * min(1.0, CLIP / np.linalg.norm(gradient))
        second = B2 * second + (1 - B2) * clipped**2
    weight, average = np.abs(weights[-1]), np.tensordot(gain, weights, 1)
    square = np.mean([g**2 for _, g in gradients], 0)
    scores = {
        "preconditioned_magnitude": weight * square**0.25,
        "gradual": weight * square**0.25,
        "preconditioned_adam": weight * second**0.25,
        "averaged_weight": np.abs(average),
        "magnitude": weight,
        "movement": np.abs(weights[-1] - gradients[0][0]),
        "averaged_magnitude": np.tensordot(gain, np.abs(weights), 1),
        "obd": weight**2 * square,
        "taylor": np.mean([np.abs(w * g) for w, g in gradients], 0),
        "threshold_weight": weight / average.std(),
        "threshold_average": np.abs(average) / average.std(),
    }
    for p in EXPONENTS:
        scores[f"preconditioned_{p}"] = weight * square**p
        scores[f"averaged_preconditioned_{p}"] = np.abs(average) * square**p
    return scores


@pytest.mark.parametrize("name", [name for name in CRITERIA if name != "random"])
def test_a_criterion_is_its_formula(watched, name):
    record, expected = watched
    score = np.asarray(jp.tree.named_leaves(CRITERIA[name](record))[NAME], np.float64)
    # Adam's second moment may be scaled by any one factor: only the order counts.
    np.testing.assert_allclose(
        score / score.max(), expected[name] / expected[name].max(), rtol=2e-6
    )


def test_random_is_the_same_each_time_and_follows_no_weight(watched):
    record, _ = watched
    first, again = (CRITERIA["random"](record) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    order = np.argsort(np.asarray(first["mlp"]["kernel"]).ravel())
    weights = np.abs(np.asarray(record.params["mlp"]["kernel"])).ravel()
    assert list(order) != list(np.argsort(weights))


@pytest.mark.parametrize("name", CRITERIA)
def test_what_is_tracked_for_a_criterion_is_enough_and_no_more(name, watched):
    record, _ = watched
    needed = averages([name])
    held = {field: getattr(record.tracked, field) for field in needed}
    alone = record._replace(tracked=jp.Importance(**EMPTY | held))
    same = CRITERIA[name](alone)["mlp"]["kernel"]
    np.testing.assert_array_equal(same, CRITERIA[name](record)["mlp"]["kernel"])
    for field in needed - {"weight"}:
        less = alone.tracked._replace(**{field: None})
        with pytest.raises(ValueError, match="track"):
            CRITERIA[name](alone._replace(tracked=less))


def test_the_optimizer_holds_what_is_asked_for():
    params = {"mlp": {"kernel": jnp.ones((6, 5))}}
    for track in (("weight",), ("taylor", "weight"), EVERYTHING):
        state = optimizer(1e-3, track=track).init(params)
        tracked = jp.get_importance((state[0], state[-1]))
        assert {k for k, v in tracked._asdict().items() if v is not None} == {*track}
        assert jp.get_importance(state[ADAMW]).square is not None
