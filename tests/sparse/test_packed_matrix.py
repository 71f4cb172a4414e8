"""Packed matrices hold the bits that they were made of, in the layout of `compact`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxprune.sparse import expansion
from jaxprune.sparse.encodings import Levels
from jaxprune.sparse.packed_matrix import (
    pack_bits,
    pack_levels,
    pack_matrix,
    unpack,
)
from tests.support.packed import DTYPES, sparse_matrix


def bits(array):
    array = np.asarray(array)
    return array.view(f"u{array.dtype.itemsize}")


@pytest.mark.full
@given(
    st.sampled_from([(3, 32), (5, 40), (1, 7), (0, 8), (2, 3, 33)]),
    st.sampled_from([0, 0.1, 0.5, 0.9, 1]),
    st.sampled_from(sorted(DTYPES)),
)
def test_what_is_packed_comes_back_bit_for_bit(shape, density, dtype):
    matrix = sparse_matrix(0, shape, density, dtype)
    rows = unpack(pack_matrix(matrix))
    assert rows.dtype == matrix.dtype
    np.testing.assert_array_equal(bits(rows), bits(matrix))


@pytest.mark.parametrize("shape", [(3, 32), (5, 40), (0, 8), (2, 3, 33)])
def test_any_shape_comes_back(shape):
    matrix = sparse_matrix(0, shape, 0.4)
    np.testing.assert_array_equal(bits(unpack(pack_matrix(matrix))), bits(matrix))


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_minus_zero_and_the_payload_of_a_nan_are_kept(dtype):
    matrix = np.zeros((2, 64), DTYPES[dtype])
    form = bits(matrix).dtype
    quiet = bits(np.array(np.nan, DTYPES[dtype]))
    bits(matrix)[0, 3] = quiet | form.type(5)  # NaN with a payload
    matrix[1, 40] = -0.0
    packed = pack_matrix(matrix)
    assert packed.starts.tolist() == [0, 1, 2]
    np.testing.assert_array_equal(bits(packed.unpack()), bits(matrix))


def test_a_kept_weight_may_be_zero():
    matrix = np.zeros((2, 64), np.float32)
    mask = np.zeros((2, 64), bool)
    mask[0, :3] = True
    packed = pack_matrix(matrix, mask=mask)
    assert (packed.kept, packed.starts.tolist()) == (3, [0, 3, 3])


def test_a_weight_outside_of_the_mask_is_pruned():
    matrix = np.ones((2, 64), np.float32)
    mask = np.arange(128).reshape(2, 64) % 4 == 0
    np.testing.assert_array_equal(
        pack_matrix(matrix, mask=mask).unpack(), matrix * mask
    )


def test_the_layout_is_one_bit_a_weight_in_c_order_lowest_first():
    matrix = sparse_matrix(1, (4, 96), 0.4)
    packed = pack_matrix(matrix)
    flat = np.packbits(matrix.reshape(-1) != 0, bitorder="little")
    assert np.asarray(packed.words).tobytes() == flat.tobytes()
    kept = matrix[matrix != 0]
    np.testing.assert_array_equal(packed.values[: kept.size], kept)


def test_what_has_no_zeros_is_stored_without_bits():
    matrix = sparse_matrix(2, (8, 64), 1, "bfloat16")
    packed = pack_matrix(matrix)
    assert packed.words is None
    assert packed.kept == 512
    np.testing.assert_array_equal(bits(packed.unpack()), bits(matrix))


@pytest.mark.full
@pytest.mark.parametrize(("name", "most"), [("int8", 127), ("int4", 7)])
@pytest.mark.parametrize("density", [0.3, 1])
@pytest.mark.parametrize(("inputs", "group"), [(128, 32), (96, 0), (50, 16), (7, 0)])
def test_levels_are_within_half_a_step_of_the_weights(
    name, most, density, inputs, group
):
    matrix = sparse_matrix(3, (6, inputs), density)
    packed = pack_matrix(matrix, values=name, group=group)
    width = group or inputs
    levels = packed.unpack()
    for start in range(0, inputs, width):
        part = matrix[:, start : start + width]
        largest = np.abs(part).max(axis=1, keepdims=True)
        error = np.abs(np.asarray(levels)[:, start : start + width] - part)
        # A smaller scale is taken only where the squared error is smaller with it.
        squares = np.sum((largest / most / 2 * 1.01) ** 2 * np.ones_like(part), axis=1)
        assert (np.sum(error**2, axis=1) <= squares + 1e-12).all()
    np.testing.assert_array_equal(np.asarray(levels)[matrix == 0], 0)


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_weights_on_levels_come_back_exactly(name):
    most = {"int8": 127, "int4": 7}[name]
    rng = np.random.default_rng(4)
    levels = rng.integers(-most, most + 1, (8, 128))
    levels *= rng.random((8, 128)) < 0.5
    levels[:, ::32] = most  # the largest weight of a group has the highest level
    matrix = (levels * 0.03125).astype(np.float32)
    packed = pack_matrix(matrix, values=name, group=32)
    np.testing.assert_array_equal(packed.unpack(), matrix)


def test_rows_are_expanded_by_number():
    matrix = sparse_matrix(5, (6, 33), 0.5)
    packed = pack_matrix(matrix)
    rows = jax.jit(expansion.expand)(packed, jnp.array([4, 0, 4]))
    np.testing.assert_array_equal(rows, matrix[[4, 0, 4]])


@pytest.mark.parametrize(
    ("matrix", "options", "sentence"),
    [
        (np.zeros((2, 2), np.int32), {}, "needs weights of float32.*got int32"),
        (np.zeros(2, np.float32), {}, r"needs the axes \(out, in\).*got \(2,\)"),
        (np.zeros((2, 2), np.float32), {"values": "int3"}, "got 'int3'"),
        (np.full((2, 2), -1e6, "f4"), {"values": "float16"}, "-1e.06 is infinite as"),
    ],
)
def test_what_is_no_matrix_is_refused(matrix, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        pack_matrix(matrix, **options)


@pytest.mark.parametrize("values", ["int8", "int4"])
@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_levels_say_that_a_number_is_not_finite(values, wrong):
    matrix = sparse_matrix(1, (4, 64), 0.5)
    matrix[2, 40] = wrong
    packed = pack_matrix(matrix, values=values, group=32)
    scales = np.isfinite(np.asarray(packed.scales))
    assert scales.tolist() == [[True, True]] * 2 + [[True, False]] + [[True, True]]
    finite = np.isfinite(np.asarray(unpack(packed)))
    assert finite[[0, 1, 3]].all()
    assert not finite[2].all()


def test_a_mask_without_a_weight_that_is_not_finite_is_none():
    matrix = sparse_matrix(1, (4, 64), 0.5)
    mask = matrix != 0
    matrix[2, 40], mask[2, 40] = np.nan, False
    packed = pack_matrix(matrix, mask=mask, values="int8", group=32)
    assert np.isfinite(np.asarray(packed.scales)).all()


@pytest.mark.parametrize("name", ["int8", "int4"])
@pytest.mark.parametrize(("zeros", "whole"), [(0, True), (1, True), (160, False)])
def test_bits_at_hand_give_the_layout_that_is_smaller(name, zeros, whole):
    rng = np.random.default_rng(3)
    numbers = rng.integers(1, 7, (4, 64)).astype(np.int8)
    numbers.reshape(-1)[:zeros] = 0
    scales = rng.normal(size=(4, 2)).astype(np.float32)
    expected = pack_levels(Levels(numbers, scales, 32), encoding=name, dtype="float32")
    values = numbers[numbers != 0]
    if name == "int4":  # two a byte
        pairs = np.pad(values, (0, values.size % 2)).reshape(-1, 2)
        values = (pairs[:, 0] | pairs[:, 1] << 4).astype(np.uint8)
    packed = pack_bits(
        np.packbits(numbers != 0, bitorder="little"),
        values,
        shape=(4, 64),
        dtype="float32",
        encoding=name,
        scales=scales,
        group=32,
    )
    whole = whole or name == "int4"
    assert (packed.words is None) == (expected.words is None) == whole
    np.testing.assert_array_equal(packed.values, expected.values)
    np.testing.assert_array_equal(unpack(packed), unpack(expected))
