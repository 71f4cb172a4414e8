"""A small directory to rewrite."""

import numpy as np
import pytest

from jaxprune.lm.checkpoints.checkpoint_dir import open_directory
from tests.support.hf_directories import (
    BFLOAT16,
    build,
    llama,
)

Q = "model.layers.0.self_attn.q_proj.weight"
HOW = {"method": "magnitude", "pattern": "Unstructured()", "sparsity": 0.5}


def half(value):
    """Every second weight removed."""
    kept = np.arange(value.size).reshape(value.shape) % 2 == 0
    return np.where(kept, value, 0).astype(value.dtype)


@pytest.fixture(params=[1, 3], ids=["one file", "three files"])
def source(request, tmp_path):
    return open_directory(build(tmp_path / "m", llama(dtype=BFLOAT16), request.param))
