"""Hugging Face folders: the same numbers as transformers, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxprune.arrays import tree
from jaxprune.lm.checkpoints.checkpoint_dir import Damaged, Unknown
from jaxprune.lm.models import hf
from jaxprune.lm.models.generate import generate
from tests.support import tiny_hf

# Every switch of the decoder; every feature of each family in the full suite.
FIRST = ("gpt2", "llama-3", "mistral", "qwen2", "qwen3", "phi3-long", "gemma3")
FIRST += ("cohere-norms", "falcon-40b")
# That are generated from in the full suite.
OTHERS = ("phi3-long", "gpt2", "smollm3-sliding", "cohere2", "opt", "falcon-40b")
# Whose layers are of two kinds; some of the others have two layers all the same.
LAYERS = ("gemma", "smollm3", "qwen2", "qwen3-bias", "gpt2", "llama-3")
LONG = ("phi3-long", "phi3-partial", "phi3-yarn", "llama-long")


def _torch_model(name, folder):
    layers = None if name.startswith(LAYERS) else 1
    return tiny_hf.torch_model(name, folder, layers=layers)


def _logits(model, tokens):
    graphdef, params = nnx.split(model, nnx.Param)
    return np.asarray(jax.jit(lambda p, t: nnx.merge(graphdef, p)(t))(params, tokens))


# ---- parity with transformers


@pytest.mark.parity
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in FIRST else pytest.mark.full)
        for name in tiny_hf.CONFIGS
    ],
)
def test_logits_are_those_of_transformers(name, tmp_path):
    pytest.importorskip("torch")
    theirs = _torch_model(name, tmp_path)
    model = hf.load(tmp_path).model
    for length in (40, 12) if name in LONG else (40,):  # the switch is at 16
        tokens = tiny_hf.tokens(time=length)
        expected = tiny_hf.torch_logits(theirs, tokens)
        assert np.abs(expected).max() > 1
        np.testing.assert_allclose(_logits(model, tokens), expected, rtol=0, atol=2e-5)


@pytest.mark.parity
@pytest.mark.parametrize(
    "name", ["gemma3", *(pytest.param(n, marks=pytest.mark.full) for n in OTHERS)]
)
def test_generation_is_that_of_transformers(name, tmp_path):
    torch = pytest.importorskip("torch")
    theirs = _torch_model(name, tmp_path)
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


@pytest.mark.parity
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


@pytest.mark.parity
@pytest.mark.parametrize("name", ["granite", "gemma2", "gemma3"])  # gemma's is rounded
def test_embeddings_in_bfloat16_are_those_of_transformers(name, tmp_path):
    torch = pytest.importorskip("torch")
    theirs = tiny_hf.torch_model(name, tmp_path, dtype="bfloat16", layers=1)
    if name == "granite":
        theirs.model.embedding_multiplier = 12.3
        tiny_hf.edit(tmp_path, embedding_multiplier=12.3)
    tokens = tiny_hf.tokens()
    with torch.no_grad():
        ids = torch.from_numpy(tokens).long()
        # What the first layer gets, before anything else is computed.
        expected = theirs(ids, output_hidden_states=True).hidden_states[0]
    loaded = hf.load(tmp_path)
    got = np.asarray(loaded.model.embed(tokens), np.float32)
    np.testing.assert_array_equal(got, expected.float().numpy())


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
        pytest.param("gemma3", "Auto", marks=pytest.mark.full),
        ("gpt2", "Explicit"),
        pytest.param("gemma3", "Explicit", marks=pytest.mark.full),
        pytest.param("gpt2", "Auto", marks=pytest.mark.full),
        pytest.param("olmoe", "Explicit", marks=pytest.mark.full),
        pytest.param("olmoe", "Auto", marks=pytest.mark.full),
    ],
)
def test_each_device_holds_its_own_part_only(name, kind, tmp_path):
    tiny_hf.random_folder(name, tmp_path, layers=1)
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


def test_each_device_reads_its_eighth_of_a_leaf(tmp_path, monkeypatch):
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
    params = nnx.state(loaded.model, nnx.Param)
    params = jax.tree.map(lambda x: 2 * np.asarray(x), params)
    back = dict(hf.to_tensors(loaded.names, params))
    np.testing.assert_array_equal(back["lm_head.weight"], 2 * table)
    tensors["lm_head.weight"][3, 4] += 1
    with pytest.raises(Damaged, match=r"lm_head.weight differs.*tie_word_embeddings"):
        hf.load(tiny_hf.save(tmp_path / "other", config, tensors))


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
