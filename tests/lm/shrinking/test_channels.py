"""Channels that go by what enters by them, and matrices that are fitted to the rest."""

import jax
import jax.numpy as jnp
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
    assert record["principal"] == (name != "gemma3")  # whose norms write too
    if record["principal"]:
        assert record["kept"] == [*range(16)]
        assert record["scores"][16:] == pytest.approx([0.0] * 16, abs=1e-9)
        assert sum(record["scores"]) == pytest.approx(1)
    else:
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
    assert record["kept"] == [*range(16)]
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


def in_a_subspace(leaf):
    """As if the stream lay in 16 dimensions across all channels."""
    directions = np.linalg.qr(np.random.default_rng(3).normal(size=(32, 32)))[0][:16]
    return (leaf @ directions.T @ directions).astype(np.float32)


@pytest.mark.full
@pytest.mark.parametrize("name", ["llama", "qwen2-moe"])
def test_a_stream_in_a_subspace_loses_what_no_channel_alone_could(name, tmp_path):
    model = opened(name, tmp_path / "whole", in_a_subspace, layers=2)
    assert not model.config.tie_weights
    small, record = channels.without_channels(model, IDS, 16, batch=4)
    assert sum(record["scores"][:16]) == pytest.approx(1)
    assert small.config.width == 16
    np.testing.assert_allclose(
        tiny_cli.called(small.decoder(), IDS),
        tiny_cli.called(model.decoder(), IDS),
        rtol=0,
        atol=1e-3,  # logits of some dozens
    )


@pytest.mark.full
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3-moe", "mistral"])
@pytest.mark.parametrize("tied", [False, True])
def test_principal_channels_change_nothing_but_a_tied_head(name, tied, tmp_path):
    tiny_hf.random_folder(name, tmp_path / "model", tie_word_embeddings=tied)
    model = open_model(tmp_path / "model").read()
    assert model.config.tie_weights == tied
    rotated = channels.principal_channels(model, IDS)
    assert not rotated.whole.config.tie_weights
    dense, whole = (tiny_cli.called(m.decoder(), IDS) for m in (model, rotated.whole))
    np.testing.assert_allclose(whole, dense, rtol=0, atol=1e-3)
    assert rotated.tied.config == model.config
    assert (rotated.tied is rotated.whole) == (not tied)


@pytest.mark.full
def test_channels_of_one_gain_are_mixed_before_a_tied_head(tmp_path):
    tiny_hf.random_folder("llama", tmp_path / "model", tie_word_embeddings=True)
    model = open_model(tmp_path / "model").read()
    named = tree.named_leaves(model.params)
    gains = np.resize(np.float32([0.5, 2, 2, -2]), 32)
    leaves = [gains if n == "norm/scale" else leaf for n, leaf in named.items()]
    structure = jax.tree.structure(model.params)
    model = model._replace(params=jax.tree.unflatten(structure, leaves))
    whole, tied, scores = channels.principal_channels(model, IDS)
    assert sorted(scores, reverse=True) == scores.tolist()
    # The gains of what is mixed are equal, so this is exact too.
    np.testing.assert_allclose(
        tiny_cli.called(tied.decoder(), IDS),
        tiny_cli.called(model.decoder(), IDS),
        rtol=0,
        atol=1e-3,
    )
    gains_after = np.asarray(tree.named_leaves(tied.params)["norm/scale"])
    np.testing.assert_allclose(sorted(gains_after), sorted(gains), rtol=1e-5)
    embedding = tree.named_leaves(tied.params)["embedding/embedding"]
    assert not np.allclose(np.sort(embedding), np.sort(leaves[0]), atol=1e-2)
    assert whole.config.vocab_size == model.config.vocab_size


@pytest.mark.parametrize(
    ("name", "words"), [("gemma3", "added to the stream"), ("gpt2", "LayerNorm")]
)
def test_streams_that_cannot_be_rotated_are_refused(name, words):
    config = hf.decoder_config(tiny_hf.config_json(name))
    assert not hf.can_rotate(config)
    with pytest.raises(ValueError, match=words):
        hf.rotate_channels(config, {}, np.eye(config.width))


def test_matrices_keep_their_size_where_gains_are_small(tmp_path):
    tiny_hf.random_folder("llama", tmp_path / "model", tie_word_embeddings=False)
    model = open_model(tmp_path / "model").read()
    named = tree.named_leaves(model.params)
    small, kernel = "layers/0/norm_attention/scale", "layers/0/attention/q/kernel"
    named[small] = jnp.full_like(named[small], 1 / 16)
    structure = jax.tree.structure(model.params)
    params = jax.tree.unflatten(structure, [*named.values()])
    basis = jax.random.orthogonal(jax.random.key(0), model.config.width)
    rotated = tree.named_leaves(hf.rotate_channels(model.config, params, basis)[1])
    # A step of a recovery is as large beside these as beside those of before.
    sizes = [jnp.linalg.norm(leaves[kernel]) for leaves in (named, rotated)]
    np.testing.assert_allclose(*sizes, rtol=1e-5)
    np.testing.assert_array_equal(rotated[small], named[small])
