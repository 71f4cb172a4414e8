"""What a configuration says: old and new words, defaults, and what is refused."""

import math

import pytest

from jaxprune.arrays.rules import command_words
from jaxprune.lm.checkpoints.checkpoint_dir import Damaged, Unknown
from jaxprune.lm.models import hf
from jaxprune.lm.models.hf import decoder_config, loading
from tests.support import tiny_hf

# ---- configurations, old and new


def _read(name, **changes):
    config = {**tiny_hf.config_json(name), **changes}
    return decoder_config({k: v for k, v in config.items() if v is not ...})


def test_old_and_new_words_for_rotary_schemes_agree():
    scaling = dict(tiny_hf.LLAMA3)
    theta = scaling.pop("rope_theta")
    new, old = _read("llama-3"), {"rope_scaling": scaling, "rope_theta": theta}
    assert _read("llama-3", rope_parameters=..., **old) == new
    linear = {"type": "linear", "factor": 4.0}
    old = {"rope_parameters": None, "rope_scaling": linear, "rope_theta": 500.0}
    assert _read("llama-linear", **old) == _read("llama-linear")
    long = {k: v for k, v in tiny_hf.LONG.items() if not k.startswith("rope")}
    old = {"rope_parameters": ..., "rope_scaling": {"type": "su", **long}}
    assert _read("phi3-long", **old) == _read("phi3-long")
    old = {
        "rope_parameters": ...,
        "rope_theta": 1e5,
        "rope_local_base_freq": 100.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    }
    assert _read("gemma3-linear", **old) == _read("gemma3-linear")
    assert _read("llama", rope_theta=5e5) != _read("llama")


def test_an_attribute_inside_an_object_is_ignored_by_its_whole_name():
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    config = {**tiny_hf.config_json("llama"), "rope_scaling": {**yarn, "finetuned": 1}}
    config.pop("rope_parameters", None)
    with pytest.raises(ValueError, match=r"rope_scaling\.finetuned=1 is not known"):
        decoder_config(config)
    found = decoder_config(config, ignore_config=["rope_scaling.finetuned"])
    assert found == _read("llama", rope_scaling=yarn, rope_parameters=...)
    assert config["rope_scaling"]["finetuned"] == 1
    with pytest.raises(ValueError, match=r"has no 'rope_scaling\.other'"):
        decoder_config(config, ignore_config=["rope_scaling.other"])


def test_left_out_attributes_have_the_defaults_of_the_family():
    gemma = _read("gemma3", layer_types=..., num_hidden_layers=7)
    assert gemma.windows == (5, 5, 5, 5, 5, None, 5)
    assert _read("gemma3", layer_types=..., sliding_window_pattern=2).windows == (
        (5, None) * 2
    )
    with pytest.raises(ValueError, match="_sliding_window_pattern must be sliding_"):
        _read("gemma3", layer_types=..., _sliding_window_pattern=2)
    for name, kv_heads in (("gemma3", 4), ("mistral", 8), ("qwen2", 32)):
        heads = {"num_attention_heads": 32, "num_key_value_heads": ...}
        assert _read(name, **heads, head_dim=16).kv_heads == kv_heads
    assert _read("mistral", sliding_window=...).windows == (4096, 4096)
    assert _read("mistral", sliding_window=None).windows == (None, None)
    assert _read("llama", num_key_value_heads=None).kv_heads == 4
    assert _read("qwen2", use_sliding_window=False).windows == (None,) * 3
    assert _read("phi3", original_max_position_embeddings=32) == _read("phi3")


def test_bookkeeping_of_real_files_does_not_matter():
    assert _read(
        "gpt2",
        architectures=["GPT2LMHeadModel"],
        n_ctx=64,
        attn_pdrop=0.1,
        torch_dtype="float32",
        task_specific_params={"text-generation": {"do_sample": True}},
        summary_type="cls_index",
        transformers_version="4.0",
        new_attribute=None,
    ) == _read("gpt2")


