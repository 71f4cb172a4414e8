"""Schedules: the closed forms, the target at the last event, refusals."""

import fractions

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

import jaxprune as jp
from jaxprune.training import schedules as schedules_

RANGES = [jp.schedules.cubic, jp.schedules.linear, jp.schedules.constant]


@pytest.mark.parametrize("kind", RANGES, ids=lambda kind: kind.__name__)
@given(
    final=st.floats(0, 1, exclude_max=True),
    begin=st.integers(0, 10_000),
    length=st.integers(0, 10_000),
    every=st.integers(1, 3_000),
)
def test_the_last_event_has_the_final_sparsity_on_any_grid(
    kind, final, begin, length, every
):
    table = kind(final, begin, begin + length, every).table()
    steps, values = list(table), list(table.values())
    assert steps == sorted(steps)
    assert (steps[0], steps[-1]) == (begin, begin + length)
    assert values[-1] == final
    assert values == sorted(values)
    gaps = np.diff(steps)
    assert all(gaps[:-1] == every)
    assert all(gaps[-1:] <= every)


def test_cubic_is_equation_1_of_zhu_and_gupta():
    table = jp.schedules.cubic(0.8, begin=100, end=300, every=25).table()
    for step, value in table.items():
        left = 1 - fractions.Fraction(step - 100, 200)
        assert abs(value - 0.8 * float(1 - left**3)) < 1e-15


def test_cubic_half_way_has_seven_eighths():
    # The case with which JaxPruner tests its polynomial: half of the way from 0 to 20.
    assert jp.schedules.cubic(0.5, 0, 20, 5).table()[10] == 0.4375


def test_linear_rises_in_equal_steps():
    table = jp.schedules.linear(0.8, begin=10, end=50, every=10).table()
    np.testing.assert_allclose(list(table.values()), [0, 0.2, 0.4, 0.6, 0.8])


def test_constant_is_periodic_and_once_is_one_event():
    assert list(jp.schedules.constant(0.5, 0, 20, 5).table()) == [0, 5, 10, 15, 20]
    assert set(jp.schedules.constant(0.5, 0, 20, 5).table().values()) == {0.5}
    assert jp.schedules.once(20, 0.5).table() == {20: 0.5}


def test_steps_may_be_numpys_integers():
    start, end = np.arange(0, 101, 100)
    table = jp.schedules.linear(0.8, start, end, np.int32(50)).table()
    assert table == {0: 0.0, 50: 0.4, 100: 0.8}
    assert {type(step) for step in table} == {int}
    assert jp.schedules.once(np.uint8(3), 0.5).table() == {3: 0.5}


def test_schedules_are_values_that_print_and_compare():
    one = jp.schedules.cubic(0.8, begin=500, end=1500, every=50)
    assert repr(one) == "cubic(final=0.8, begin=500, end=1500, every=50)"
    assert one == jp.schedules.cubic(0.8, 500, 1500, 50)
    assert one != jp.schedules.linear(0.8, 500, 1500, 50)
    assert len({one, jp.schedules.cubic(0.8, 500, 1500)}) == 1
    assert repr(jp.schedules.once(3, 0.5)) == "once(step=3, final=0.5)"


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: jp.schedules.cubic(1.0, 0, 9), ValueError, r"in \[0, 1\).*got 1.0"),
        (lambda: jp.schedules.cubic(80, 0, 9), ValueError, "give 0.8 for 80 %"),
        (lambda: jp.schedules.cubic(0.5, 9, 8), ValueError, "begin <= end.*once"),
        (lambda: jp.schedules.linear(0.5, -1, 8), ValueError, r"begin=.*0 to.*got -1"),
        (lambda: jp.schedules.linear(0.5, 0, 8, 0), ValueError, r"every=.*1 to.*got 0"),
        (lambda: jp.schedules.cubic(0.5, 0, 8.0), TypeError, "end=.*integer.*8.0"),
        (lambda: jp.schedules.once(2**31, 0.5), ValueError, "2147483648"),
        (lambda: jp.schedules.once(True, 0.5), TypeError, "integer"),
        (lambda: jp.schedules.once(np.bool_(True), 0.5), TypeError, "integer"),
        (lambda: jp.schedules.once(0.5, 3), TypeError, "integer.*0.5"),
        (lambda: schedules_.sorted_events({}), ValueError, "an event"),
        (lambda: schedules_.sorted_events(0.5), TypeError, r"jp\.schedules.*got 0.5"),
        (lambda: schedules_.sorted_events({-1: 0.5}), ValueError, "got -1"),
    ],
)
def test_bad_arguments_are_refused_in_one_sentence(make, error, says):
    with pytest.raises(error, match=says) as caught:
        make()
    assert not str(caught.value).endswith(".")
    assert "\n" not in str(caught.value)
