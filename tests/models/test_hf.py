"""Hugging Face folders: the same numbers as transformers, and what is refused."""

import json
import math
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxprune.arrays import tree
from jaxprune.formats.checkpoint_dir import Damaged, Unknown, open_directory
from jaxprune.models import hf
from jaxprune.models.generate import generate
from jaxprune.models.hf import decoder_config
from tests.support import tiny_hf

# Every switch of the decoder; every feature of each family in the full suite.
FIRST = ("gpt2", "llama-3", "mistral", "qwen2", "qwen3", "phi3-long", "gemma3")
FIRST += ("cohere-norms", "falcon-40b")
# That are generated from in the full suite.
OTHERS = ("phi3-long", "gpt2", "smollm3-sliding", "cohere2", "opt", "falcon-40b")
LONG = ("phi3-long", "phi3-partial", "phi3-yarn", "llama-long")


def _logits(model, tokens):
    graphdef, params = nnx.split(model, nnx.Param)
    return np.asarray(jax.jit(lambda p, t: nnx.merge(graphdef, p)(t))(params, tokens))


# ---- parity with transformers


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in FIRST else pytest.mark.full)
        for name in tiny_hf.CONFIGS
    ],
)
def test_logits_are_those_of_transformers(name, tmp_path):
    pytest.importorskip("torch")
    theirs = tiny_hf.torch_model(name, tmp_path)
    model = hf.load(tmp_path).model
    for length in (40, 12) if name in LONG else (40,):  # the switch is at 16
        tokens = tiny_hf.tokens(time=length)
        expected = tiny_hf.torch_logits(theirs, tokens)
        assert np.abs(expected).max() > 1
        np.testing.assert_allclose(_logits(model, tokens), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    "name", ["gemma3", *(pytest.param(n, marks=pytest.mark.full) for n in OTHERS)]
)
def test_generation_is_that_of_transformers(name, tmp_path):
    torch = pytest.importorskip("torch")
    theirs = tiny_hf.torch_model(name, tmp_path)
    prompt = tiny_hf.tokens(time=12)  # phi3-long passes its switch, at 16
    expected = theirs.generate(
        torch.from_numpy(prompt).long(),
        attention_mask=torch.ones(prompt.shape, dtype=torch.long),
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    ).numpy()
    model = hf.load(tmp_path).model
    got = generate(model, prompt, steps=12, key=jax.random.key(0), temperature=0.0)
    np.testing.assert_array_equal(got, expected)


def test_bfloat16_logits_are_near_those_of_transformers(tmp_path):
    pytest.importorskip("torch")
    theirs = tiny_hf.torch_model("gemma3", tmp_path, dtype="bfloat16")
    loaded = hf.load(tmp_path)
    assert loaded.config.dtype == "bfloat16"
    tokens = tiny_hf.tokens()
    expected = tiny_hf.torch_logits(theirs, tokens)
    got = _logits(loaded.model, tokens)
    exact = _logits(hf.load(tmp_path, dtype="float32").model, tokens)
    # Both round to 8 bits at every step, each in its own places.
    assert np.abs(got - exact).mean() <= 1.1 * np.abs(expected - exact).mean()


# ---- what is read, and what comes back


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    "name", ["gpt2", "phi3-long", "gemma3-linear", "qwen2", "falcon-40b"]
)
def test_tensors_come_back_bit_for_bit(name, dtype, tmp_path):
    stored = tiny_hf.random_folder(name, tmp_path, dtype)
    loaded = hf.load(tmp_path)
    params = nnx.state(loaded.model, nnx.Param)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(dtype)}
    assert list(loaded.names) == tree.names(params)
    back = dict(hf.to_tensors(loaded.names, params))
    assert back.keys() == stored.keys()
    for key, value in stored.items():
        assert back[key].dtype == value.dtype
        assert back[key].tobytes() == value.tobytes(), key


def test_widened_weights_come_back_in_the_stored_dtype(tmp_path):
    stored = tiny_hf.random_folder("llama", tmp_path, "bfloat16")
    loaded = hf.load(tmp_path, dtype="float32")
    params = nnx.state(loaded.model, nnx.Param)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    for key, value in hf.to_tensors(loaded.names, params):
        assert value.tobytes() == stored[key].tobytes(), key