@pytest.mark.parametrize(
    ("changes", "way"),
    [
        ({"vocab_size": ...}, "write vocab_size into config.json"),
        (
            {"max_position_embeddings": ..., "gating": "fancy"},
            "write max_position_embeddings into config.json, and give --ignore-config "
            "ATTRIBUTE if the model computes the same without it",
        ),
    ],
)
def test_the_way_out_of_an_attribute_that_lacks_is_not_to_ignore_it(changes, way):
    with pytest.raises(ValueError, match="got nothing") as caught:
        _read("llama", **changes)
    assert command_words(caught.value).endswith(f"; {way}")


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("llama", {"gating": "fancy"}, "gating='fancy' is not known"),
        ("llama", {"gating": False}, "gating=False is not known"),
        ("llama", {"hidden_size": ...}, "hidden_size must be a positive int.*nothing"),
        ("llama", {"hidden_size": "64"}, "hidden_size must be a positive.*'64'"),
        ("llama", {"hidden_act": "relu6"}, "hidden_act must be one of silu.*'relu6'"),
        ("llama", {"attention_bias": 1}, "attention_bias must be true or false"),
        ("llama", {"rope_theta": -1}, "rope_theta must be a positive number, got -1"),
        ("llama", {"rope_scaling": [1]}, "rope_scaling must be an object"),
        (
            "llama",
            {"rope_scaling": {"rope_type": "proportional", "factor": 4.0}},
            "rope_scaling.rope_type must be one of default.*'proportional'.*"
            "rope_scaling.factor=4.0 is not known",
        ),
        (
            "llama-3",
            {"rope_parameters": {**tiny_hf.LLAMA3, "factor": None}},
            "rope_parameters.factor must be a positive number, got nothing",
        ),
        (
            "llama-3",
            {"rope_parameters": {**tiny_hf.LLAMA3, "high_freq_factor": 0.5}},
            "high_freq_factor must be over low_freq_factor=1.0, got 0.5",
        ),
        (
            "phi3-long",
            {"rope_parameters": {**tiny_hf.LONG, "long_factor": [1.0]}},
            "long_factor must be 4 numbers long, got 1",
        ),
        (
            "phi3-long",
            {"rope_parameters": {**tiny_hf.LONG, "long_factor": "x"}},
            "long_factor must be a list of positive numbers",
        ),
        ("phi3", {"partial_rotary_factor": 0.4}, "even number of 8 features"),
        ("phi3", {"attention_bias": True}, "attention_bias must be False, got True"),
        # transformers' Llama, Mistral, Qwen and Gemma turn a head as a whole.
        *(
            (name, change, "partial_rotary_factor must be 1")
            for name in ("llama", "mistral", "qwen2", "qwen3", "gemma3")
            for change in (
                {"partial_rotary_factor": 0.5},
                {"rope_scaling": {"type": "default", "partial_rotary_factor": 0.5}},
            )
        ),
        # transformers' Phi-3 takes no other scheme than its own.
        (
            "phi3",
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
            "rope_type must be one of default, longrope.*'linear'",
        ),
        (
            "llama",
            {
                "rope_scaling": {
                    "rope_type": "dynamic",
                    "factor": 2.0,
                    "original_max_position_embeddings": 32,
                }
            },
            "original_max_position_embeddings must be max_position_embeddings=64.*32",
        ),
        (
            "phi3-long",
            {"original_max_position_embeddings": 1},
            "original_max_position_embeddings must be over 1",
        ),
        ("llama", {"rope_theta": math.nan}, "rope_theta must be a positive number"),
        ("llama", {"rope_theta": 10**400}, "rope_theta must be a positive number"),
        ("llama", {"rms_norm_eps": math.inf}, "rms_norm_eps must be a positive number"),
        ("llama", {"num_hidden_layers": 10**12}, "num_hidden_layers must be at most"),
        ("gpt2", {"n_layer": 20_000}, "n_layer must be at most 10000"),
        ("llama", {"hidden_size": 10**12}, "hidden_size must be at most"),
        ("llama", {"head_dim": 10**9}, "even number of 1000000000 features turning"),
        ("llama", {"rope_interleaved": True}, "rope_interleaved must be False"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention must be False"),
        ("gpt2", {"n_ctx": 32}, "n_ctx must be n_positions=64, got 32"),
        ("gpt2", {"n_head": 5}, "n_embd must be divisible by n_head=5"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping must be"),
        ("gemma3", {"layer_types": ["linear"] * 4}, "layer_types must be a list of"),
        ("gemma3", {"layer_types": ["full_attention"]}, "4 long, one a layer, got 1"),
        ("gemma3", {"sliding_window": None}, "sliding_window must be given"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional"),
        ("qwen2", {"max_window_layers": -1}, "max_window_layers must be an integer"),
        (
            "qwen2",
            {"use_sliding_window": False, "layer_types": ["sliding_attention"] * 3},
            "use_sliding_window must be true",
        ),
        ("llama", {"model_type": "gemma3"}, "form with images.*gemma3_text"),
        ("llama", {"model_type": "bert"}, "one of gpt2, llama, .*got 'bert'"),
        ("llama", {"model_type": ...}, "model_type must be one of .*got None"),
        ("llama", {"num_key_value_heads": 3}, "heads to be divisible by kv_heads"),
    ],
)
def test_a_configuration_not_understood_is_refused_by_name(name, changes, words):
    with pytest.raises(ValueError, match=words):
        _read(name, **changes)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        # As SmolLM2, distilgpt2, gpt2-medium, gpt2-xl and huggyllama have it.
        (
            "llama",
            {
                "is_llama_config": True,
                "rope_interleaved": False,
                "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
            },
        ),
        ("gpt2", {"_num_labels": 1, "n_special": 0, "predict_special_tokens": True}),
        ("gpt2", {"output_past": True}),
        ("llama", {"max_sequence_length": 2048, "attention_probs_dropout_prob": 0.1}),
        ("mistral", {"attention_bias": False, "partial_rotary_factor": 1.0}),
    ],
)
def test_attributes_of_published_models_that_nobody_reads_stop_nobody(name, changes):
    assert _read(name, **changes) == _read(name)


