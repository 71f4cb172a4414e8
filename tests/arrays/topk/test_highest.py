"""Masks of a traced count are the oracle's and those of `masks.make`."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxprune as jp
from jaxprune.arrays.topk import thresholds
from jaxprune.masking import matrix_mask
from tests.support import oracles
from tests.support.trajectories import array

SHAPE = (12, 10)
VALUES = [0.0, -0.0, 1.0, -1.0, 0.5, 1e-42, 3e4, np.inf, -np.inf, np.nan]
PATTERNS = [
    jp.patterns.Unstructured(),
    jp.patterns.PerOutput(),
    jp.patterns.NM(2, 4),
    jp.patterns.Block(3, 2),
    jp.patterns.Block(5, 4),
    jp.patterns.Channel(),
]
FIRST = (jp.patterns.Unstructured(), jp.patterns.NM(2, 4))


def scores_of(seed, kind, shape=SHAPE):
    rng = np.random.default_rng(seed)
    if kind == "special":
        return rng.choice(VALUES, size=shape).astype(np.float32)
    values = rng.normal(size=shape)
    if kind == "wide":
        values = values * 10.0 ** rng.integers(-20, 20, shape)
    return (np.round(values) if kind == "ties" else values).astype(np.float32)


def keep_along(scores, kept, axis):
    """The oracle on each slice."""
    rows = np.moveaxis(scores, axis, -1)
    found = [
        oracles.keep_top(row, len(row) - number)
        for row, number in zip(rows.reshape(-1, rows.shape[-1]), kept, strict=True)
    ]
    return np.moveaxis(np.reshape(found, rows.shape), -1, axis)


whole = jax.jit(thresholds.highest)
along = jax.jit(thresholds.highest, static_argnums=2)
masked = jax.jit(matrix_mask.mask, static_argnums=2)
kinds = st.sampled_from(["normal", "ties", "special", "wide"])


@given(st.integers(0, 1000), kinds, st.integers(0, 120))
def test_exactly_the_highest_are_kept_and_the_first_of_ties(seed, kind, kept):
    scores = scores_of(seed, kind)
    expected = oracles.keep_top(scores, scores.size - kept)
    np.testing.assert_array_equal(whole(scores, kept), expected)


@given(st.integers(0, 1000), kinds, st.sampled_from([0, 1, -1]), st.data())
def test_each_slice_keeps_its_own_number(seed, kind, axis, data):
    scores = scores_of(seed, kind)
    length, slices = SHAPE[axis], SHAPE[1 - axis % 2]
    number = st.lists(st.integers(0, length), min_size=slices, max_size=slices)
    kept = np.array(data.draw(number))
    expected = keep_along(scores, kept, axis)
    np.testing.assert_array_equal(along(scores, kept, axis), expected)


@pytest.mark.parametrize(
    "dtype", [jnp.bfloat16, pytest.param(jnp.float16, marks=pytest.mark.full)]
)
def test_half_precision_is_ranked_as_it_is(dtype):
    scores = jnp.asarray(scores_of(1, "normal").astype(dtype))
    expected = oracles.keep_top(array(scores), 50)
    np.testing.assert_array_equal(thresholds.highest(scores, 70), expected)


@pytest.mark.full
def test_one_number_serves_all_slices_of_any_axis():
    scores = scores_of(2, "ties", (3, 4, 5))
    mask = np.asarray(thresholds.highest(jnp.asarray(scores), 2, axis=1))
    np.testing.assert_array_equal(mask, keep_along(scores, [2] * 15, 1))


@pytest.mark.parametrize("kept", [-3, 121, 1000])
def test_a_number_out_of_range_is_the_nearest_in_range(kept):
    mask = np.asarray(whole(scores_of(0, "normal"), kept))
    assert mask.sum() == (0 if kept < 0 else mask.size)


def test_nothing_of_nothing():
    assert thresholds.highest(np.zeros((0, 4), np.float32), 0).shape == (0, 4)
    assert thresholds.highest(np.zeros((4, 0), np.float32), 0, axis=0).shape == (4, 0)


def test_a_number_that_is_no_integer_is_refused():
    with pytest.raises(TypeError, match="integer"):
        thresholds.highest(np.ones(4, np.float32), 0.5)
    with pytest.raises(TypeError, match="floating"):
        thresholds.highest(np.ones(4, np.int32), 2)


@pytest.mark.parametrize(
    "pattern",
    [
        pytest.param(pattern, marks=[] if pattern in FIRST else pytest.mark.full)
        for pattern in PATTERNS
    ],
    ids=str,
)
@settings(max_examples=8)
@given(seed=st.integers(0, 1000), kind=kinds, share=st.floats(0, 0.999))
def test_a_pattern_keeps_what_masks_make_keeps(pattern, seed, kind, share):
    scores = scores_of(seed, "ties" if kind == "special" else kind)
    units = jax.eval_shape(lambda s: pattern.units(s, jp.Axes()), scores).size
    removed = round(share * units)
    fixed = pattern.sparsity is not None
    masks = jp.masks.make(
        {"w": jnp.asarray(scores)},
        None if fixed else min(removed / units, 1 - 1e-9),
        pattern=pattern,
    )
    np.testing.assert_array_equal(masked(scores, units - removed, pattern), masks["w"])


def test_one_program_serves_all_counts():
    per_output = jp.patterns.PerOutput()
    traced = chex.assert_max_traces(lambda s, k: matrix_mask.mask(s, k, per_output), 1)
    compiled = jax.jit(traced)
    scores = jnp.asarray(scores_of(4, "normal"))
    for kept in (0, 17, 60, 120):
        mask = np.asarray(compiled(scores, kept))
        assert mask.sum() == kept
        assert np.ptp(mask.sum(0)) <= 1


@pytest.mark.parametrize("over", [pytest.param("vmap", marks=pytest.mark.full), "map"])
def test_a_stack_of_matrices_has_a_count_each(over):
    one = lambda x: matrix_mask.mask(*x, jp.patterns.Unstructured())  # noqa: E731
    scores = scores_of(4, "ties")
    stack, counts = np.stack([scores, -scores]), np.array([30, 77])
    mapped = jax.vmap(one) if over == "vmap" else lambda x: jax.lax.map(one, x)
    masks = np.asarray(jax.jit(mapped)((stack, counts)))
    for mask, own, kept in zip(masks, stack, counts, strict=True):
        expected = oracles.keep_top(own, own.size - int(kept))
        np.testing.assert_array_equal(mask, expected)
