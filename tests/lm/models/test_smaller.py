"""Smaller decoders: their config.json, and directories that transformers loads."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from flax import nnx

import jaxprune as jp
from jaxprune.arrays import tree
from jaxprune.lm.checkpoints import rewrite
from jaxprune.lm.models import hf
from tests.support import hf_directories, tiny_hf
from tests.support.removal import random_scores

FAMILIES = ["llama", "llama-3", "mistral", "qwen2", "qwen3-bias", "phi3", "gemma3"]
FAMILIES += ["gemma2", "smollm3", "granite", "cohere", "starcoder2", "phi"]
# Their directories cannot have fewer heads.
WHOLE_HEADS = ["gpt2", "olmo2", "cohere2", "gpt-neox", "opt", "falcon-40b"]
IDS = tiny_hf.tokens(1, 8)
# Layers that have each kind of layer of a family; one for the others.
KINDS = {"gemma3": 3, "gemma2": 2, "smollm3": 2, "qwen2": 2}


def loaded(folder):
    """A model of a folder: graphdef, parameters, the whole."""
    whole = hf.load(folder, dtype="float32")
    graphdef, params = nnx.split(whole.model, nnx.Param)
    return graphdef, params, whole


def shrunk(folder, keep, seed=0):
    """A model of a folder with fewer units: the shrunk result and the whole."""
    graphdef, params, whole = loaded(folder)

    def fn(params, ids):
        return nnx.merge(graphdef, params)(ids)

    return jp.shrink(fn, params, [IDS], random_scores(params, seed), keep), whole


def logits(folder, ids):
    graphdef, params, _ = loaded(folder)
    return np.asarray(jax.jit(lambda p, t: nnx.merge(graphdef, p)(t))(params, ids))


def theirs(folder, ids):
    """Logits of the model that transformers makes of a folder."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys"))
    assert not info["mismatched_keys"]
    return tiny_hf.torch_logits(model.to(torch.float32).eval(), ids)


@pytest.mark.parametrize(
    "name",
    [
        name if name == "phi3" else pytest.param(name, marks=pytest.mark.full)
        for name in FAMILIES
    ],
)
def test_a_smaller_directory_has_the_logits_of_the_shrunk_function(name, tmp_path):
    layers = KINDS.get(name, 1)
    tiny_hf.random_folder(name, tmp_path / "whole", "float32", layers)
    result, whole = shrunk(tmp_path / "whole", 0.5)
    hf.write_smaller(tmp_path / "whole", tmp_path / "small", result.params, whole.names)
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    assert config["intermediate_size"] == 24
    assert config["num_attention_heads"] == 2
    assert config["head_dim"] == whole.config.head_dim
    expected = jax.jit(result.fn)(result.params, IDS)
    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(
        logits(tmp_path / "small", IDS), expected, rtol=0, atol=1e-5
    )


@pytest.mark.parity
@pytest.mark.parametrize(
    "name",
    [
        "gemma3",
        "llama",
        *(
            pytest.param(name, marks=pytest.mark.full)
            for name in (*FAMILIES, *WHOLE_HEADS)
            if name not in ("gemma3", "llama")
        ),
    ],
)
def test_transformers_loads_it_with_equal_logits(name, tmp_path):
    pytest.importorskip("torch")
    whole_model = tiny_hf.torch_model(name, tmp_path / "whole")
    shares = {"*/mlp/*": 0.5} if name in WHOLE_HEADS else 0.5
    result, whole = shrunk(tmp_path / "whole", shares)
    kept = [0, *range(2, whole.config.layers)]
    few, params = hf.keep_layers(whole.config, result.params, kept)
    assert few.layers == whole.config.layers - 1
    hf.write_smaller(
        tmp_path / "whole", tmp_path / "small", params, whole.names, kept=kept
    )
    ids = tiny_hf.tokens(2, 40)
    ours = logits(tmp_path / "small", ids)
    np.testing.assert_allclose(theirs(tmp_path / "small", ids), ours, rtol=0, atol=2e-5)
    assert np.abs(tiny_hf.torch_logits(whole_model, ids) - ours).max() > 0.1


@pytest.mark.parametrize(
    "name", ["llama", pytest.param("gemma3", marks=pytest.mark.full)]
)
def test_it_costs_what_a_model_built_at_its_shape_costs(name, tmp_path):
    tiny_hf.random_folder(name, tmp_path / "whole", "float32", layers=1)
    result, whole = shrunk(tmp_path / "whole", 0.5)
    shape = hf.resized(whole.config, result.params)
    graphdef, params = nnx.split(hf.abstract(shape), nnx.Param)

    def flops(fn, params):
        cost = jax.jit(fn).lower(params, IDS).compile().cost_analysis()
        return cost["flops"]

    built = flops(lambda params, ids: nnx.merge(graphdef, params)(ids), params)
    assert flops(result.fn, result.params) == pytest.approx(built, rel=0.01)