@pytest.mark.parametrize(
    ("stored", "options", "expected"),
    [
        ("bfloat16", {}, "bfloat16"),
        ("float16", {}, "float32"),
        ("bfloat16", {"dtype": "float32"}, "float32"),
        ("bfloat16", {"compute_dtype": "float32"}, "float32"),
        ("float32", {"compute_dtype": "bfloat16"}, "bfloat16"),
    ],
)
def test_products_run_in_the_dtype_asked_for(stored, options, expected, tmp_path):
    tiny_hf.random_folder("llama", tmp_path, stored)
    loaded = hf.load(tmp_path, **options)
    assert loaded.config.dtype == loaded.model.config.dtype == expected
    kernel = loaded.model.layers[0].mlp.up.kernel[...]
    assert kernel.dtype == jnp.dtype(options.get("dtype", stored))
    assert loaded.model.init_cache(1, 4).keys[0].dtype == jnp.dtype(expected)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("gemma3", "Auto"),
        ("gpt2", "Explicit"),
        pytest.param("gemma3", "Explicit", marks=pytest.mark.full),
        pytest.param("gpt2", "Auto", marks=pytest.mark.full),
    ],
)
def test_each_device_holds_its_own_part_only(name, kind, tmp_path):
    tiny_hf.random_folder(name, tmp_path)
    axis = getattr(jax.sharding.AxisType, kind)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(axis,))
    plain, parted = hf.load(tmp_path), hf.load(tmp_path, mesh=mesh)
    whole = tree.named_leaves(nnx.state(plain.model, nnx.Param))
    for name, leaf in tree.named_leaves(nnx.state(parted.model, nnx.Param)).items():
        np.testing.assert_array_equal(leaf, whole[name])
        if name.endswith("kernel"):
            assert {s.data.size for s in leaf.addressable_shards} == {leaf.size // 8}
    tokens = tiny_hf.tokens(batch=8)
    with jax.set_mesh(mesh):
        placed = jax.device_put(tokens, jax.NamedSharding(mesh, jax.P("x")))
        got = _logits(parted.model, placed)
    # Sums over parts round differently.
    expected = _logits(plain.model, tokens)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4)
    back = dict(hf.to_tensors(parted.names, nnx.state(parted.model, nnx.Param)))
    for key, value in hf.to_tensors(plain.names, nnx.state(plain.model, nnx.Param)):
        assert back[key].tobytes() == value.tobytes(), key


def test_a_rule_says_where_each_leaf_lies(tmp_path):
    tiny_hf.random_folder("phi3", tmp_path)
    mesh = jax.make_mesh((4, 2), ("a", "b"))

    def rule(name, shape):
        split = name.startswith("layers") and name.endswith("kernel")
        spec = jax.P("b", "a") if split else jax.P()
        return jax.NamedSharding(mesh, spec)

    stored = tiny_hf.random_tensors("phi3")
    loaded = hf.load(tmp_path, shardings=rule)
    for name, leaf in tree.named_leaves(nnx.state(loaded.model, nnx.Param)).items():
        assert leaf.sharding == rule(name, leaf.shape)
        source = loaded.names[name]
        expected = stored[source.name].T if source.transposed else stored[source.name]
        np.testing.assert_array_equal(leaf, expected)


def test_only_one_leaf_is_copied_at_a_time(tmp_path, monkeypatch):
    tiny_hf.random_folder("llama", tmp_path)
    mesh = jax.make_mesh((8,), ("x",))
    seen = []
    real = jax.make_array_from_callback

    def spy(shape, sharding, callback, **options):
        def part(index):
            data = callback(index)
            seen.append(data.size / np.prod(shape))
            return data

        return real(shape, sharding, part, **options)

    monkeypatch.setattr(jax, "make_array_from_callback", spy)
    hf.load(tmp_path, mesh=mesh)
    assert set(seen) == {1 / 8}  # every axis of this configuration divides


