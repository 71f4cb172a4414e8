"""Each weighting is a gain c(i) / S(i), and its recurrence is the weighted mean."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxprune as jp
from tests.support import oracles

WEIGHTINGS = {
    "uniform": ("uniform", 0.0),
    "power(0)": ("power", 0.0),
    "power(0.5)": ("power", 0.5),
    "power(1)": ("power", 1.0),
    "power(2.3)": ("power", 2.3),
    "exponential(0.5)": ("exponential", 0.5),
    "exponential(0.9)": ("exponential", 0.9),
    "exponential(0.999)": ("exponential", 0.999),
}


def make(kind, parameter):
    if kind == "uniform":
        return jp.weightings.uniform()
    return getattr(jp.weightings, kind)(parameter)


def measured(weighting, indices):
    gain = jax.jit(jax.vmap(weighting))
    return np.asarray(gain(jnp.asarray(indices, jnp.int32)), np.float64)


FIRST = np.arange(1, 3001)
LATE = np.array([10_000, 99_999, 1_000_000])
LAST = np.array([2**30, 2**31 - 1])


@functools.cache
def gains(name):
    """Of the first, some late and the last snapshots, by one program."""
    every = measured(make(*WEIGHTINGS[name]), np.concatenate([FIRST, LATE, LAST]))
    return every[:3000], every[3000:3003], every[3003:]


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_gain_is_the_newest_share_of_the_sum(name):
    kind, parameter = WEIGHTINGS[name]
    expected = oracles.gains(kind, 3000, parameter)
    np.testing.assert_allclose(gains(name)[0], expected, rtol=2e-6)


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_first_snapshot_replaces_whatever_was_there(name):
    gain = make(*WEIGHTINGS[name])(jnp.int32(1))
    assert gain.shape == ()
    assert gain.dtype == jnp.float32
    assert float(gain) == 1.0


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_gain_stays_right_after_a_million_snapshots(name):
    kind, parameter = WEIGHTINGS[name]
    expected = oracles.gains(kind, 1_000_000, parameter)
    np.testing.assert_allclose(gains(name)[1], expected[LATE - 1], rtol=1e-5)


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_gain_is_a_share_even_at_the_largest_index(name):
    assert np.all(gains(name)[2] > 0)
    assert np.all(gains(name)[2] <= 1)


def test_power_zero_is_uniform():
    np.testing.assert_allclose(gains("power(0)")[0], gains("uniform")[0], rtol=1e-6)


@given(
    name=st.sampled_from(sorted(WEIGHTINGS)),
    values=st.lists(st.floats(-10, 10), min_size=1, max_size=40),
)
@settings(max_examples=60, deadline=None)
def test_recurrence_with_the_gains_is_the_weighted_mean(name, values):
    kind, parameter = WEIGHTINGS[name]
    mean = 1.0  # the first gain is 1, to float32
    for gain, value in zip(gains(name)[0], values, strict=False):
        mean += gain * (value - mean)
    expected = oracles.average(np.array(values), kind, parameter)
    assert mean == pytest.approx(expected, abs=2e-5)  # gains are float32


def test_exponential_is_the_bias_corrected_moving_average():
    decay, values = 0.9, np.random.default_rng(0).normal(size=25)
    moving = 0.0
    for value in values:
        moving = decay * moving + (1 - decay) * value
    corrected = moving / (1 - decay ** len(values))
    mean = 0.0
    for gain, value in zip(gains("exponential(0.9)")[0], values, strict=False):
        mean += gain * (value - mean)
    assert mean == pytest.approx(corrected, rel=1e-5)


def test_larger_powers_weigh_later_snapshots_more():
    late = [measured(jp.weightings.power(p), [100])[0] for p in (0.0, 0.5, 1.0, 2.0)]
    assert late == sorted(late)
    assert late[0] < late[-1]


@pytest.mark.parametrize("decay", [1.0, 1.5, -0.1, float("nan"), float("inf")])
def test_exponential_refuses_a_decay_outside_its_range(decay):
    with pytest.raises(ValueError, match="decay"):
        jp.weightings.exponential(decay)


@pytest.mark.parametrize("p", [float("nan"), float("inf"), -0.1, 8.5])
def test_power_refuses_a_p_outside_its_range(p):
    with pytest.raises(ValueError, match=r"p from 0 to 8, got"):
        jp.weightings.power(p)
    assert [jp.weightings.power(end).p for end in (0, 8)] == [0, 8]


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_a_weighting_is_a_value_that_prints_compares_and_hashes(name):
    kind, parameter = WEIGHTINGS[name]
    one = make(kind, parameter)
    assert one == make(kind, parameter)
    assert hash(one) == hash(make(kind, parameter))
    assert one != jp.weightings.power(7.0)
    assert eval(repr(one), vars(jp.weightings)) == one


def test_the_signatures_of_the_trackers_can_be_read():
    shown = inspect.signature(jp.track_importance).parameters["weighting"]
    assert str(shown).endswith("= power(p=0.5)")
    shown = inspect.signature(jp.track_gradients).parameters["weighting"]
    assert str(shown).endswith("= uniform()")
