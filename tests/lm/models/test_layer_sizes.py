"""Layers of different sizes: what they compute, and config.json that says them."""

import jax
import numpy as np
import pytest
from flax import nnx

from jaxprune.lm.models import hf
from jaxprune.lm.models.decoder.config import DecoderConfig
from tests.support import tiny_hf
from tests.support.unequal_layers import (
    IDS,
    LAYERS,
    logits,
    unequal,
    written,
    zeroed_logits,
)


@pytest.mark.full
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_directory_of_unequal_layers_computes_what_the_zeroed_model_does(
    name, tmp_path
):
    tiny_hf.random_folder(name, tmp_path / "whole", "float32", LAYERS)
    dense, small, report = unequal(tmp_path / "whole")
    config = written(dense, small, tmp_path / "whole", tmp_path / "small")
    full = config["num_attention_heads"], config["num_key_value_heads"]
    assert full == (dense.config.heads, dense.config.kv_heads)
    group = full[0] // full[1]
    assert config["block_configs"] == [
        {
            "attention": {
                "no_op": False,
                "n_heads_in_group": group,
                "num_attention_heads": full[0] // 2,
                "num_key_value_heads": full[1] // 2,
            },
            "ffn": {"no_op": False, "intermediate_size": 24},
        },
        {
            "attention": {"no_op": True},
            "ffn": {"no_op": False, "intermediate_size": 48},
        },
        {
            "attention": {
                "no_op": False,
                "n_heads_in_group": group,
                "num_attention_heads": full[0],
                "num_key_value_heads": full[1],
            },
            "ffn": {"no_op": True},
        },
    ]
    again = hf.load(tmp_path / "small", dtype="float32")
    assert again.config.layer_sizes == small.config.layer_sizes
    graphdef, params = nnx.split(again.model, nnx.Param)
    expected = zeroed_logits(dense, report)
    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(logits(graphdef, params), expected, atol=1e-5)
    # Step by step through a cache, one of whose layers holds no keys, it is the same.
    cache = again.model.init_cache(1, 8)
    assert [keys.shape[2] for keys in cache.keys] == [full[1] // 2, 0, full[1]]
    step = jax.jit(lambda p, t, c: nnx.merge(graphdef, p)(t, cache=c))
    for i in range(8):
        result, cache = step(params, IDS[:, i : i + 1], cache)
        np.testing.assert_allclose(result[:, 0], expected[:, i], atol=1e-5)


SHAPE = {
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
FFN = {"no_op": False, "intermediate_size": 24}


def read(attention, ffn=None):
    block = {"attention": attention, "ffn": ffn or FFN}
    return hf.decoder_config({**SHAPE, "block_configs": [block]}).sizes(0)


def test_block_configs_of_decilm_and_of_puzzletron_are_read():
    assert read({"no_op": False, "n_heads_in_group": 4}) == (4, 1, 24)
    assert read({"num_key_value_heads": 1, "n_heads_in_group": 4}) == (4, 1, 24)
    assert read({"no_op": True, "n_heads_in_group": None}) == (0, 0, 24)
    assert read({"n_heads_in_group": 2}, {"no_op": True}) == (4, 2, 0)


@pytest.mark.parametrize(
    ("blocks", "match"),
    [
        ([], "block_configs must be a list of 1 objects"),
        ([{"attention": {}, "ffn": {}}], r"block_configs\[0\].ffn.intermediate_size"),
        (
            [{"attention": {"replace_with_linear": True}, "ffn": FFN}],
            r"block_configs\[0\].attention.replace_with_linear must be False",
        ),
        (
            [{"attention": {}, "ffn": {**FFN, "ffn_mult": 1.0}}],
            r"block_configs\[0\].ffn.ffn_mult=1.0 is not known",
        ),
        (
            [
                {
                    "attention": {"num_attention_heads": 3, "num_key_value_heads": 2},
                    "ffn": FFN,
                }
            ],
            "n_heads_in_group must be 3 / 2",
        ),
    ],
)
def test_block_configs_that_are_not_understood_are_refused(blocks, match):
    with pytest.raises(ValueError, match=match):
        hf.decoder_config({**SHAPE, "block_configs": blocks})


def test_heads_of_a_layer_must_share_its_key_heads():
    sizes = {"vocab_size": 9, "context": 8, "layers": 1, "width": 8, "head_dim": 4}
    with pytest.raises(ValueError, match="divisible by its kv_heads"):
        DecoderConfig(
            **sizes, heads=2, kv_heads=1, mlp_width=8, layer_sizes=((3, 2, 8),)
        )
