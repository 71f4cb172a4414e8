"""Matrices with zeros, and their products in float64."""

import ml_dtypes
import numpy as np

DTYPES = {
    "float32": np.float32,
    "bfloat16": ml_dtypes.bfloat16,
    "float16": np.float16,
}


def sparse_matrix(seed, shape, density, dtype="float32"):
    """A matrix of which about this share is not zero; some rows have no weight."""
    rng = np.random.default_rng(seed)
    mask = rng.random(shape) < density
    mask &= (rng.random((*shape[:-1], 1)) < 0.9) | (density == 1)
    return np.where(mask, rng.normal(size=shape), 0).astype(DTYPES[dtype])


def close(result, x, matrix):
    """Checks x @ W^T against float64, by the size of what is summed."""
    x, matrix = np.asarray(x, np.float64), np.asarray(matrix, np.float64)
    expected = np.einsum("...i,oi->...o", x, matrix)
    # The error of a sum is relative to the terms and not to the sum.
    scale = np.einsum("...i,oi->...o", np.abs(x), np.abs(matrix))
    error = np.abs(np.asarray(result, np.float64) - expected)
    np.testing.assert_array_less(error, 2e-6 * scale + 1e-30)
