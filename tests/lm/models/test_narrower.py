"""Fewer channels of the residual stream: logits of the model with zeros in their place."""

import re

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from jaxprune.arrays import tree
from jaxprune.lm.models import hf
from tests.support import tiny_cli, tiny_hf

KEPT = np.flatnonzero(np.random.default_rng(0).random(32) < 0.8)[:20]  # of 32 channels
IDS = tiny_hf.tokens(2, 24)
# Tensors with an axis of channels that they write to, and which axis that is.
WRITERS = {
    r"model\.embed_tokens\.weight": -1,
    r"model\.layers\..*\.(o_proj|down_proj|w2)\.(weight|bias)": 0,
    r"model\.layers\..*\.experts\.down_proj(_bias)?": -1,
}
FAMILIES = [
    "llama",
    *(
        pytest.param(name, marks=pytest.mark.full)
        for name in ("llama-3", "gemma3", "gemma2", "qwen3", "phi3", "granite")
    ),
    pytest.param("mixtral", marks=pytest.mark.full),
    "qwen2-moe",
    pytest.param("qwen3-moe", marks=pytest.mark.full),
    pytest.param("gpt-oss", marks=pytest.mark.full),
    pytest.param("olmo2", marks=pytest.mark.full),
]


def whole_folder(name, folder):
    """A random model with an epsilon that matters."""
    more = {"head_dim": 8} if name == "olmo2" else {}
    return tiny_hf.random_folder(name, folder, rms_norm_eps=0.3, **more)


def zeroed_folder(name, folder, tensors):
    """The same model where nothing writes into the channels that go."""
    gone = np.setdiff1d(np.arange(32), KEPT)
    zeroed = dict(tensors)
    for tensor, value in tensors.items():
        axes = [axis for rule, axis in WRITERS.items() if re.fullmatch(rule, tensor)]
        if axes:
            zeroed[tensor] = value.copy()
            np.moveaxis(zeroed[tensor], axes[0], 0)[gone] = 0
        if tensor == "lm_head.weight" and "model.embed_tokens.weight" not in tensors:
            raise AssertionError(tensor)
    return zeroed


def narrowed(folder, out, kept=KEPT):
    loaded = hf.load(folder)
    params = nnx.state(loaded.model, nnx.Param)
    _, small = hf.keep_channels(loaded.config, params, kept)
    hf.write_smaller(folder, out, small, loaded.names)
    return small


def zeroed_logits(name, root):
    tensors = whole_folder(name, root / "whole")
    config = tiny_cli.config_of(root / "whole")
    zeroed = zeroed_folder(name, root / "zeroed", tensors)
    tiny_hf.save(root / "zeroed", config, zeroed)
    return tiny_cli.logits(root / "zeroed", IDS)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_narrower_model_is_the_one_whose_channels_are_zero(name, tmp_path):
    expected = zeroed_logits(name, tmp_path)
    narrowed(tmp_path / "whole", tmp_path / "small")
    assert tiny_cli.config_of(tmp_path / "small")["hidden_size"] == len(KEPT)
    logits = tiny_cli.logits(tmp_path / "small", IDS)
    whole = tiny_cli.logits(tmp_path / "whole", IDS)
    assert np.abs(whole - expected).max() > 0.1
    scale = max(1, np.abs(expected).max())
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * scale)
