"""Inputs, and whole experts, that no calibration sample reached: counts stay exact."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from jaxprune.posttraining import solve_weight
from jaxprune.posttraining.pipeline.input_statistics import InputStatistics
from jaxprune.posttraining.solvers import alps, sparsegpt
from tests.support import oracles
from tests.support import oracles_trained as slow
from tests.support.chained import chained
from tests.support.small_models import correlated, draw, keep_per_output
from tests.support.small_models import quick_compilation as quick_compilation

IN, OUT = 64, 24
problem = functools.partial(slow.problem, size=IN, outputs=OUT, rows=200)


def mask_of(weight, removed, pattern):
    """The mask of a matrix by magnitude."""
    size = np.abs(weight)
    if isinstance(pattern, jp.patterns.NM):
        return oracles.keep_nm(size, pattern.n, pattern.m)
    if isinstance(pattern, jp.patterns.PerOutput):
        return keep_per_output(size, removed)
    return oracles.keep_top(size, removed)


@pytest.mark.full
@pytest.mark.parametrize("removed", [40, 280])
@pytest.mark.parametrize("solver", [sparsegpt, alps])
def test_of_inputs_that_no_sample_reached_the_smallest_go_first_and_no_more(
    solver, removed
):
    weight, hessian = problem(7)
    dead = [0, 5, 33]
    hessian[dead] = 0
    hessian[:, dead] = 0
    found = jax.device_get(solver.solve(weight, hessian, weight.size - removed))
    assert (found.weight == 0).sum() == (~found.mask).sum() == removed
    # SparseGPT's 64 inputs are one block, in which each of the 3 x 24 goes first.
    lost = min(removed, 3 * OUT)
    kept = oracles.keep_top(np.abs(weight[dead]), lost)
    np.testing.assert_array_equal(found.mask[dead], kept)
    after = found.weight[dead]
    np.testing.assert_allclose(after, np.where(kept, weight[dead], 0), rtol=1e-6)
    # What is left of the problem is solved as if they were not there.
    alive = np.setdiff1d(np.arange(IN), dead)
    alone = solver.solve(
        weight[alive],
        hessian[np.ix_(alive, alive)],
        weight[alive].size - (removed - lost),
        damping=0.01 * len(alive) / IN,  # of a mean over fewer inputs
    )
    np.testing.assert_allclose(found.weight[alive], alone.weight, atol=2e-4)


@pytest.mark.full
@pytest.mark.parametrize(
    ("solver", "pattern"),
    [
        (sparsegpt, jp.patterns.Unstructured()),
        (alps, jp.patterns.NM(2, 4)),
        (sparsegpt, jp.patterns.PerOutput()),
        (sparsegpt, jp.patterns.NM(2, 4)),
        (alps, jp.patterns.Unstructured()),
        (alps, jp.patterns.PerOutput()),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_layer_that_no_sample_reached_is_pruned_by_magnitude(solver, pattern):
    weight, hessian = problem(8)
    found = solver.solve(weight, 0 * hessian, weight.size - 840, pattern=pattern)
    expected = mask_of(weight, 840, pattern)
    np.testing.assert_array_equal(found.mask, expected)
    np.testing.assert_allclose(
        found.weight, np.where(expected, weight, 0), rtol=1e-6, atol=0
    )


EXPERTS, WIDTH = 4, 16
MIXTURE = {
    name: draw(i, EXPERTS, WIDTH, WIDTH) for i, name in enumerate(("up", "down"), 1)
}
# Expert 3 gets no sample.
SENT = np.stack([correlated(i, 30, WIDTH) * (i < 3) for i in range(EXPERTS)])


def mixture(p, x):
    return jnp.einsum(
        "esh,eho->eso", jnp.tanh(jnp.einsum("esi,eih->esh", x, p["up"])), p["down"]
    )


@pytest.mark.full
@pytest.mark.parametrize(
    "method",
    [
        "wanda",
        *(
            pytest.param(m, marks=pytest.mark.full)
            for m in ("sparsegpt", "ria", "alps")
        ),
    ],
)
def test_an_expert_that_no_sample_was_sent_to_is_pruned_by_magnitude(method, capsys):
    pruned, report = jp.prune_trained(
        mixture, MIXTURE, [SENT], method=method, sparsity=0.5
    )
    for name, before in MIXTURE.items():
        after = np.asarray(pruned[name])
        assert [(expert == 0).sum() for expert in after] == [128] * EXPERTS
        kept = after[3] != 0
        np.testing.assert_array_equal(after[3][kept], before[3][kept])
    assert report["achieved"] == 0.5
    pattern = jp.passes.METHODS[method]().usual_pattern
    for name in MIXTURE:
        expected = mask_of(MIXTURE[name][3], 128, pattern)
        np.testing.assert_array_equal(np.asarray(pruned[name])[3] != 0, expected)
    rows = {row["name"]: row["by_magnitude"] for row in report["weights"]}
    assert rows == {"up": [3], "down": [3]}
    err = capsys.readouterr().err
    assert "in all of the calibration: 1 of 4 matrices of 'up' (3)" in err
    assert "1 of 4 matrices of 'down' (3)" in err


@pytest.mark.full
@pytest.mark.parametrize("size", [1e-23, 1e-30])
@pytest.mark.parametrize("method", ["sparsegpt", "alps"])
def test_activations_whose_squares_underflow_empty_no_matrix(method, size):
    weight = draw(3, WIDTH, WIDTH)
    pruned, report = jp.prune_trained(
        lambda p, x: x @ p["w"], {"w": weight}, [size * correlated(4, 30, WIDTH)],
        method, sparsity=0.5,
    )  # fmt: skip
    assert (np.asarray(pruned["w"]) == 0).sum() == 128
    assert report["weights"][0]["by_magnitude"] == [0]


@pytest.mark.parametrize(
    "method", ["sparsegpt", pytest.param("alps", marks=pytest.mark.full)]
)
def test_no_more_is_pruned_than_was_asked_for(method):
    x = correlated(5, 60, WIDTH)
    x[:, [1, 4, 6, 11]] = 0
    pruned, report = jp.prune_trained(
        lambda p, x: x @ p["w"], {"w": draw(6, WIDTH, WIDTH)}, [x], method, 0.1
    )
    assert (np.asarray(pruned["w"]) == 0).sum() == 26
    assert report["weights"][0]["by_magnitude"] == []


def test_an_expert_that_few_samples_reached_is_pruned_by_magnitude():
    square = np.ones((4, 3), np.float32)
    square[3] = 0
    reached = np.array([15, 16, 40, 0], np.float32)
    routed = InputStatistics(np.float32(40), square, None, reached)
    assert solve_weight._unreached(chained("wanda"), routed) == [0, 3]
    assert solve_weight._unreached(chained("magnitude"), routed) == []
    # Nothing chose among these: there are ten samples, and each matrix has them all.
    every = InputStatistics(
        np.float32(10), np.ones((2, 3), np.float32), None, np.full(2, 10, np.float32)
    )
    assert solve_weight._unreached(chained("wanda"), every) == []
