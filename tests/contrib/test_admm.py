"""admm: the four lines of ELSA with z and u held apart, and exact zeros at the end."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp
from tests.support import oracles
from tests.support.trajectories import gradients, record

BEGIN, FREEZE, EVERY, PENALTY, DECAY = 2, 15, 4, 0.25, 0.95
STEPS, SPARSITY = 20, 0.7


def model(dtype=jnp.float32):
    random = np.random.default_rng(5)
    return {
        "bias": jnp.asarray(random.normal(size=10), dtype),
        "kernel": jnp.asarray(random.normal(size=(12, 10)), dtype),
    }


def elsa(kernel, grads, power):
    """z and u apart, in float64, over plain gradient descent of rate 1/8."""
    x, grads = np.asarray(kernel, np.float64), np.asarray(grads, np.float64)
    u, seen = np.zeros_like(x), []

    def mask(v, n):
        square = oracles.mean_square(grads[: n + 1], "exponential", DECAY)
        scores = np.abs(v) * square ** (power / 2)
        return oracles.keep_layer([scores], SPARSITY)[0]

    for n, g in enumerate(grads):
        if n == FREEZE:
            final = mask(x, n)
        if n >= FREEZE:
            x = final * (x - g / 8)
        else:
            if n >= BEGIN and (n - BEGIN) % EVERY == 0:
                z = (x + u) * mask(x + u, n)
                u = u + x - z
            pull = PENALTY * (x - z + u) if n >= BEGIN else 0
            x = x - (g + pull) / 8
        seen.append(x)
    return np.array(seen)


def admm(inner, **options):
    arguments = {
        "schedule": jp.schedules.once(BEGIN, SPARSITY),
        "freeze": FREEZE,
        "every": EVERY,
        "penalty": PENALTY,
    }
    return jp.contrib.admm(inner, **(arguments | options))


@pytest.mark.parametrize(
    ("criterion", "power"),
    [
        (jp.scores.obd, 1.0),
        pytest.param(jp.scores.preconditioned_magnitude, 0.5, marks=pytest.mark.full),
        pytest.param(jp.scores.magnitude, 0.0, marks=pytest.mark.full),
    ],
)
def test_is_elsa_with_the_sparse_copy_and_the_dual_apart(criterion, power):
    params = model()
    grads = gradients(params, STEPS)
    run = record(admm(optax.sgd(0.125), criterion=criterion), params, grads)
    expected = elsa(params["kernel"], grads["kernel"], power)
    np.testing.assert_allclose(run.weights["kernel"], expected, rtol=0, atol=1e-5)
    zeros = (np.asarray(run.weights["kernel"]) == 0).sum((1, 2))
    assert zeros.tolist() == [0] * FREEZE + [round(SPARSITY * 120)] * (STEPS - FREEZE)


@pytest.mark.full
def test_the_average_of_squares_is_of_the_losss_own_gradient():
    params = model()
    grads = gradients(params, STEPS)
    run = record(admm(optax.adamw(0.01)), params, grads)
    found = jp.get_importance(run.state).square
    expected = oracles.mean_square(
        np.asarray(grads["kernel"], np.float64), "exponential", DECAY
    )
    np.testing.assert_allclose(found["kernel"], expected, rtol=1e-5)
    assert isinstance(found["bias"], optax.MaskedNode)


def test_weights_come_nearer_to_their_sparse_copy():
    """What the pull is for: less is lost at the end than by pruning at once."""
    params = model()
    still = jax.tree.map(
        lambda w: jnp.asarray(np.full((400, *w.shape), 1e-3, np.float32)), params
    )
    tx = jp.contrib.admm(
        optax.adam(0.003), {0: SPARSITY}, freeze=400, every=8, penalty=1.0
    )
    run = record(tx, params, still)
    before = np.asarray(run.weights["kernel"])[-1]
    lost = np.sort(np.abs(before).ravel())[:84].sum()
    at_once = np.sort(np.abs(np.asarray(params["kernel"])).ravel())[:84].sum()
    assert lost < 0.5 * at_once


@pytest.mark.full
def test_a_pattern_may_fix_the_sparsity():
    params = model()
    tx = jp.contrib.admm(optax.adamw(0.01), {0: "2:4"}, freeze=3, every=1)
    run = record(tx, params, gradients(params, 5))
    groups = np.asarray(run.params["kernel"]).reshape(3, 4, 10)
    np.testing.assert_array_equal((groups != 0).sum(1), 2)


def test_the_sparsity_of_the_copy_may_rise_and_the_last_is_that_of_the_weights():
    params = model()
    schedule = jp.schedules.linear(SPARSITY, begin=2, end=9, every=3)
    tx = admm(optax.sgd(0.125), schedule=schedule, freeze=12, every=2)
    run = record(tx, params, gradients(params, 14))
    zeros = (np.asarray(run.weights["kernel"]) == 0).sum((1, 2))
    assert zeros.tolist() == [0] * 12 + [round(SPARSITY * 120)] * 2


def test_a_freeze_that_never_comes_is_refused():
    with pytest.raises(TypeError, match="got None; give the step"):
        admm(optax.sgd(0.1), freeze=None)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"freeze": 2}, "freeze after the schedule's first event at step 2, got .*=2"),
        ({"freeze": 1}, "at or after the schedule's last event at step 2.*freeze=1"),
        ({"every": 0}, "every >= 1"),
        ({"penalty": 0.0}, "penalty over 0, got 0.0"),
        ({"criterion": jp.scores.averaged_weight}, "Importance.weight"),
    ],
)
def test_bad_arguments_are_refused_in_one_sentence(options, says):
    with pytest.raises(ValueError, match=says) as caught:
        admm(optax.adamw(0.01), **options).init(model())
    assert not str(caught.value).endswith(".")


@pytest.mark.parametrize("option", ["freeze", "every"])
def test_a_fractional_number_of_steps_is_refused(option):
    with pytest.raises(TypeError, match=f"integer {option}, got 3.5"):
        admm(optax.adamw(0.01), **{option: 3.5})
