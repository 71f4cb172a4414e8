"""Units out of a kernel, beside all subsets and least squares in float64."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune.posttraining.solvers import units
from tests.support.small_models import draw
from tests.support.small_models import quick_compilation as quick_compilation

UNITS, OUTPUTS = 6, 3


def problem(rows, seed=0, samples=60):
    """Inputs that hang together, a kernel, and units whose rows are scattered."""
    inputs = UNITS * rows
    x = draw(seed, samples, inputs) @ draw(seed + 1, inputs, inputs)
    order = np.random.default_rng(seed + 2).permutation(inputs)
    return np.float64(x), draw(seed + 3, inputs, OUTPUTS), order.reshape(UNITS, rows)


def removed(x, weight, rows, lost, **options):
    hessian = jnp.asarray(x.T @ x, jnp.float32)
    return units.remove(jnp.asarray(weight), hessian, rows, lost, **options)


def lost_output(x, weight, new):
    return np.sum(np.square(x @ (weight - np.float64(new))))


def least_squares(x, weight, rows, kept):
    """The best values of the rows of some units, zero elsewhere, by NumPy."""
    own, best = rows[list(kept)].reshape(-1), np.zeros(weight.shape)
    best[own] = np.linalg.lstsq(x[:, own], x @ weight, rcond=None)[0]
    return best


@pytest.mark.parametrize("rows", [1, 2])
def test_kept_rows_are_the_least_squares(rows):
    x, weight, of = problem(rows)
    found = removed(x, weight, of, 3, damping=0.0)
    kept = np.flatnonzero(found.kept)
    assert len(kept) == 3
    best = least_squares(x, weight, of, kept)
    np.testing.assert_allclose(found.weight, best, rtol=1e-2, atol=1e-2)
    np.testing.assert_allclose(
        lost_output(x, weight, found.weight), lost_output(x, weight, best), rtol=1e-4
    )
    assert not np.asarray(found.weight)[of[~np.asarray(found.kept)]].any()


@pytest.mark.parametrize("rows", [1, 2])
def test_each_unit_that_goes_is_the_one_whose_absence_costs_least(rows):
    x, weight, of = problem(rows, seed=5)
    left = set(range(UNITS))
    for lost in range(1, UNITS):
        costs = {
            unit: lost_output(x, weight, least_squares(x, weight, of, left - {unit}))
            for unit in left
        }
        left.remove(min(costs, key=costs.get))
        found = removed(x, weight, of, lost, damping=0.0)
        assert set(np.flatnonzero(found.kept)) == left


def test_of_one_unit_it_is_the_best_of_all_subsets():
    x, weight, of = problem(2, seed=9)
    subsets = itertools.combinations(range(UNITS), UNITS - 1)
    costs = {
        kept: lost_output(x, weight, least_squares(x, weight, of, kept))
        for kept in subsets
    }
    found = removed(x, weight, of, 1, damping=0.0)
    assert tuple(np.flatnonzero(found.kept)) == min(costs, key=costs.get)


def test_a_unit_without_input_goes_first_and_costs_nothing():
    x, weight, of = problem(2)
    x[:, of[4]] = 0
    weight[of[4]] *= 100
    found = removed(x, weight, of, 1)
    assert np.flatnonzero(~np.asarray(found.kept)).tolist() == [4]
    stays = np.delete(of, 4, 0).reshape(-1)
    np.testing.assert_array_equal(np.asarray(found.weight)[stays], weight[stays])


def test_orthogonal_inputs_leave_the_order_of_wanda_and_the_values():
    _, weight, of = problem(2)
    squares = np.linspace(1, 3, weight.shape[0])
    x = np.diag(np.sqrt(squares))
    scores = np.sum(squares[:, None] * np.square(weight), 1)[of].sum(1)
    found = removed(x, weight, of, 2, damping=0.0)
    kept = np.sort(np.argsort(-scores)[:4])
    assert np.flatnonzero(found.kept).tolist() == kept.tolist()
    rows = of[kept].reshape(-1)
    np.testing.assert_allclose(np.asarray(found.weight)[rows], weight[rows], rtol=1e-6)


def test_rows_in_no_unit_stay_and_make_up_for_what_is_gone():
    x, weight, of = problem(2)
    found = removed(x, weight, of[:3], 2, damping=0.0)
    gone = of[:3][~np.asarray(found.kept)].reshape(-1)
    stays = np.setdiff1d(np.arange(len(weight)), gone)
    best = np.linalg.lstsq(x[:, stays], x @ weight, rcond=None)[0]
    np.testing.assert_allclose(np.asarray(found.weight)[stays], best, atol=1e-2)


@pytest.mark.parametrize("at_once", [2, 6])
def test_several_at_once_are_exactly_as_many(at_once):
    x, weight, of = problem(1)
    found = removed(x, weight, of, 3, damping=0.0, at_once=at_once)
    kept = np.flatnonzero(found.kept)
    assert len(kept) == 3
    best = least_squares(x, weight, of, kept)
    np.testing.assert_allclose(found.weight, best, rtol=1e-2, atol=1e-2)


def test_nothing_lost_changes_nothing():
    x, weight, of = problem(2)
    np.testing.assert_array_equal(removed(x, weight, of, 0).weight, weight)


def test_a_singular_hessian_is_damped():
    x, weight, of = problem(2, samples=4)
    found = removed(x, weight, of, 2)
    assert 0 < float(found.damping) <= 1
    assert np.isfinite(found.weight).all()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"rows": np.zeros((2, 2), int)}, "no row in common"),
        ({"rows": np.array([[0], [99]])}, "from 0 to 11"),
        ({"lost": 6}, "from 0 to 5"),
        ({"at_once": 0}, "at least 1 unit"),
        ({"damping": 2.0}, "damping must be from 0 to 1"),
    ],
)
def test_what_does_not_fit_is_refused(change, told):
    x, weight, of = problem(2)
    options = {"rows": of, "lost": 3} | change
    with pytest.raises(ValueError, match=told):
        removed(x, weight, **options)


@pytest.mark.parametrize("lost", [1, 2])
def test_what_no_damping_helps_ends_and_says_so(lost):
    hessian = np.eye(4, dtype=np.float32)
    hessian[0, 1] = hessian[1, 0] = 9
    found = units.remove(
        jnp.ones((4, 2)), jnp.asarray(hessian), jnp.arange(4)[:, None], lost
    )
    assert np.isinf(found.damping)
    assert int(found.kept.sum()) == 4 - lost
