"""Products with packed matrices against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxprune.sparse import matmul as matmul_
from jaxprune.sparse.matmul import matmul
from jaxprune.sparse.packed_matrix import pack_matrix, unpack
from tests.support.packed import close, sparse_matrix

X = np.random.default_rng(0).normal(size=(3, 40)).astype(np.float32)
PACKED = pack_matrix(sparse_matrix(0, (6, 40), 0.4))
DENSE = np.asarray(unpack(PACKED))


@pytest.mark.full
@settings(max_examples=60)
@given(
    st.integers(1, 12),
    st.sampled_from([(3, 32), (5, 40), (7, 7), (4, 128)]),
    st.sampled_from([0, 0.1, 0.5, 0.9, 1]),
    st.sampled_from(["float32", "bfloat16", "float16", "int8", "int4"]),
    st.sampled_from([0, 16, 32]),
)
def test_a_product_is_that_of_the_dense_matrix(samples, shape, density, name, group):
    matrix = sparse_matrix(samples, shape, density)
    packed = pack_matrix(matrix, values=name, group=group)
    x = np.random.default_rng(1).normal(size=(samples, shape[1])).astype(np.float32)
    close(matmul(x, packed), x, unpack(packed).astype(jnp.float32))


@pytest.mark.parametrize("name", ["bfloat16", "int8", "int4"])
def test_rounded_values_are_multiplied_as_they_are_stored(name):
    packed = pack_matrix(DENSE, values=name)
    close(matmul(X, packed), X, unpack(packed).astype(jnp.float32))


def test_axes_before_the_inputs_are_kept():
    x = np.broadcast_to(X[:, None], (3, 2, 40))
    result = jax.jit(matmul)(x, PACKED)
    assert result.shape == (3, 2, 6)
    close(result, x, DENSE)
    assert matmul(X[0], PACKED).shape == (6,)
    assert matmul(X[:0], PACKED).shape == (0, 6)


@pytest.mark.parametrize("name", ["float32", "int8"])
def test_a_matrix_may_have_no_rows(name):
    packed = pack_matrix(np.zeros((0, 40), np.float32), values=name, group=0)
    assert matmul(X, packed).shape == (3, 0)


def test_tiles_change_nothing(monkeypatch):
    monkeypatch.setattr(matmul_, "_TILE", 90)  # two rows of forty
    close(matmul(X, PACKED), X, DENSE)


def test_each_matrix_of_a_batch_meets_its_vectors():
    matrices = sparse_matrix(1, (4, 5, 40), 0.4)
    x = np.random.default_rng(2).normal(size=(4, 3, 40)).astype(np.float32)
    result = matmul(x, pack_matrix(matrices))
    assert result.shape == (4, 3, 5)
    for i in range(4):
        close(result[i], x[i], matrices[i])


def test_the_derivative_by_the_vectors_is_that_of_the_dense_product():
    def loss(x, product):
        return jnp.sum(jnp.sin(product(x)))

    gradient = jax.jit(jax.grad(lambda x: loss(x, lambda x: matmul(x, PACKED))))(X)
    expected = jax.grad(lambda x: loss(x, lambda x: x @ DENSE.T))(X)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-5)


def test_products_are_mapped_and_scanned():
    mapped = jax.vmap(lambda x: matmul(x, PACKED))(X)
    _, scanned = jax.lax.scan(lambda c, x: (c, matmul(x, PACKED)), 0, X)
    for result in (mapped, scanned):
        close(result, X, DENSE)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit])
def test_gradients_of_packed_weights_are_refused(wrap):
    def loss(values):
        packed = jax.tree.unflatten(jax.tree.structure(PACKED), values)
        return jnp.sum(matmul(X, packed))

    leaves = jax.tree.leaves(PACKED)
    with pytest.raises(TypeError, match="packed weights have no gradients"):
        jax.grad(wrap(loss), allow_int=True)(leaves)


@pytest.mark.parametrize(
    ("x", "packed", "sentence"),
    [
        (np.ones((2, 3), np.float32), PACKED, "needs vectors of its 40 inputs"),
        (np.float32(1), PACKED, "needs vectors of its 40 inputs"),
        (
            np.ones((3, 2, 8), np.float32),
            pack_matrix(np.ones((2, 4, 8), np.float32)),
            r"\(2, 4, 8\) needs their batch as the first axis, got \(3, 2, 8\)",
        ),
    ],
)
def test_vectors_of_another_shape_are_refused(x, packed, sentence):
    with pytest.raises(ValueError, match=sentence):
        matmul(x, packed)


@pytest.mark.parametrize("shape", [(5, 0), (2, 5, 0)])
def test_a_matrix_may_have_no_inputs(shape):
    packed = pack_matrix(np.zeros(shape, np.float32))
    x = np.ones((*shape[:-2], 3, 0), np.float32)
    result = matmul(x, packed)
    assert result.shape == (*shape[:-2], 3, 5)
    assert not np.asarray(result).any()
