"""Channels that go by what enters by them, and matrices that are fitted to the rest."""

import jax
import numpy as np
import pytest

from jaxprune.arrays import tree
from jaxprune.lm.models import hf
from jaxprune.lm.models.loaded_model import open_model
from jaxprune.lm.shrinking import channels, units
from tests.support import tiny_cli, tiny_hf

IDS = tiny_hf.tokens(8, 32)
KEPT = np.arange(0, 32, 2)
WRITERS = ("embedding/embedding", "out/kernel", "down/kernel")


def opened(name, folder, write, layers=1):
    """A random model; `write` changes what writes into the stream, (..., 32)."""
    tiny_hf.random_folder(name, folder, layers=layers)
    model = open_model(folder).read()
    named = tree.named_leaves(model.params)
    leaves = [
        write(np.array(leaf)) if name.endswith(WRITERS) else leaf
        for name, leaf in named.items()
    ]
    structure = jax.tree.structure(model.params)
    return model._replace(params=jax.tree.unflatten(structure, leaves))


def nothing_into_odd(leaf):
    leaf[..., 1::2] = 0
    return leaf


def odd_like_even(leaf):
    leaf[..., 1::2] = leaf[..., ::2] + 0.3 * leaf[..., 1::2]
    return leaf


def distance(one, another):
    """Mean squared distance of logits, less what those of a token share."""
    difference = one - another
    return np.mean((difference - difference.mean(-1, keepdims=True)) ** 2)


@pytest.mark.full
@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen2-moe"])
def test_channels_without_anything_in_them_go_and_nothing_changes(name, tmp_path):
    model = opened(name, tmp_path / "whole", nothing_into_odd)
    small, record = channels.without_channels(model, IDS, 16, batch=4)
    assert record["kept"] == KEPT.tolist()
    assert record["scores"][1::2] == [0.0] * 16
    # Each of the two norms of the layer and the last gives 1.
    assert sum(record["scores"]) == pytest.approx(3)
    np.testing.assert_allclose(
        tiny_cli.called(small.decoder(), IDS),
        tiny_cli.called(model.decoder(), IDS),
        rtol=0,
        atol=1e-4,  # logits of some dozens
    )


@pytest.mark.full
def test_layers_may_lack_attention_or_an_mlp(tmp_path):
    model = opened("llama", tmp_path / "whole", nothing_into_odd, layers=2)
    model = units.without_parts(model, {(0, "heads"), (1, "ffn")})
    small, record = channels.without_channels(model, IDS, 16, batch=8)
    assert record["kept"] == KEPT.tolist()
    # One norm of each layer, and the last.
    assert sum(record["scores"]) == pytest.approx(3)
    np.testing.assert_allclose(
        tiny_cli.called(small.decoder(), IDS),
        tiny_cli.called(model.decoder(), IDS),
        rtol=0,
        atol=1e-4,  # logits of some dozens
    )


@pytest.mark.full
@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3-moe"])
def test_matrices_are_fitted_to_what_the_other_channels_tell(name, tmp_path):
    model = opened(name, tmp_path / "whole", odd_like_even)
    fitted, record = channels.without_channels(model, IDS, 16, batch=4)
    _, params = hf.keep_channels(model.config, model.params, record["kept"])
    cut = fitted._replace(params=params)
    new = tiny_hf.tokens(4, 32, seed=7)
    dense, after, before = (
        tiny_cli.called(m.decoder(), new) for m in (model, fitted, cut)
    )
    assert distance(after, dense) < 0.7 * distance(before, dense)
