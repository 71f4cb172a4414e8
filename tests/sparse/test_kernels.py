"""The kernels against float64: every set of instructions that this processor has.

They are compiled, by `pip install ./kernels`; `.ci/run` does so for one Python.
"""

import shutil
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import jaxprune as jp
from jaxprune.sparse import cpu_kernels
from jaxprune.sparse.matmul import matmul
from jaxprune.sparse.packed_matrix import pack_matrix, unpack
from tests.support.packed import close, sparse_matrix

jaxprune_kernels = pytest.importorskip("jaxprune_kernels")

ENCODINGS = ["float32", "bfloat16", "int8", "int4"]
ROOT = Path(__file__).resolve().parents[2]
product = jax.jit(matmul)


@pytest.fixture(params=["avx512", "avx2", "neon", "plain"], autouse=True)
def instructions(request):
    best = cpu_kernels.path().instructions
    if not jaxprune_kernels.choose(request.param):
        pytest.skip(f"this processor has no {request.param}")
    yield request.param
    jaxprune_kernels.choose(best)


def vectors(samples, inputs):
    return np.random.default_rng(1).normal(size=(samples, inputs)).astype(np.float32)


def test_the_kernels_run(instructions):
    assert cpu_kernels.path().reason == ""
    packed = pack_matrix(sparse_matrix(0, (4, 64), 0.4))
    assert "custom_call" in product.lower(vectors(1, 64), packed).as_text()


@pytest.mark.parametrize("name", ENCODINGS)
@pytest.mark.parametrize("samples", [1, 2, 3, 7, 8, 12])
@pytest.mark.parametrize("density", [0.4, 1])
def test_a_product_is_that_of_the_dense_matrix(name, samples, density):
    packed = pack_matrix(
        sparse_matrix(samples, (7, 200), density), values=name, group=32
    )
    x = vectors(samples, 200)
    close(product(x, packed), x, unpack(packed).astype(jnp.float32))


@pytest.mark.full
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.tuples(st.integers(0, 70), st.integers(1, 300)),
    st.integers(1, 20),
    st.sampled_from([0, 0.01, 0.1, 0.3, 0.5, 0.8, 0.99, 1]),
    st.sampled_from(ENCODINGS),
    st.sampled_from([0, 32, 64, 128]),
    st.integers(0, 1000),
)
def test_any_shape_density_and_number_of_vectors(
    shape, samples, density, name, group, seed
):
    matrix = sparse_matrix(seed, shape, density)
    packed = pack_matrix(matrix, values=name, group=group)
    x = vectors(samples, shape[1])
    close(matmul(x, packed), x, unpack(packed).astype(jnp.float32))


def test_many_rows_are_divided_among_threads():
    # Nearly all weights are in the last rows, so parts of equal rows would be unequal.
    matrix = sparse_matrix(2, (3000, 256), 0.05)
    matrix[2500:] = sparse_matrix(3, (500, 256), 1)
    packed = pack_matrix(matrix, values="bfloat16")
    x = vectors(2, 256)
    close(product(x, packed), x, unpack(packed).astype(jnp.float32))


def test_each_matrix_of_a_batch_meets_its_vectors():
    matrices = sparse_matrix(4, (3, 5, 64), 0.4)
    packed = pack_matrix(matrices)
    for samples in (2, 9):
        x = np.stack([vectors(samples, 64)] * 3)
        result = product(x, packed)
        for i in range(3):
            close(result[i], x[i], matrices[i])


def test_infinite_and_undefined_numbers_come_out_as_of_the_dense_product():
    matrix = sparse_matrix(5, (6, 64), 0.4)
    matrix[0, 3], matrix[1, 40], matrix[2, :] = np.nan, np.inf, -0.0
    x = vectors(3, 64)
    x[2, 5] = np.inf
    result = np.asarray(product(x, pack_matrix(matrix)))
    with np.errstate(invalid="ignore"):
        expected = x @ matrix.T
    for test in (np.isnan, np.isposinf, np.isneginf):
        np.testing.assert_array_equal(test(result), test(expected))


def test_an_expanded_tile_has_the_bits_of_the_matrix():
    matrix = sparse_matrix(6, (5, 70), 0.4)
    matrix.view(np.uint32)[0, 3] = 0x7FA00005  # NaN with a payload
    rows = jax.jit(cpu_kernels.expand, static_argnums=(1, 2))(pack_matrix(matrix), 1, 4)
    np.testing.assert_array_equal(np.asarray(rows), matrix[1:])
    rows = jax.jit(cpu_kernels.expand, static_argnums=(1, 2))(pack_matrix(matrix), 0, 1)
    np.testing.assert_array_equal(
        np.asarray(rows).view(np.uint32)[0], matrix.view(np.uint32)[0]
    )


def test_a_packed_function_runs_under_scan_and_has_gradients():
    params = {"w": sparse_matrix(7, (64, 64), 0.4)}

    def fn(params, x):
        return jnp.tanh(x @ params["w"])

    result = jp.pack(fn, params, vectors(1, 64))

    def loss(fn, params, x):
        def step(x, _):
            return (fn(params, x), None)

        return jax.lax.scan(step, x, None, length=3)[0].sum()

    x = vectors(2, 64)
    for function in (loss, jax.grad(loss, argnums=2)):
        np.testing.assert_allclose(
            jax.jit(lambda p, x, f=function: f(result.fn, p, x))(result.params, x),
            function(fn, params, x),
            rtol=1e-4,
            atol=1e-4,
        )


def test_groups_that_are_no_whole_words_run_in_jax(instructions):
    matrix = sparse_matrix(8, (4, 96), 0.4)
    packed = pack_matrix(matrix, values="int8", group=48)
    assert not cpu_kernels.runs(packed)
    x = vectors(2, 96)
    close(product(x, packed), x, unpack(packed))


@pytest.mark.slow
def test_the_sanitizers_find_nothing(instructions):
    if instructions != "plain" or shutil.which("c++") is None:
        pytest.skip("once, where there is a compiler")
    script = ROOT / "kernels" / "tests" / "sanitize"
    done = subprocess.run([script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
