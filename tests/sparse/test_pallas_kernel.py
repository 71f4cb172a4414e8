"""The Pallas kernel in interpret mode against float64, and lowered for CUDA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from jaxprune.sparse.packed_matrix import pack_matrix, unpack
from jaxprune.sparse.pallas_kernel import pallas_matmul
from tests.support.packed import close, sparse_matrix

pytestmark = pytest.mark.jax_api

ENCODINGS = ["float32", "bfloat16", "float16", "int8", "int4"]


def packed_and_vectors(name, shape, group=64, density=0.4):
    packed = pack_matrix(sparse_matrix(0, shape, density), values=name, group=group)
    x = np.random.default_rng(1).normal(size=(2, shape[1])).astype(np.float32)
    return packed, x


@pytest.mark.full
@pytest.mark.parametrize("name", ENCODINGS)
@pytest.mark.parametrize(
    ("shape", "group"), [((40, 200), 64), ((64, 96), 32), ((7, 33), 0)]
)
def test_a_product_is_that_of_the_dense_matrix(name, shape, group):
    packed, x = packed_and_vectors(name, shape, group)
    dense = unpack(packed).astype(jnp.float32)
    close(pallas_matmul(x, packed, interpret=True), x, dense)


# Newer releases of JAX say that Pallas will lose Triton.
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")
@pytest.mark.parametrize("name", ENCODINGS)
def test_it_lowers_for_cuda_without_a_gpu(name):
    packed, x = packed_and_vectors(name, (40, 200))
    device = AbstractDevice("NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    with use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)):
        traced = jax.jit(pallas_matmul).trace(x, packed)
        lowered = traced.lower(lowering_platforms=("cuda",))
    assert "triton" in lowered.as_text()


@pytest.mark.parametrize(
    ("packed", "sentence"),
    [
        (packed_and_vectors("float32", (8, 64), density=1)[0], "stored whole"),
        (packed_and_vectors("int8", (8, 96), group=48)[0], "whole words.*got 48"),
    ],
)
def test_what_it_does_not_take_is_refused(packed, sentence):
    x = np.ones((1, packed.shape[1]), np.float32)
    with pytest.raises(ValueError, match=sentence):
        pallas_matmul(x, packed, interpret=True)