def test_a_fine_tuners_note_is_let_through_and_named(tmp_path):
    tiny_hf.random_folder("llama", tmp_path)
    tiny_hf.edit(tmp_path, my_training_note="x", dataset={"path": "a", "epochs": 3})
    assert hf.load(tmp_path, lazy=True).ignored == ("my_training_note", "dataset")


def test_an_attribute_is_ignored_where_the_caller_says_so(tmp_path):
    tiny_hf.random_folder("llama", tmp_path)
    config = hf.load(tmp_path, lazy=True).config
    tiny_hf.edit(tmp_path, gating="fancy", partial_rotary_factor=0.5)
    with pytest.raises(Unknown, match=r"gating='fancy' is not known.*ignore_config"):
        hf.load(tmp_path)
    names = ("gating", "partial_rotary_factor")
    found = hf.load(tmp_path, lazy=True, ignore_config=names)
    assert (found.config, found.ignored) == (config, names)
    with pytest.raises(ValueError, match=r"to ignore must be in .* has no 'gated'"):
        hf.load(tmp_path, ignore_config=["gated"])


def test_more_layers_than_tensors_are_refused_before_any_is_built(
    tmp_path, monkeypatch
):
    tiny_hf.random_folder("llama", tmp_path)
    tiny_hf.edit(tmp_path, num_hidden_layers=9_999)
    monkeypatch.setattr(loading, "abstract", lambda config: pytest.fail("it is built"))
    with pytest.raises(Damaged, match=r"9999 layers .* but has \d+ tensors"):
        hf.load(tmp_path)


def test_all_attributes_are_named_at_once(tmp_path):
    tiny_hf.random_folder("llama", tmp_path)
    tiny_hf.edit(tmp_path, gating=1, hidden_act="tan", vocab_size=...)
    with pytest.raises(Unknown, match=r"config.json.*vocab_size.*hidden_act.*gating=1"):
        hf.load(tmp_path)