def test_base_models_lack_the_prefix(tmp_path):
    tensors = tiny_hf.random_folder("qwen3", tmp_path / "whole")
    base = {key.removeprefix("model."): value for key, value in tensors.items()}
    folder = tiny_hf.save(tmp_path / "base", tiny_hf.config_json("qwen3"), base)
    one, other = hf.load(tmp_path / "whole"), hf.load(folder)
    for a, b in zip(
        *(jax.tree.leaves(nnx.state(x.model, nnx.Param)) for x in (one, other)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)
    params = nnx.state(other.model, nnx.Param)
    assert dict(hf.to_tensors(other.names, params)).keys() == base.keys()


def test_buffers_and_masks_are_left_out(tmp_path):
    gpt2 = tiny_hf.random_tensors("gpt2")
    gpt2 = {key.removeprefix("transformer."): value for key, value in gpt2.items()}
    gpt2["h.0.attn.bias"] = np.ones((1, 1, 64, 64), bool)
    gpt2["h.1.attn.masked_bias"] = np.array(-1e4, np.float32)
    hf.load(tiny_hf.save(tmp_path / "gpt2", tiny_hf.config_json("gpt2"), gpt2))
    llama = tiny_hf.random_tensors("llama")
    llama["model.layers.1.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    hf.load(tiny_hf.save(tmp_path / "llama", tiny_hf.config_json("llama"), llama))


def test_a_second_copy_of_a_tied_head_goes_along(tmp_path):
    tensors = tiny_hf.random_tensors("gemma3")
    config = tiny_hf.config_json("gemma3")
    table = tensors["model.embed_tokens.weight"]
    tensors["lm_head.weight"] = table.copy()
    loaded = hf.load(tiny_hf.save(tmp_path / "same", config, tensors))
    params = jax.tree.map(lambda x: 2 * x, nnx.state(loaded.model, nnx.Param))
    back = dict(hf.to_tensors(loaded.names, params))
    np.testing.assert_array_equal(back["lm_head.weight"], 2 * table)
    tensors["lm_head.weight"][3, 4] += 1
    with pytest.raises(Damaged, match=r"lm_head.weight differs.*tie_word_embeddings"):
        hf.load(tiny_hf.save(tmp_path / "other", config, tensors))


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


def test_left_out_attributes_have_the_defaults_of_the_family():
    gemma = _read("gemma3", layer_types=..., num_hidden_layers=7)
    assert gemma.windows == (5, 5, 5, 5, 5, None, 5)
    assert _read("gemma3", layer_types=..., sliding_window_pattern=2).windows == (
        (5, None) * 2
    )
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


def test_more_layers_than_tensors_are_refused_before_any_is_built(tmp_path):
    tiny_hf.random_folder("llama", tmp_path)
    tiny_hf.edit(tmp_path, num_hidden_layers=9_999)
    started = time.monotonic()
    with pytest.raises(Damaged, match=r"9999 layers .* but has \d+ tensors"):
        hf.load(tmp_path)
    assert time.monotonic() - started < 5  # a minute and more if they are built


def test_all_attributes_are_named_at_once(tmp_path):
    tiny_hf.random_folder("llama", tmp_path)
    tiny_hf.edit(tmp_path, gating=1, hidden_act="tan", vocab_size=...)
    with pytest.raises(Unknown, match=r"config.json.*vocab_size.*hidden_act.*gating=1"):
        hf.load(tmp_path)


# ---- tensors that do not fit


def test_everything_that_does_not_fit_is_told_at_once(tmp_path):
    tensors = tiny_hf.random_tensors("llama")
    tensors["model.layers.0.extra.weight"] = np.ones(3, np.float32)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["norm.weight"] = tensors["model.norm.weight"]
    tensors["model.layers.0.mlp.up_proj.weight"] = np.ones((32, 48), np.float32)
    tensors["model.layers.1.self_attn.q_proj.weight"] = np.ones((32, 32), np.int32)
    folder = tiny_hf.save(tmp_path, tiny_hf.config_json("llama"), tensors)
    with pytest.raises(Damaged) as error:
        hf.load(folder)
    for words in (
        "unknown: model.layers.0.extra.weight",
        "missing: model.layers.1.mlp.up_proj.weight",
        "twice: ",
        "model.norm.weight",
        "model.layers.0.mlp.up_proj.weight is (32, 48) and not (48, 32)",
        "model.layers.1.self_attn.q_proj.weight is int32, which is not floating",
    ):
        assert words in str(error.value)


def test_unknown_tensors_alone_mean_another_kind_of_model(tmp_path):
    tensors = tiny_hf.random_tensors("llama")
    for i in range(20):
        tensors[f"adapter.{i:02}"] = np.ones(3, np.float32)
    folder = tiny_hf.save(tmp_path, tiny_hf.config_json("llama"), tensors)
    with pytest.raises(Unknown, match=r"unknown: adapter.00.*and 8 more"):
        hf.load(folder)


def test_an_untied_head_must_be_there(tmp_path):
    tensors = tiny_hf.random_tensors("gemma3")
    config = {**tiny_hf.config_json("gemma3"), "tie_word_embeddings": False}
    with pytest.raises(Damaged, match=r"missing: lm_head.weight"):
        hf.load(tiny_hf.save(tmp_path, config, tensors))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": "float16"}, "dtype to be float32, bfloat16 or None, got 'float16'"),
        ({"compute_dtype": "int8"}, "compute_dtype to be float32, bfloat16 or None"),
        ({"mesh": 1, "shardings": 1}, "shardings or a mesh, got both"),
    ],
)
def test_wrong_options_are_refused_first(options, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        hf.load(tmp_path / "nowhere", **options)


def test_parameters_of_another_model_do_not_come_back(tmp_path):
    tiny_hf.random_folder("llama", tmp_path)
    loaded = hf.load(tmp_path)
    with pytest.raises(ValueError, match=r"head/kernel.*in one of the two only"):
        next(hf.to_tensors(loaded.names, {"norm": {"scale": jnp.ones(32)}}))
    with pytest.raises(ValueError, match=r"config.json that the model was made from"):
        next(hf.tensors(loaded.model, tiny_hf.config_json("gpt2")))


# ---- tokenizers


def _tokenizer_folder(folder, *, template=False, **settings):
    tokenizers = pytest.importorskip("tokenizers")
    tiny_hf.random_folder("llama", folder)
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "to": 3, "be": 4, "or": 5}
    made = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({**words, "<unk>": 6}, unk_token="<unk>")
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.add_special_tokens(["<pad>", "<s>", "</s>"])
    if template:
        made.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize(
    ("template", "settings", "begins"),
    [
        (False, {}, False),
        (True, {}, True),
        (False, {"add_bos_token": True, "bos_token": {"content": "<s>"}}, True),
        (True, {"add_bos_token": False, "bos_token": "<s>"}, False),
    ],
)
def test_texts_begin_as_the_folder_says(template, settings, begins, tmp_path):
    folder = _tokenizer_folder(tmp_path, template=template, **settings)
    tokenizer = hf.load_tokenizer(folder)
    assert (tokenizer.bos, tokenizer.eos, tokenizer.begins) == (1, (2,), begins)
    assert tokenizer.vocab_size == 7
    assert tokenizer.encode("to be or") == [1] * begins + [3, 4, 5]
    assert tokenizer.encode("to be", bos=True) == [1, 3, 4]
    assert tokenizer.encode("to be", bos=False) == [3, 4]
    assert tokenizer.decode(np.array([1, 3, 4])) == "to be"
    assert tokenizer.decode([1, 3], special=True) == "<s> to"


