"""Mixtures of experts: the numbers of transformers, directories, experts one by one."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxprune as jp
from jaxprune.arrays import tree
from jaxprune.lm import cli
from jaxprune.lm.checkpoints.checkpoint_dir import Damaged
from jaxprune.lm.models import hf
from jaxprune.lm.models.decoder.experts import Experts
from tests.support import tiny_cli, tiny_hf
from tests.support.plain_decoder import initial
from tests.support.tiny_families import MIXTURES


def logits(folder, ids):
    graphdef, params = nnx.split(hf.load(folder, dtype="float32").model, nnx.Param)
    return np.asarray(jax.jit(lambda p, t: nnx.merge(graphdef, p)(t))(params, ids))


@pytest.mark.parity
@pytest.mark.full
@pytest.mark.parametrize("name", MIXTURES)
def test_logits_are_those_of_transformers(name, tmp_path):
    pytest.importorskip("torch")
    theirs, ids = tiny_hf.torch_model(name, tmp_path), tiny_hf.tokens()
    expected = tiny_hf.torch_logits(theirs, ids)
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(logits(tmp_path, ids), expected, rtol=0, atol=2e-5)


def _slow(module, rows):
    """Each token by itself, in float64; a token's experts one after the other."""
    t = {k: np.asarray(v, np.float64) for k, v in tree.named_leaves(module).items()}

    def mlp(x, gate, up, down):
        inner = x @ gate
        return (inner / (1 + np.exp(-inner)) * (x @ up)) @ down

    out = np.zeros(rows.shape)
    for i, x in enumerate(np.asarray(rows, np.float64)):
        share = np.exp(x @ t["router/kernel"])
        share /= share.sum()
        for expert in np.argsort(-share)[:2]:
            own = [t[f"{n}/kernel"][expert] for n in ("gate", "up", "down")]
            out[i] += share[expert] * mlp(x, *own)
        own = [t[f"shared/{n}/kernel"] for n in ("gate", "up", "down")]
        taken = 1 / (1 + np.exp(-(x @ t["shared_router/kernel"])))
        out[i] += taken * mlp(x, *own)
    return out


def test_each_token_is_given_to_its_experts():
    config = hf.decoder_config(tiny_hf.config_json("qwen2-moe"))
    experts = nnx.eval_shape(lambda: Experts(config, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(experts, nnx.Param)
    rng = np.random.default_rng(0)
    drawn = lambda leaf: rng.normal(0, 0.2, leaf.shape).astype(np.float32)  # noqa: E731
    state = jax.tree.map(drawn, state)
    x = rng.normal(size=(2, 7, 32)).astype(np.float32)
    expected = _slow(state, x.reshape(-1, 32)).reshape(x.shape)
    assert np.abs(expected).max() > 0.5
    got = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))(state, x)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", MIXTURES)
def test_a_leaf_holds_a_matrix_of_all_experts(name, tmp_path):
    stored = tiny_hf.random_folder(name, tmp_path, "bfloat16")
    loaded = hf.load(tmp_path)
    params = nnx.state(loaded.model, nnx.Param)
    leaves, config = tree.named_leaves(params), loaded.config
    kernel = leaves["layers/1/mlp/down/kernel"]
    assert kernel.shape == (config.experts, config.mlp_width, config.width)
    source = loaded.names["layers/1/mlp/down/kernel"]
    for i, theirs in enumerate(source.names):
        if config.experts_fused:  # stored as the leaf is
            np.testing.assert_array_equal(kernel, stored[theirs])
        else:
            np.testing.assert_array_equal(kernel[i], stored[theirs].T)
    prunable = [n for n, leaf in leaves.items() if jp.tree.prunable(n, leaf)]
    own = 2 if config.experts_fused else 3
    shared = 3 if config.shared_width else 0
    assert len(prunable) == config.layers * (4 + own + shared)
    assert not [n for n in prunable if "router" in n]
    back = dict(hf.to_tensors(loaded.names, params))
    assert back.keys() == stored.keys()
    assert all(back[key].tobytes() == stored[key].tobytes() for key in stored)


