"""Ours as the tables of structure have it: written so that torch reads it."""

import jax
import numpy as np
import pytest
from flax import nnx

from benchmarks import jax_shrinking
from jaxprune.lm.models import hf
from tests.support import tiny_hf


@pytest.mark.full
@pytest.mark.parametrize(("heads", "remaining"), [(0.25, 4), (0.5, 2)])
def test_heads_that_no_checkpoint_can_say_are_zeros(heads, remaining, tmp_path):
    # A width of 32 is no multiple of three heads, and one of two.
    tiny_hf.random_folder("llama-3", tmp_path / "whole", "float32")
    ids = tiny_hf.tokens(4, 16)
    np.save(tmp_path / "ids.npy", ids)
    config = jax_shrinking.Config(
        model=tmp_path / "whole",
        out=tmp_path / "small",
        calibration=tmp_path / "ids.npy",
        heads=heads,
        ffn=0.5,
        sequences=4,
    )
    whole = hf.load(config.model, dtype="float32")
    params = nnx.state(whole.model, nnx.Param)
    result = jax_shrinking.narrower(whole.config, params, ids, config)
    jax_shrinking.main(config)
    small = hf.load(config.out, dtype="float32")
    assert (small.config.heads, small.config.mlp_width) == (
        remaining,
        48 if remaining == 4 else 24,
    )
    states = jax.jit(lambda model, ids: model.states(model.embed(ids))[0])
    expected = result.fn(result.params, ids)
    np.testing.assert_allclose(states(small.model, ids), expected, rtol=0, atol=1e-5)
    assert np.abs(states(whole.model, ids) - expected).max() > 0.01