def test_a_tokenizer_without_bos_says_so(tmp_path):
    folder = _tokenizer_folder(tmp_path, add_bos_token=True)
    tiny_hf.edit(folder, bos_token_id=None, eos_token_id=[2, 5])
    tokenizer = hf.load_tokenizer(folder)
    assert (tokenizer.bos, tokenizer.eos, tokenizer.begins) == (None, (2, 5), False)
    with pytest.raises(ValueError, match=r"token that begins a text.*bos=False"):
        tokenizer.encode("to be", bos=True)


@pytest.mark.parametrize("wrong", [[{}], [1, "x"], "</s>", True, [[1]]])
def test_ends_that_are_no_tokens_are_refused(tmp_path, wrong):
    folder = _tokenizer_folder(tmp_path)
    tiny_hf.edit(folder, eos_token_id=wrong)
    with pytest.raises(
        Damaged, match=r"config.json' must have a token .* eos_token_id"
    ):
        hf.load_tokenizer(folder)


def test_what_is_no_tokenizer_is_told_apart(tmp_path):
    folder = _tokenizer_folder(tmp_path)
    (folder / "tokenizer_config.json").write_text("[]")
    with pytest.raises(Damaged, match=r"tokenizer_config.json' must hold an object"):
        hf.load_tokenizer(folder)
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(Damaged, match=r"tokenizer_config.json' is not JSON"):
        hf.load_tokenizer(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(Damaged, match="is no tokenizer"):
        hf.load_tokenizer(folder)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(b"")
    with pytest.raises(Unknown, match=r"no tokenizer.json but a tokenizer.model; make"):
        hf.load_tokenizer(folder)


def test_a_sharded_folder_is_one_model(tmp_path):
    from safetensors.numpy import save_file

    tensors = tiny_hf.random_tensors("llama")
    folder = tiny_hf.save(tmp_path / "one", tiny_hf.config_json("llama"), tensors)
    parts = tmp_path / "parts"
    parts.mkdir()
    (parts / "config.json").write_text((folder / "config.json").read_text())
    names = list(tensors)
    files = {
        n: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, n in enumerate(names)
    }
    for file in set(files.values()):
        save_file({n: tensors[n] for n in names if files[n] == file}, parts / file)
    index = {"metadata": {}, "weight_map": files}
    (parts / "model.safetensors.index.json").write_text(json.dumps(index))
    assert open_directory(parts).indexed
    for a, b in zip(
        *(
            jax.tree.leaves(nnx.state(hf.load(p).model, nnx.Param))
            for p in (folder, parts)
        ),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)