def test_an_expert_that_is_missing_is_named(tmp_path):
    tensors = tiny_hf.random_tensors("mixtral")
    lost = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
    del tensors[lost]
    folder = tiny_hf.save(tmp_path, tiny_hf.config_json("mixtral"), tensors)
    with pytest.raises(Damaged, match=f"missing: {lost}"):
        hf.load(folder)


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("mixtral", {"num_experts_per_tok": 4}, "at most num_local_experts=3, got 4"),
        ("qwen3-moe", {"num_local_experts": 5}, "num_local_experts must be num_exper"),
        ("qwen3-moe", {"mlp_only_layers": [1]}, "mlp_only_layers must be empty"),
        ("qwen3-moe", {"decoder_sparse_step": 2}, "decoder_sparse_step must be 1"),
        ("qwen2-moe", {"use_sliding_window": True}, "use_sliding_window must be False"),
        (
            "qwen2-moe",
            {"layer_types": ["full_attention", "sliding_attention"]},
            "layer_types must be full_attention everywhere",
        ),
        ("gpt-oss", {"rope_parameters": None}, "rope_parameters must be given"),
        (
            "gpt-oss",
            {"quantization_config": {"quant_method": "mxfp4"}},
            r"quantization_config must be absent; load with Mxfp4Config\(dequantize",
        ),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv must be None, got 8.0"),
        ("olmoe", {"head_dim": 12}, "hidden_size / num_attention_heads = 8, got 12"),
    ],
)
def test_what_would_change_the_model_is_refused_by_name(name, changes, words):
    with pytest.raises(ValueError, match=words):
        hf.decoder_config({**tiny_hf.config_json(name), **changes})


@pytest.mark.full
@pytest.mark.parametrize(
    ("name", "kept"), [("mixtral", [0]), ("olmoe", [0]), ("gpt-oss", [0, 1])]
)
def test_a_cache_gives_the_logits_of_a_full_pass(name, kept, tmp_path):
    tiny_hf.random_folder(name, tmp_path)
    ids, loaded = tiny_hf.tokens(time=12), hf.load(tmp_path)
    config, params = hf.keep_layers(
        loaded.config, nnx.state(loaded.model, nnx.Param), kept
    )
    graphdef, _ = nnx.split(hf.abstract(config), nnx.Param)
    call = jax.jit(lambda p, t, c=None: nnx.merge(graphdef, p)(t, cache=c))
    # Where the parameters lie: else the second call is another program.
    cache = nnx.merge(graphdef, params).init_cache(2, 12)
    cache = jax.device_put(cache, jax.devices()[0])
    parts = []
    for i in range(12):
        part, cache = call(params, ids[:, i : i + 1], cache)
        parts.append(part)
    got, expected = np.concatenate(parts, 1), np.asarray(call(params, ids))
    atol = 1e-5 * np.abs(expected).max()
    np.testing.assert_allclose(got, expected, rtol=0, atol=atol)


@pytest.mark.full
@pytest.mark.parametrize(
    ("name", "method"),
    [("mixtral", "wanda"), ("mixtral", "sparsegpt"), ("gpt-oss", "wanda")],
)
def test_each_expert_loses_its_own_half(name, method, tmp_path, capsys):
    pytest.importorskip("tyro")
    model, out = tmp_path / "model", tmp_path / "out"
    before = tiny_hf.random_folder(name, model, layers=1)
    ids = tiny_hf.tokens(4, 16)
    np.save(tmp_path / "rows.npy", ids)
    code, record, _ = tiny_cli.run(
        capsys, "prune", model, out, "--method", method, "--sparsity", "0.5",
        "--calibration", tmp_path / "rows.npy", "--length", "16", "--sequences", "4",
        "--batch", "2",
    )  # fmt: skip
    assert code == 0
    after = tiny_cli.weights(out)
    assert after.keys() == before.keys()
    for key, value in before.items():
        kept = ("norm", "embed", "head", ".gate.", "router", "bias", "sinks")
        if any(part in key for part in kept):
            np.testing.assert_array_equal(after[key], value, err_msg=key)
        else:
            for expert in after[key] if value.ndim == 3 else after[key][None]:
                assert (expert == 0).sum() == expert.size // 2, key
            counted = record["tensors"][key]
            assert counted["zeros"] == value.size // 2
    rows = [row for row in record["weights"] if "experts" in row["name"]]
    assert len(rows) == (2 if name == "gpt-oss" else 3)
    for row in rows:  # each token is given to two experts
        assert sum(row["samples"]) == 2 * ids.size
        few = [i for i, n in enumerate(row["samples"]) if n < 16]
        assert row["by_magnitude"] == few
        assert 0 < row["error"] < 0.6


