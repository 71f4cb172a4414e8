"""sums.total: one result for every order of the terms, as close as float32 can say."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxprune.arrays import counting, exact_sum
from tests.support.trajectories import same_bits


def heavy_tailed(count, scale=1.0):
    rng = np.random.default_rng(count)
    sign = rng.choice([-1, 1], (count, 3))
    return (rng.lognormal(0, 3, (count, 3)) * sign * scale).astype(np.float32)


@pytest.mark.parametrize("count", [1, 2, 3, 17, 1000, 70000])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_it_is_the_exact_sum_in_any_order(count, scale):
    terms = heavy_tailed(count, scale)
    found = np.asarray(exact_sum.total(jnp.asarray(terms), 0))
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(count)
        assert same_bits(
            np.asarray(exact_sum.total(jnp.asarray(terms[order]), 0)), found
        )
    exact = np.array([math.fsum(column) for column in terms.T.astype(np.float64)])
    size = np.maximum(np.abs(terms).max(0), np.abs(exact))
    # Half a unit for the rounding to float32, half for what is cut off the terms.
    assert np.all(np.abs(found[0] - exact) <= size * 2.0**-24 * 1.01)


def test_a_plain_sum_depends_on_the_order():
    """Why this is here at all; NumPy's own float32 sum from both ends."""
    terms = heavy_tailed(1000)[:, 0]
    ends = {float(np.add.accumulate(t)[-1]) for t in (terms, terms[::-1])}
    assert len(ends) == 2


SPECIAL = st.sampled_from([1.0, -2.5, 0.0, np.nan, np.inf, -np.inf, 3e38])


# Two lengths, for two compilations.
@given(st.one_of(st.just([]), st.lists(SPECIAL, min_size=7, max_size=7)))
def test_special_values_are_those_of_any_sum(terms):
    with np.errstate(all="ignore"):
        expected = np.float32(np.sum(np.array(terms, np.float64)))
    found = np.asarray(exact_sum.total(np.array(terms, np.float32)))
    np.testing.assert_array_equal(found, [expected])


@pytest.mark.skipif(len(jax.devices()) < 8, reason="needs eight devices")
@pytest.mark.parametrize(
    ("kind", "axis"),
    [
        (AxisType.Auto, 1),
        pytest.param(AxisType.Auto, 0, marks=pytest.mark.full),
        pytest.param(AxisType.Explicit, None, marks=pytest.mark.full),
    ],
    ids=str,
)
def test_the_bits_are_the_same_on_eight_devices(kind, axis):
    terms = jnp.asarray(heavy_tailed(4096).reshape(96, 128))
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind, kind))
    one = exact_sum.total(terms, axis)
    for spec in (P("x"), P("y", "x"), P(None, ("x", "y"))):
        many = exact_sum.total(jax.device_put(terms, NamedSharding(mesh, spec)), axis)
        assert same_bits(np.asarray(many), np.asarray(one))


@pytest.mark.parametrize("axis", [None, 0, 1])
def test_one_nan_among_many_makes_its_sum_nan(axis):
    terms = np.ones((1000, 1024), np.float32)
    terms[500, 3] = np.nan
    expected = np.sum(terms, axis, keepdims=True)
    np.testing.assert_array_equal(
        jax.jit(lambda x: exact_sum.total(x, axis))(terms), expected
    )


def test_counts_past_a_uint32_are_added_up_by_the_host():
    # Each part is of at most 128 x 2048 x 768 = 201,326,592, or of 65,536.
    for shape, left in {
        (48, 128, 2048, 768): (48,),
        (1, 2**16, 2**16): (1, 2**16),
    }.items():
        stack = jax.ShapeDtypeStruct(shape, bool)
        parts = jax.eval_shape(lambda bits: counting.parts(bits, bits.size), stack)
        assert parts.shape == left
    assert counting.whole(np.full(48, 201_326_592, np.uint32)) == 9_663_676_416
    bits = np.random.default_rng(0).random((3, 5, 7)) > 0.5
    for most in (bits.size, 2**32):
        assert counting.whole(counting.parts(jnp.asarray(bits), most)) == bits.sum()


def test_a_number_is_its_own_sum_in_float32():
    assert exact_sum.total(jnp.asarray(1.5, jnp.bfloat16)).dtype == jnp.float32
