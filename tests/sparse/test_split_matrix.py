"""Packed matrices over a mesh: each device has its rows, and only vectors move."""

import contextlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxprune as jp
from jaxprune.sparse.packed_matrix import pack_matrix, unpack
from jaxprune.sparse.split_matrix import (
    SplitMatrix,
    split_expand,
    split_matmul,
    split_rows,
)
from tests.support.packed import close, sparse_matrix

pytestmark = pytest.mark.jax_api

KINDS = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}
WIDTH = 64
PARAMS = {
    "table": sparse_matrix(0, (50, WIDTH), 0.4),  # 4 devices do not divide 50
    "up": sparse_matrix(1, (WIDTH, 96), 0.3),
    "down": sparse_matrix(2, (96, WIDTH), 0.3),
    "bias": np.ones((1, 96), np.float32),
}
SPECS = {"table": P(None, "model"), "up": P(None, "model"), "down": P("model")}
PARAMS_ARRAYS = jax.tree.map(jnp.asarray, PARAMS)
TOKENS = np.array([3, 49, 0, 7, 1, 2, 3, 4])


def function(params, tokens):
    hidden = params["table"][tokens]
    hidden = jnp.tanh(hidden @ params["up"] + params["bias"]) @ params["down"]
    return hidden @ params["table"].T


def mesh_of(kind):
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=(KINDS[kind],) * 2)


def inside(mesh):
    """The context of a mesh with Explicit axes."""
    explicit = AxisType.Explicit in mesh.axis_types
    return jax.set_mesh(mesh) if explicit else contextlib.nullcontext()


@pytest.fixture(scope="module", params=KINDS)
def packed(request):
    """A mesh and the function packed on it."""
    mesh = mesh_of(request.param)
    params = {
        name: jax.device_put(leaf, NamedSharding(mesh, SPECS.get(name, P())))
        for name, leaf in PARAMS.items()
    }
    with inside(mesh):
        return mesh, jp.pack(function, params, TOKENS)


def test_the_rows_of_each_matrix_are_split_over_the_devices(packed):
    _, result = packed
    for name in SPECS:
        matrix = result.params[name]
        assert isinstance(matrix, SplitMatrix)
        for array in (matrix.parts.words, matrix.parts.values, matrix.parts.starts):
            assert array.sharding.spec[0] in ("model", ("model",))
            assert {shard.data.shape[0] for shard in array.addressable_shards} == {1}


@pytest.mark.parametrize("spec", [P(), P("data")])
def test_results_are_those_of_one_device(packed, spec):
    mesh, result = packed
    tokens = jax.device_put(TOKENS, NamedSharding(mesh, spec))
    with inside(mesh):
        logits = jax.jit(result.fn)(result.params, tokens)
    np.testing.assert_allclose(logits, function(PARAMS_ARRAYS, TOKENS), 1e-4, 1e-4)


def test_no_packed_array_moves(packed):
    mesh, result = packed
    with inside(mesh):
        lowered = jax.jit(result.fn).lower(result.params, TOKENS)
    program = lowered.compile().as_text()
    moved = re.findall(
        r"= (\S+?)\{?[\d,]*\}? "
        r"(?:all-gather|all-reduce|all-to-all|collective-permute)(?:-start)?\(",
        program,
    )
    assert moved
    # Hidden states and logits of eight tokens; 52 are the rows of four parts of 50.
    assert set(moved) <= {f"f32[8,{width}]" for width in (WIDTH, 96, 52)}


@pytest.mark.full
@pytest.mark.parametrize("name", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize(("rows", "density"), [(13, 0.4), (3, 0.4), (16, 1)])
def test_a_split_matrix_multiplies_as_the_matrix_does(name, rows, density):
    packed = pack_matrix(sparse_matrix(3, (rows, 70), density), values=name, group=32)
    dense = unpack(packed).astype(jnp.float32)
    matrix = split_rows(packed, mesh_of("auto"), ("data", "model"))
    x = np.random.default_rng(0).normal(size=(3, 70)).astype(np.float32)
    product = jax.jit(split_matmul)(x, matrix)
    assert product.shape == (3, rows)
    close(product, x, dense)
    numbers = jnp.array([2, 0, rows - 1])
    lines = jax.jit(split_expand)(matrix, numbers)
    np.testing.assert_array_equal(lines.astype(jnp.float32), dense[numbers])


def test_inputs_have_gradients_over_a_mesh(packed):
    mesh, result = packed
    x, up = np.ones((2, WIDTH), np.float32), result.params["up"]
    with inside(mesh):
        gradient = jax.jit(jax.grad(lambda x: jnp.sum(split_matmul(x, up) ** 2)))(x)
    expected = jax.grad(lambda x: jnp.sum((x @ PARAMS["up"]) ** 2))(x)
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-4)
