"""Which kernels run, and one sentence where they do not."""

import sys
import types

import numpy as np
import pytest

from jaxprune.sparse import cpu_kernels
from jaxprune.sparse.matmul import matmul
from jaxprune.sparse.packed_matrix import pack_matrix
from tests.support.packed import close, sparse_matrix


@pytest.fixture
def kernels(monkeypatch):
    """Puts a module in the place of the distribution."""

    def put(module):
        monkeypatch.setitem(sys.modules, "jaxprune_kernels", module)
        cpu_kernels.path.cache_clear()

    yield put
    cpu_kernels.path.cache_clear()


def loaded(instructions, reason):
    result = types.SimpleNamespace(targets={}, instructions=instructions, reason=reason)
    return types.SimpleNamespace(load=lambda: result)


def test_without_the_distribution_products_run_in_jax(kernels):
    kernels(None)
    assert cpu_kernels.path() == ("", "jaxprune-kernels is not installed")
    assert str(cpu_kernels.path()).startswith("JAX's own operations: ")
    matrix = sparse_matrix(0, (4, 40), 0.4)
    x = np.ones((2, 40), np.float32)
    close(matmul(x, pack_matrix(matrix)), x, matrix)


def test_kernels_that_do_not_run_say_why(kernels):
    kernels(loaded("", "built for another jaxlib"))
    assert cpu_kernels.path() == ("", "built for another jaxlib")
    assert not cpu_kernels.runs(pack_matrix(np.eye(64, dtype=np.float32)))


def test_kernels_that_run_are_named(kernels):
    kernels(loaded("avx2", ""))
    assert str(cpu_kernels.path()) == "the kernels of jaxprune-kernels (avx2)"
    assert cpu_kernels.runs(pack_matrix(np.eye(64, dtype=np.float32)))


def test_half_precision_runs_in_jax(kernels):
    kernels(loaded("avx2", ""))
    assert not cpu_kernels.runs(pack_matrix(np.eye(64, dtype=np.float16)))
