"""How many units are kept: one place for the counts of masks, plans and tables."""

from fractions import Fraction

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

import jaxprune as jp
from jaxprune.masking import counts, matrix_mask


@given(st.integers(0, 2**40), st.fractions(0, 1, max_denominator=1000))
def test_kept_and_pruned_units_add_up_and_a_half_goes_to_the_even_count(size, share):
    kept = counts.kept_units(share, size)
    exact = share * size
    assert abs((size - kept) - exact) <= Fraction(1, 2)
    if exact.denominator == 2:
        assert (size - kept) % 2 == 0


# Each number of parts compiles a program of its own.
@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 300))
def test_split_evenly_is_what_a_program_makes_of_a_traced_total(total, parts):
    split = counts.split_evenly(total, parts)
    assert sum(split) == total
    assert split == sorted(split, reverse=True)
    assert max(split) - min(split) <= 1
    traced = matrix_mask.spread(jnp.asarray(total), parts)
    np.testing.assert_array_equal(traced, split)


@pytest.mark.parametrize(
    "pattern",
    [
        jp.patterns.Unstructured(),
        jp.patterns.PerOutput(),
        jp.patterns.NM(2, 4),
        jp.patterns.Block(3, 5),
        jp.patterns.Channel(),
    ],
)
@pytest.mark.parametrize("shape", [(8, 6), (3, 8, 6), (0, 6), (8, 0)])
def test_a_pattern_has_as_many_units_as_it_pools_scores_to(pattern, shape):
    units = jax.eval_shape(
        lambda scores: pattern.units(scores, jp.Axes()),
        jax.ShapeDtypeStruct(shape, np.float32),
    )
    assert counts.unit_count(pattern, shape) == units.size