def test_the_command_says_what_it_cannot_do_with_experts(tmp_path, capsys):
    pytest.importorskip("tyro")
    tiny_hf.random_folder("mixtral", tmp_path / "model")
    _, found, _ = tiny_cli.run(capsys, "inspect", tmp_path / "model")
    assert found["shrinkable"] == ["layers", "experts", "heads"]
    assert len(found["methods"]) == 5
    words = ["shrink", str(tmp_path / "model"), str(tmp_path / "out"), "--ffn", "0.5"]
    assert cli.main(words) == 1
    assert (
        "cannot have fewer neurons; give --heads or --experts or --layers"
        in capsys.readouterr().err
    )
    np.save(tmp_path / "rows.npy", tiny_hf.tokens(4, 16))
    words = [
        "prune",
        str(tmp_path / "model"),
        str(tmp_path / "out"),
        "--method",
        "wanda",
    ]
    words += ["--calibration", str(tmp_path / "rows.npy"), "--length", "16"]
    words += ["--sequences", "4", "--sparsity", "0.5", "--exclude", "*.experts.1.*"]
    assert cli.main(words) == 1
    assert "must match all experts of a layer's matrix" in capsys.readouterr().err


@pytest.mark.parity
@pytest.mark.full
@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])
def test_fewer_layers_are_loaded_by_transformers(name, tmp_path):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    tiny_hf.torch_model(name, tmp_path / "whole")
    whole = hf.load(tmp_path / "whole", dtype="float32")
    params = nnx.state(whole.model, nnx.Param)
    _, few = hf.keep_layers(whole.config, params, [1])
    source, out = tmp_path / "whole", tmp_path / "small"
    hf.write_smaller(source, out, few, whole.names, kept=[1])
    assert json.loads((out / "config.json").read_text())["num_hidden_layers"] == 1
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        out, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys"))
    ids = tiny_hf.tokens()
    expected = tiny_hf.torch_logits(model.eval(), ids)
    np.testing.assert_allclose(logits(out, ids), expected, rtol=0, atol=2e-5)


@pytest.mark.full
def test_on_an_explicit_mesh_a_mixture_has_the_gradients_of_one_device():
    kinds = (jax.sharding.AxisType.Explicit,) * 2
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=kinds)
    config = {**tiny_hf.config_json("olmoe"), "num_hidden_layers": 1}
    config = hf.decoder_config(config)
    graphdef, params = nnx.split(initial(config), nnx.Param)
    ids = tiny_hf.tokens(2, 8)

    def loss(params, ids):
        return jnp.square(nnx.merge(graphdef, params)(ids)).mean()

    expected = jax.jit(jax.grad(loss))(params, ids)
    whole = jax.NamedSharding(mesh, jax.P())
    placed = jax.tree.map(lambda x: jax.device_put(x, whole), params)
    with jax.set_mesh(mesh):
        rows = jax.device_put(ids, jax.NamedSharding(mesh, jax.P("data")))
        found = jax.jit(jax.grad(loss))(placed, rows)
    for name, leaf in tree.named_leaves(expected).items():
        own = np.asarray(tree.named_leaves(found)[name])
        np.testing.assert_allclose(own, leaf, atol=1e-6, err_msg=name)