def test_query_heads_of_each_key_head_become_fewer(tmp_path):
    tiny_hf.random_folder("llama", tmp_path / "whole", "float32", layers=1)
    name = "layers/*/attention/out/kernel:0.1"
    result, whole = shrunk(tmp_path / "whole", {name: 0.5})
    hf.write_smaller(tmp_path / "whole", tmp_path / "small", result.params, whole.names)
    config = hf.load(tmp_path / "small").config
    assert (config.heads, config.kv_heads) == (2, 2)
    np.testing.assert_allclose(
        logits(tmp_path / "small", IDS),
        jax.jit(result.fn)(result.params, IDS),
        rtol=0,
        atol=1e-5,
    )


def test_layers_that_are_left_out_are_skipped(tmp_path):
    tiny_hf.random_folder("gemma3", tmp_path / "whole", "float32")
    graphdef, params, whole = loaded(tmp_path / "whole")
    small, left = hf.keep_layers(whole.config, params, [0, 2])
    hf.write_smaller(
        tmp_path / "whole", tmp_path / "small", left, whole.names, kept=[0, 2]
    )
    assert small.windows == (5, None)
    again = hf.load(tmp_path / "small", dtype="float32")
    assert again.config == small

    def by_hand(params, ids):
        model = nnx.merge(graphdef, params)
        x, layers = model.embed(ids), [model.layers[0], model.layers[2]]
        del model.layers[3], model.layers[1]
        assert list(model.layers) == layers
        model.config = small
        return model.logits(model.states(x)[0])

    np.testing.assert_allclose(
        logits(tmp_path / "small", IDS),
        jax.jit(by_hand)(params, IDS),
        rtol=0,
        atol=1e-5,
    )


def test_everything_else_of_a_directory_comes_along(tmp_path):
    tiny_hf.random_folder("llama", tmp_path / "whole", "bfloat16")
    (tmp_path / "whole" / "tokenizer.json").write_text('{"model": 1}')
    result, whole = shrunk(tmp_path / "whole", {"*/mlp/*": 0.75})
    hf.write_smaller(tmp_path / "whole", tmp_path / "small", result.params, whole.names)
    assert (tmp_path / "small" / "tokenizer.json").read_text() == '{"model": 1}'
    record = rewrite.read_provenance(tmp_path / "small", verify=True)
    assert "config.json" in record["files"]
    leaves = jax.tree.leaves(nnx.state(hf.load(tmp_path / "small").model, nnx.Param))
    assert {leaf.dtype.name for leaf in leaves} == {"bfloat16"}


def test_a_sharded_directory_stays_sharded(tmp_path):
    config = tiny_hf.config_json("llama", layers=1)
    tensors = tiny_hf.random_tensors("llama", layers=1)
    hf_directories.build(tmp_path / "whole", tensors, 3, config)
    (tmp_path / "whole" / "tokenizer.json").unlink()
    result, whole = shrunk(tmp_path / "whole", 0.5)
    hf.write_smaller(tmp_path / "whole", tmp_path / "small", result.params, whole.names)
    assert len([*(tmp_path / "small").glob("*.safetensors")]) == 3
    np.testing.assert_allclose(
        logits(tmp_path / "small", IDS),
        jax.jit(result.fn)(result.params, IDS),
        rtol=0,
        atol=1e-5,
    )


def test_a_tied_head_that_is_stored_again_stays_so(tmp_path):
    tensors = tiny_hf.random_folder("qwen2-full", tmp_path / "whole", "float32")
    config = tiny_hf.config_json("qwen2-full")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    tiny_hf.save(tmp_path / "whole", config, tensors)
    result, whole = shrunk(tmp_path / "whole", {"*/mlp/*": 0.5})
    hf.write_smaller(tmp_path / "whole", tmp_path / "small", result.params, whole.names)
    again = hf.load(tmp_path / "small")
    assert again.names["embedding/embedding"].copies == ("lm_head.weight",)


# ---- what is refused, before anything is written


def test_a_config_that_cannot_say_it_is_refused(tmp_path):
    tiny_hf.random_folder("gpt2", tmp_path / "whole", "float32")
    result, whole = shrunk(tmp_path / "whole", {"*/attention/*": 0.5})
    with pytest.raises(ValueError, match="of a gpt2 model cannot say"):
        hf.write_smaller(
            tmp_path / "whole", tmp_path / "small", result.params, whole.names
        )
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]


