"""Leaves that lie packed in a file, and matrices that are put together."""

import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from jaxprune.sparse.encodings import Levels
from jaxprune.sparse.grouped import group_matrix
from jaxprune.sparse.packed_matrix import (
    pack_bits,
    pack_levels,
    pack_matrix,
    stack_packed,
)
from jaxprune.sparse.stored_matrix import StoredMatrix
from tests.support.packed import sparse_matrix

ENCODINGS = ["float32", "bfloat16", "int8", "int4"]
X = np.random.default_rng(0).normal(size=(3, 64)).astype(np.float32)


@pytest.mark.full
@pytest.mark.parametrize("name", ENCODINGS)
@pytest.mark.parametrize("density", [0.3, 1])
def test_stacked_matrices_are_those_that_were_stacked(name, density):
    matrices = [
        pack_matrix(sparse_matrix(i, (5, 70), density), values=name, group=32)
        for i in range(3)
    ]
    stacked = stack_packed(matrices)
    assert stacked.shape == (3, 5, 70)
    dense = np.stack([matrix.unpack() for matrix in matrices])
    np.testing.assert_array_equal(stacked.unpack(), dense)
    for i in range(3):
        part = group_matrix(stacked, jnp.int32(i))
        np.testing.assert_array_equal(part.unpack(), dense[i])


def test_matrices_of_two_encodings_are_not_stacked():
    matrix = sparse_matrix(0, (5, 64), 0.3)
    pair = [pack_matrix(matrix), pack_matrix(matrix, values="bfloat16")]
    assert stack_packed(pair) is None


def test_bits_and_values_of_a_file_are_taken_as_they_are():
    matrix = sparse_matrix(1, (6, 64), 0.3, "bfloat16")
    mask = np.packbits(matrix.reshape(-1) != 0, bitorder="little")
    packed = pack_bits(
        mask,
        matrix[matrix != 0],
        shape=(6, 64),
        dtype=matrix.dtype,
        encoding="bfloat16",
    )
    expected = pack_matrix(matrix)
    for name in ("words", "starts", "values"):
        np.testing.assert_array_equal(getattr(packed, name), getattr(expected, name))
    np.testing.assert_array_equal(packed.unpack(), matrix)


@pytest.mark.parametrize("values", [None, "bfloat16", "int8"])
def test_a_stored_leaf_is_read_dense_only_where_it_is_rounded_to_levels(values):
    matrix = sparse_matrix(2, (96, 64), 0.3)
    orders, reads = [], []

    def read():
        reads.append(1)
        return jnp.asarray(matrix.T)

    def packed(transposed):
        orders.append(transposed)
        return pack_matrix(matrix if transposed else matrix.T)

    leaf = StoredMatrix((64, 96), np.dtype("float32"), read, packed=packed)
    result = jp.pack(lambda p, x: x @ p["w"], {"w": leaf}, X, values=values)
    assert (orders, len(reads)) == ([True], int(values == "int8"))
    assert result.params["w"].encoding == (values or "float32")
    product = X @ np.asarray(result.params["w"].unpack()).T
    np.testing.assert_allclose(result.fn(result.params, X), product, 1e-4, 1e-4)


def test_a_stored_leaf_that_is_scaled_on_its_way_is_read_dense():
    matrix = sparse_matrix(3, (64, 96), 0.3)

    def packed(transposed):
        raise AssertionError("its values are others")

    leaf = StoredMatrix(
        matrix.shape, matrix.dtype, lambda: jnp.asarray(matrix), packed=packed
    )
    result = jp.pack(lambda p, x: x @ (0.5 * p["w"]), {"w": leaf}, X)
    np.testing.assert_allclose(
        result.fn(result.params, X), X @ (0.5 * matrix), 1e-4, 1e-4
    )


def test_levels_are_packed_without_being_rounded():
    levels = np.array([[3, 0, 0, -1] * 16, [0] * 64], np.int8)
    scales = np.array([[0.1, 0.3], [1, 1]], np.float32)
    packed = pack_levels(Levels(levels, scales, 32), encoding="int4", dtype="float32")
    np.testing.assert_array_equal(packed.scales, scales)
    expected = levels * np.repeat(scales, 32, axis=1)
    np.testing.assert_array_equal(packed.unpack(), expected)
