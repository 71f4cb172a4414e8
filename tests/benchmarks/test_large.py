"""The directory of `benchmarks.large` is a Llama's, and its arithmetic is by shapes."""

import numpy as np
import pytest

from benchmarks import large, random_checkpoint
from jaxprune.lm.models import hf

TINY = random_checkpoint.Shape(layers=2, width=256, ffn=384, keys=128, vocabulary=97)


def test_the_directory_is_read_as_a_llama_of_that_shape(tmp_path):
    random_checkpoint.write(
        tmp_path / "model", random_checkpoint.llama(TINY, TINY.layers)
    )
    loaded = hf.load(tmp_path / "model", lazy=True)
    config = loaded.config
    assert (config.layers, config.width, config.mlp_width) == (2, 256, 384)
    assert (config.heads, config.kv_heads, config.dtype) == (2, 1, "bfloat16")
    names = {name for source in loaded.names.values() for name in source.names}
    assert len(names) == 2 * 9 + 3


def test_the_mixture_is_read_as_one_of_so_many_experts(tmp_path):
    random_checkpoint.write(
        tmp_path / "model", random_checkpoint.mixture(2, experts=8, width=256)
    )
    config = hf.load(tmp_path / "model", lazy=True).config
    assert (config.layers, config.width, config.mlp_width) == (2, 256, 768)
    assert (config.heads, config.kv_heads, config.head_dim) == (4, 1, 128)
    assert (config.experts, config.experts_per_token) == (8, 8)


def test_the_published_mixture_has_its_published_size():
    shapes = random_checkpoint.mixture(48).shapes
    body = sum(np.prod(size) for n, size in shapes.items() if "layers" in n)
    assert body + 2 * 151936 * 2048 == pytest.approx(30.53e9, rel=1e-3)


def test_the_published_shapes_have_the_published_sizes():
    sizes = {"7 B": 6.74e9, "70 B": 68.98e9, "405 B": 405.85e9}
    for name, size in sizes.items():
        shape = random_checkpoint.SHAPES[name]
        tables = 2 * shape.vocabulary * shape.width
        assert shape.layers * shape.weights + tables == pytest.approx(size, rel=1e-3)


def test_operations_are_those_of_the_products():
    tokens, (w, f, k) = 10, (256, 384, 128)
    weights = w * (w + k + k + w + f + f) + f * w
    counts = large.operations(TINY, "wanda", tokens)
    assert counts == {"calibration": 2 * weights * tokens, "solving": 0}
    counts = large.operations(TINY, "sparsegpt", tokens)
    hessians = tokens * (3 * w**2 + f**2)  # qkv, o and gate/up see 256 inputs
    assert counts["calibration"] == 2 * weights * tokens + hessians
    factors = (6 * w**3 + f**3) / 3
    updates = w**2 * (w + k + k + w + f + f) + f**2 * w
    np.testing.assert_allclose(counts["solving"], factors + updates)
    only = large.operations(TINY, "alps", tokens, ["k_proj"])
    assert only["solving"] == 8 * w**3 + 54 * w**2 * k
