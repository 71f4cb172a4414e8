"""Scales are found again from the values alone, or not at all."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxprune.lm.checkpoints import levels
from jaxprune.lm.checkpoints.levels import BFLOAT16, Grid, Scales
from tests.support.hf_directories import normal
from tests.support.rounded import rounded
from tests.support.trajectories import bits

DTYPES = [np.dtype(np.float32), np.dtype(np.float16), BFLOAT16]


@given(
    shape=st.sampled_from([(5, 40), (40, 5), (2, 3, 33), (2, 33, 3), (1, 1), (70, 16)]),
    grid=st.builds(Grid, st.sampled_from([4, 8]), st.sampled_from([1, 16, 32])),
    axis=st.sampled_from([-1, -2]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**20),
    share=st.sampled_from([0.0, 0.5, 0.95, 1.0]),
    largest=st.integers(1, 7),
)
def test_every_rounded_tensor_comes_back_bit_for_bit(
    shape, grid, axis, dtype, seed, share, largest
):
    _, tensor = rounded(shape, grid, axis, dtype, seed, share, largest)
    found = levels.find_scales(tensor, grid)
    assert found is not None
    flat, scales = tensor.reshape(-1), found.spread().reshape(-1)
    own = levels.to_levels(flat, scales)
    assert np.abs(own).max() <= grid.most
    again = levels.from_levels(own, scales, dtype)
    np.testing.assert_array_equal(bits(again), bits(flat))


@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize("width", [4, 8])
def test_levels_are_those_that_went_in_where_each_group_has_the_highest(axis, width):
    grid = Grid(width, 16)
    own, tensor = rounded((32, 64), grid, axis, np.float32, share=0.3, whole=True)
    found, scales = levels.split_levels(tensor, grid)
    np.testing.assert_array_equal(found, own)
    assert scales.shape == levels.scales_shape(own.shape, grid, axis)


def test_scales_of_a_part_are_those_of_the_whole():
    shape, grid = (3, 37, 11), Grid(4, 8)
    for axis in (-1, -2):
        counts = levels.scales_shape(shape, grid, axis)
        own = np.arange(np.prod(counts)).reshape(counts).astype(BFLOAT16)
        scales = Scales(grid, axis, shape, own)
        index = np.indices(shape)
        index[axis] //= 8
        expected = own[tuple(index)].astype(np.float32)
        np.testing.assert_array_equal(scales.spread(), expected)


def one_off(tensor):
    tensor[3, 3] += np.float32(1e-3)


def minus_zero(tensor):
    tensor[3, 3] = -0.0


def not_a_number(tensor):
    tensor[3, 3] = np.nan


@pytest.mark.parametrize("spoil", [one_off, minus_zero, not_a_number])
def test_one_value_beside_its_level_is_enough_for_none(spoil):
    _, tensor = rounded((64, 64), Grid(4, 32), -1, np.float32)
    spoil(tensor)
    assert levels.find_scales(tensor, Grid(4, 32)) is None


@pytest.mark.parametrize(
    "tensor",
    [
        np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32),
        np.ones(64, np.float32),
        np.ones((4, 4), np.int8),
        np.ones((0, 4), np.float32),
        np.ones((4, 4), ml_dtypes.float8_e4m3fn),
    ],
    ids=["normal", "vector", "integers", "empty", "eight bits"],
)
def test_what_was_not_rounded_has_no_scales(tensor):
    assert levels.find_scales(tensor, Grid(4, 32)) is None
    assert levels.split_levels(tensor, Grid(4, 32)) is None


@given(own=st.lists(st.integers(-7, 7), max_size=33), width=st.sampled_from([4, 8]))
def test_packed_levels_come_back(own, width):
    own = np.array(own, np.int8)
    packed = levels.pack_levels(own, width)
    assert packed.size == -(-own.size * width // 8)
    np.testing.assert_array_equal(levels.unpack_levels(packed, width, own.size), own)


@pytest.mark.parametrize("width", [4, 8])
def test_qwix_takes_them_as_they_are(width):
    qwix = pytest.importorskip("qwix")
    import jax.numpy as jnp

    grid = Grid(width, 32)
    _, kernel = rounded((64, 24), grid, -2, np.float32)
    own, scales = levels.split_levels(kernel, grid)
    kind = jnp.int4 if width == 4 else jnp.int8
    array = qwix.QArray(jnp.asarray(own, kind), jnp.asarray(scales, jnp.float32))
    np.testing.assert_array_equal(qwix.dequantize(array), kernel)
    x = jnp.asarray(normal(0, 5, 64))
    dims = (((1,), (0,)), ((), ()))
    np.testing.assert_allclose(
        qwix.dot_general(x, array, dims), np.asarray(x) @ kernel, rtol=1e-4, atol=1e-4
    )
