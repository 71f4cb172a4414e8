"""SparseGPT is the paper's algorithm with explicit inverses; counts are exact."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from jaxprune.posttraining.solvers import layer_problem, sparsegpt
from tests.support import oracles
from tests.support import oracles_trained as slow
from tests.support.small_models import quick_compilation as quick_compilation
from tests.support.trajectories import same_bits

IN, OUT, BLOCK = 40, 6, 32  # two blocks, the second in part; two sweeps in each
problem = functools.partial(slow.problem, size=IN, outputs=OUT, rows=200)


def solve(weight, hessian, removed, **options):
    options = {"block": BLOCK, "pattern": jp.patterns.Unstructured()} | options
    kept = layer_problem.unit_count(weight.shape, options["pattern"]) - removed
    return sparsegpt.solve(jnp.asarray(weight), jnp.asarray(hessian), kept, **options)


CASES = {
    "unstructured": (
        jp.patterns.Unstructured(), BLOCK, BLOCK, slow.choose_unstructured, IN * OUT
    ),
    "per output": (
        jp.patterns.PerOutput(), BLOCK, BLOCK, slow.choose_per_output, IN * OUT
    ),
    "2:4": (jp.patterns.NM(2, 4), BLOCK, 4, lambda *_: slow.choose_nm(2, 4), 0),
    "3:20": (jp.patterns.NM(3, 20), 20, 20, lambda *_: slow.choose_nm(3, 20), 0),
    "tiles 4 x 3": (
        jp.patterns.Block(4, 3), BLOCK, 4,
        lambda removed, size: slow.choose_tiles(removed, size, 4, 3), 20,
    ),
    "tiles 20 x 2": (
        jp.patterns.Block(20, 2), 20, 20,
        lambda removed, size: slow.choose_tiles(removed, size, 20, 2), 6,
    ),
}  # fmt: skip
OTHER_CASES = ("per output", "3:20", "tiles 20 x 2")


@pytest.mark.parametrize(
    "case",
    [
        *("unstructured", "2:4"),
        pytest.param("tiles 4 x 3", marks=pytest.mark.full),
        *(pytest.param(c, marks=pytest.mark.full) for c in OTHER_CASES),
    ],
)
def test_it_is_the_papers_algorithm(case):
    pattern, block, group, choose, units = CASES[case]
    for seed, share in enumerate((0.5, 0.7)):
        weight, hessian = problem(seed)
        removed = round(share * units)
        found = solve(weight, hessian, removed, pattern=pattern)
        expected, mask = slow.sparsegpt(
            weight, hessian, 0.01, block, group, choose(removed, IN)
        )
        np.testing.assert_array_equal(found.mask, mask)
        np.testing.assert_allclose(found.weight, expected, rtol=2e-3, atol=2e-3)
        assert float(found.damping) == pytest.approx(0.01)


@pytest.mark.full
@pytest.mark.parametrize(
    "pattern", [jp.patterns.Unstructured(), jp.patterns.PerOutput()], ids=str
)
def test_every_count_is_exact_and_all_share_one_program(pattern):
    weight, hessian = problem(2)
    weight = np.round(weight)  # ties and zeros everywhere
    before = sparsegpt._solve._cache_size()
    for removed in (0, 1, 7, 119, 201, 239, 240):
        found = solve(weight, hessian, removed, pattern=pattern)
        gone = ~np.asarray(found.mask)
        assert gone.sum() == removed
        assert not np.asarray(found.weight)[gone].any()
        if isinstance(pattern, jp.patterns.PerOutput):
            assert np.ptp(gone.sum(0)) <= 1
    assert sparsegpt._solve._cache_size() <= before + 1


def test_nothing_removed_changes_nothing():
    weight, hessian = problem(3)
    found = solve(weight, hessian, 0)
    np.testing.assert_allclose(found.weight, weight, atol=1e-6)


@pytest.mark.full
def test_the_size_of_the_block_is_only_a_matter_of_speed_where_the_mask_is_given():
    weight, hessian = problem(4)
    mask = oracles.keep_top(np.abs(weight), 120)
    expected, _ = slow.sparsegpt(
        weight, hessian, 0.01, IN, IN, lambda scores, first: mask
    )
    for block in (16, 128):
        found = sparsegpt.update(
            jnp.asarray(weight), jnp.asarray(hessian), jnp.asarray(mask), block=block
        )
        np.testing.assert_array_equal(found.mask, mask)
        np.testing.assert_allclose(found.weight, expected, atol=1e-3)


def test_the_first_input_alone_is_removed_as_optimal_brain_surgery_does():
    weight, hessian = problem(5)
    mask = np.ones((IN, OUT), bool)
    mask[0] = False
    found = sparsegpt.update(
        jnp.asarray(weight), jnp.asarray(hessian), jnp.asarray(mask), block=16
    )
    whole = slow.damped(hessian, 0.01)
    for before, after in zip(weight.T, np.asarray(found.weight).T, strict=True):
        expected, cost = slow.surgeon(before, whole, 0)
        np.testing.assert_allclose(after, expected, atol=1e-3)
        lost = slow.loss(before[:, None], after[:, None], whole)
        assert lost == pytest.approx(cost, rel=1e-3)


@pytest.mark.parametrize("share", [0.5, 0.7])
def test_it_beats_wanda_and_that_beats_magnitude_on_correlated_inputs(share):
    weight, hessian = problem(6)
    removed = round(share * weight.size)
    reach = np.abs(weight) * np.sqrt(np.diag(hessian))[:, None]
    magnitude, wanda = (
        slow.loss(weight, np.where(oracles.keep_top(s, removed), weight, 0), hessian)
        for s in (np.abs(weight), reach)
    )
    found = solve(weight, hessian, removed)
    assert slow.loss(weight, found.weight, hessian) < 0.7 * wanda < 0.5 * magnitude


def test_the_scale_of_the_hessian_does_not_matter():
    weight, hessian = problem(9)
    for scale in (2.0**-60, 2.0**40):
        assert same_bits(
            solve(weight, hessian * scale, 100), solve(weight, hessian, 100)
        )


def test_a_singular_hessian_is_damped_until_it_can_be_factorised():
    weight, _ = problem(10)
    inputs = slow.inputs(8, IN, 10)
    hessian = inputs.T @ inputs - 1e-3 * np.eye(IN)  # fewer positions than inputs
    found = solve(weight, hessian.astype(np.float32), 120, damping=0.0)
    assert 0 < float(found.damping) <= 1
    assert np.isfinite(found.weight).all()
    again = solve(weight, hessian.astype(np.float32), 120, damping=float(found.damping))
    assert same_bits(found, again)


def test_what_no_damping_helps_is_told_and_never_replaced():
    weight, hessian = problem(11)
    found = solve(weight, -hessian, 120)
    assert np.isinf(found.damping)


@pytest.mark.full
@pytest.mark.parametrize("over", ["vmap", "map"])
def test_a_stack_of_experts_is_solved_like_each_of_them(over):
    pairs = [problem(seed) for seed in (12, 13)]
    stack = [np.stack(x) for x in zip(*pairs, strict=True)]
    counts = np.array([100, 170])
    one = lambda x: sparsegpt.solve(*x, block=BLOCK)  # noqa: E731
    mapped = jax.vmap(one) if over == "vmap" else lambda x: jax.lax.map(one, x)
    found = jax.device_get(mapped((*stack, IN * OUT - counts)))
    for i, (weight, hessian) in enumerate(pairs):
        alone = solve(weight, hessian, int(counts[i]))
        np.testing.assert_array_equal(found.mask[i], alone.mask)
        np.testing.assert_allclose(found.weight[i], alone.weight, atol=1e-4)


def test_the_dtype_of_the_weight_is_kept():
    weight, hessian = problem(14)
    weight = weight.astype(jnp.bfloat16)
    assert (
        jax.eval_shape(sparsegpt.solve, weight, hessian, 9).weight.dtype == "bfloat16"
    )


def test_an_empty_weight_stays_empty():
    found = solve(np.zeros((4, 0), np.float32), np.eye(4, dtype=np.float32), 0)
    assert found.weight.shape == found.mask.shape == (4, 0)


WEIGHT, HESSIAN = np.ones((4, 3), np.float32), np.eye(4, dtype=np.float32)


def with_one(matrix, value):
    """The matrix with a value in its first place."""
    return np.where(np.arange(matrix.size).reshape(matrix.shape), matrix, value)


@pytest.mark.parametrize(
    ("weight", "hessian", "kept", "options", "says"),
    [
        (WEIGHT, HESSIAN[:3, :3], 2, {}, "transposed"),
        (WEIGHT[:, 0], HESSIAN, 2, {}, "one matrix"),
        (np.stack([WEIGHT] * 2), HESSIAN, 2, {}, "lax.map"),
        (with_one(WEIGHT, np.float32(np.nan)), HESSIAN, 2, {}, "weight must be finite"),
        (
            WEIGHT,
            with_one(HESSIAN, np.float32(np.inf)),
            2,
            {},
            "hessian must be finite",
        ),
        (WEIGHT, HESSIAN, 13, {}, "0 to 12"),
        (WEIGHT, HESSIAN, -1, {}, "0 to 12"),
        (WEIGHT, HESSIAN, 5, {"pattern": jp.patterns.Block(3, 2)}, "0 to 4"),
        (WEIGHT, HESSIAN, 2, {"damping": -0.1}, "damping"),
        (WEIGHT, HESSIAN, 2, {"damping": float("nan")}, "damping"),
        (WEIGHT, HESSIAN, 2, {"block": 0}, "block"),
        (WEIGHT, HESSIAN, 2, {"pattern": jp.patterns.NM(1, 3)}, "divisible by 3"),
        (WEIGHT, HESSIAN, 2, {"pattern": jp.patterns.Channel()}, r"masks\.make"),
    ],
)
def test_what_cannot_be_solved_is_refused_with_a_way_out(
    weight, hessian, kept, options, says
):
    with pytest.raises(ValueError, match=says):
        sparsegpt.solve(weight, hessian, kept, **options)


def test_other_kinds_are_refused():
    with pytest.raises(TypeError, match="integer"):
        sparsegpt.solve(WEIGHT, HESSIAN, 0.5)
    with pytest.raises(TypeError, match="floating"):
        sparsegpt.solve(WEIGHT.astype(int), HESSIAN, 2)
    with pytest.raises(TypeError, match="boolean"):
        sparsegpt.update(WEIGHT, HESSIAN, WEIGHT)
    with pytest.raises(ValueError, match="shape"):
        sparsegpt.update(WEIGHT, HESSIAN, np.ones((4, 2), bool))
