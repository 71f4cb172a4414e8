"""Families beside the first seven: what of a config.json is read, and what refused."""

import numpy as np
import pytest

from jaxprune.lm.checkpoints.checkpoint_dir import Damaged
from jaxprune.lm.models import hf
from tests.support import tiny_hf


def read(name, **changes):
    """The shape of a tiny configuration with other attributes; `...` takes one away."""
    config = {**tiny_hf.config_json(name), **changes}
    return hf.decoder_config({k: v for k, v in config.items() if v is not ...})


def test_left_out_attributes_have_the_defaults_of_the_family():
    gemma = read(
        "gemma2",
        attn_logit_softcapping=...,
        final_logit_softcapping=...,
        layer_types=...,
    )
    assert (gemma.attention_softcap, gemma.logit_softcap) == (50.0, 30.0)
    assert gemma.windows == (5, None, 5)
    smol = read("smollm3", no_rope_layers=..., num_hidden_layers=8)
    assert [smol.rope(i) is None for i in range(8)] == ([False] * 3 + [True]) * 2
    assert read("smollm3", num_key_value_heads=None).kv_heads == 4
    assert read("starcoder2", num_key_value_heads=...).kv_heads == 2
    assert read("granite", attention_multiplier=...).attention_scale == 1.0
    assert read("cohere", logit_scale=...).logit_scale == 0.0625
    assert read("cohere2", num_hidden_layers=5).windows == (5, 5, 5, None, 5)
    assert len(read("phi", partial_rotary_factor=...).ropes[0].frequencies) == 2
    assert read("opt", max_position_embeddings=2048).position_offset == 2
    assert read("falcon").kv_heads == 1
    assert read("falcon", ffn_hidden_size=None).mlp_width == 144
    assert read("falcon-40b").block == "parallel"


def test_a_neox_head_has_an_older_name(tmp_path):
    tensors = tiny_hf.random_tensors("gpt-neox")
    older = dict(tensors)
    older["embed_out.weight"] = older.pop("lm_head.weight")
    config = tiny_hf.config_json("gpt-neox")
    both = [
        hf.load(tiny_hf.save(tmp_path / name, config, found))
        for name, found in (("new", tensors), ("old", older))
    ]
    kernels = [loaded.model.head.kernel[...] for loaded in both]
    np.testing.assert_array_equal(*kernels)
    assert both[1].names["head/kernel"].name == "embed_out.weight"
    with pytest.raises(Damaged, match=r"twice: \w+.weight and \w+.weight"):
        hf.load(tiny_hf.save(tmp_path / "both", config, older | tensors))


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional"),
        ("gemma2", {"sliding_window": None}, "sliding_window must be given"),
        ("gemma2", {"attn_logit_softcapping": 0}, "softcapping must be a positive"),
        ("olmo2", {"clip_qkv": 8.0}, "clip_qkv=8.0 is not known"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "at least 3 numbers 0 or 1"),
        ("smollm3", {"no_rope_layers": [1, 0, 2]}, "at least 3 numbers 0 or 1"),
        (
            "smollm3",
            {"layer_types": ["sliding_attention"] * 3},
            "use_sliding_window must be true",
        ),
        ("granite", {"logits_scaling": 0}, "logits_scaling must be a positive number"),
        ("granite", {"num_local_experts": 4}, "num_local_experts=4 is not known"),
        ("cohere", {"use_qk_norm": "yes"}, "use_qk_norm must be true or false"),
        ("cohere2", {"head_dim": 12}, "hidden_size / num_attention_heads = 8"),
        ("cohere2", {"use_parallel_block": False}, "use_parallel_block must be True"),
        ("starcoder2", {"norm_type": "rms_norm"}, "norm_type must be 'layer_norm'"),
        ("phi", {"tie_word_embeddings": True}, "tie_word_embeddings must be false"),
        ("phi-norms", {"head_dim": 8}, "head_dim must be 16 where qk_layernorm"),
        ("phi", {"partial_rotary_factor": 0.4}, "even number of 8 features turning"),
        ("gpt-neox", {"rotary_pct": 0.1}, "even number of 12 features turning"),
        ("gpt-neox", {"rope_theta": 5e5}, "rope_theta must be rotary_emb_base=1"),
        ("gpt-neox", {"hidden_size": 32}, "hidden_size must be divisible by"),
        ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before must be True"),
        ("opt", {"word_embed_proj_dim": 18}, "word_embed_proj_dim must be hidden_si"),
        ("opt", {"_remove_final_layer_norm": True}, "_remove_final_layer_norm must"),
        ("falcon", {"alibi": True}, "alibi must be False, got True"),
        ("falcon", {"num_ln_in_parallel_attn": 2}, "must be 1, unless new_decoder"),
        ("falcon-40b", {"num_ln_in_parallel_attn": 3}, "must be 1 or 2, got 3"),
        ("falcon-40b", {"parallel_attn": False}, "parallel_attn must be true with"),
        ("falcon-serial", {"num_kv_heads": 1}, "num_kv_heads must be num_attention_he"),
    ],
)
def test_what_would_change_the_model_is_refused_by_name(name, changes, words):
    with pytest.raises(ValueError, match=words):
        read(name, **changes)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        # As Gemma 2, SmolLM3, StarCoder 2, Pythia, OPT and Falcon have it.
        ("gemma2", {"hidden_act": "gelu", "cache_implementation": "hybrid"}),
        ("smollm3", {"max_window_layers": 28, "no_rope_layer_interval": 4}),
        (
            "starcoder2",
            {
                "activation_function": "gelu",
                "attention_softmax_in_fp32": True,
                "layer_norm_epsilon": 1e-5,
                "mlp_type": "default",
                "norm_type": "layer_norm",
                "scale_attention_softmax_in_fp32": True,
                "scale_attn_weights": True,
            },
        ),
        (
            "gpt-neox",
            {
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.5,
                "classifier_dropout": 0.1,
            },
        ),
        (
            "opt",
            {"init_std": 0.02, "layerdrop": 0.0, "dropout": 0.1, "prefix": "</s>"},
        ),
        ("falcon", {"apply_residual_connection_post_layernorm": False}),
        ("gemma3", {"partial_rotary_factor": 1.0}),
    ],
)
def test_attributes_of_published_models_that_nobody_reads_stop_nobody(name, changes):
    assert read(name, **changes) == read(name)