@pytest.mark.parametrize("name", WHOLE_HEADS)
def test_families_whose_heads_must_stay_say_so(name):
    config = tiny_hf.config_json(name)
    shape = hf.decoder_config(config)
    few = dataclasses.replace(shape, heads=shape.heads // shape.kv_heads, kv_heads=1)
    if shape.kv_heads == 1:
        few = dataclasses.replace(shape, heads=1)
    with pytest.raises(ValueError, match=r"cannot say.*layers and neurons only"):
        hf.smaller_config(config, few)
    assert hf.shrinkable(config) == ["layers", "neurons"]
    small = dataclasses.replace(shape, mlp_width=12)
    again = hf.smaller_config(config, small)
    assert hf.decoder_config(again) == small
    assert "head_dim" not in again


def refusal(config):
    """What transformers says against a config.json; empty if it takes it."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        CONFIG_MAPPING[config["model_type"]](**config)
    except Exception as error:
        return str(error)
    return ""


@pytest.mark.parity
@pytest.mark.parametrize("name", [*FAMILIES, "phi3-long"])
def test_heads_that_transformers_refuses_are_refused(name):
    pytest.importorskip("transformers")
    config = tiny_hf.config_json(name)
    shape = hf.decoder_config(config)
    assert (shape.width, shape.heads) == (32, 4)
    few = dataclasses.replace(shape, heads=3, kv_heads=1)
    said = {"num_attention_heads": 3, "num_key_value_heads": 1}
    said["head_dim"] = shape.head_dim
    if "multiple of the number of attention heads" in refusal({**config, **said}):
        assert hf.heads_that_fit(config, shape) == [1, 2, 4]
        with pytest.raises(ValueError, match="32, is a multiple of its query heads"):
            hf.smaller_config(config, few)
        return
    if "short_factor" in refusal({**config, **said}):
        assert hf.heads_that_fit(config, shape) == [4]
        with pytest.raises(ValueError, match="fits its long rope, got 3; leave all of"):
            hf.smaller_config(config, few)
        return
    assert hf.heads_that_fit(config, shape) == [1, 2, 3, 4]
    again = hf.smaller_config(config, few)
    assert hf.decoder_config(again) == few
    assert refusal(again) == ""


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "smollm3", "cohere2", "qwen2"])
def test_layers_keep_their_kind_where_others_go(name):
    config = tiny_hf.config_json(name)
    config.pop("layer_types", None)
    shape = hf.decoder_config(config)
    params = nnx.state(hf.abstract(shape), nnx.Param)
    kept = [0, 2]
    small, _ = hf.keep_layers(shape, params, kept)
    again = hf.decoder_config(hf.smaller_config(config, small, kept))
    assert again == small
    assert again.windows == tuple(shape.window(i) for i in kept)
    assert [again.rope(i) for i in (0, 1)] == [shape.rope(i) for i in kept]


def test_layers_of_different_sizes_are_refused(tmp_path):
    tiny_hf.random_folder("llama", tmp_path / "whole", "float32")
    result, whole = shrunk(tmp_path / "whole", {"layers/1/mlp/*": 0.5})
    with pytest.raises(ValueError, match="layers of one size, but layer 0 has"):
        hf.resized(whole.config, result.params)


@pytest.mark.parametrize(
    "name", ["embedding/embedding:1", "layers/*/attention/out/kernel:0.2"]
)
def test_other_sizes_are_refused(name, tmp_path):
    tiny_hf.random_folder("llama", tmp_path / "whole", "float32")
    result, whole = shrunk(tmp_path / "whole", {name: 0.5})
    with pytest.raises(ValueError, match="became smaller in another way"):
        hf.resized(whole.config, result.params)


def test_query_heads_that_do_not_fit_the_key_heads_are_refused():
    config = hf.decoder_config(tiny_hf.config_json("llama"))
    params = nnx.state(hf.abstract(config), nnx.Param)  # 4 query heads, 2 key heads
    for layer in range(config.layers):
        attention = params["layers"][layer]["attention"]
        for name, shape in (("q", (32, 24)), ("out", (24, 32))):
            kernel = attention[name]["kernel"]
            kernel.set_value(jax.ShapeDtypeStruct(shape, np.float32))
    with pytest.raises(ValueError, match="but 3 query and 2 key heads are left"):
        hf.resized(config, params)


@pytest.mark.parametrize("kept", [[], [1, 0], [0, 2], [0, 0]])
def test_layers_that_are_not_ascending_numbers_are_refused(kept, tmp_path):
    tiny_hf.random_folder("llama", tmp_path / "whole", "float32")
    _, params, whole = loaded(tmp_path / "whole")
    with pytest.raises(ValueError, match="ascending numbers from 0 to 1"):
        hf.keep_layers(whole.config, params, kept)
    assert tree.names(params)


def test_the_layers_that_stayed_must_be_said(tmp_path):
    tiny_hf.random_folder("llama", tmp_path / "whole", "float32")
    found = hf.load(tmp_path / "whole")
    params = nnx.state(found.model, nnx.Param)
    _, few = hf.keep_layers(found.config, params, [1])
    for own, kept in ((few, None), (params, [1])):
        with pytest.raises(ValueError, match="give kept= as it was given"):
            hf.write_smaller(
                tmp_path / "whole", tmp_path / "out", own, found.names, kept=kept
            )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["mixtral", "olmoe"])
def test_a_mixture_says_what_can_be_fewer(name):
    config = tiny_hf.config_json(name)
    shape = hf.decoder_config(config)
    few = dataclasses.replace(shape, mlp_width=shape.mlp_width - 8)
    told = " and ".join(hf.shrinkable(config)[-2:]) + " only"
    assert "neurons" not in told
    with pytest.raises(ValueError, match=f"would change mlp_width; remove .*{told}"):
        hf.smaller_config(config, few)
