"""The structured competitors do what their papers say."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from benchmarks import torch_recovery, torch_shrinking  # noqa: E402 (they import torch)

pytestmark = pytest.mark.parity

CONFIG = torch_shrinking.Config(model=Path(), method="none", ffn=0.25, heads=0.5)


@pytest.fixture
def model():
    config = transformers.Gemma3TextConfig(
        vocab_size=61,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=8,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )
    torch.manual_seed(0)
    return transformers.Gemma3ForCausalLM(config).eval()


@pytest.fixture
def config(tmp_path):
    ids = np.random.default_rng(2).integers(0, 61, (6, 20))
    np.save(tmp_path / "ids.npy", ids)
    return dataclasses.replace(CONFIG, calibration=tmp_path / "ids.npy", sequences=4)


def gone(layer):
    """The neurons and the heads whose columns are zero."""
    out = layer.self_attn.o_proj.weight.unflatten(1, (4, 8))
    neurons = (layer.mlp.down_proj.weight == 0).all(0)
    return neurons.nonzero()[:, 0].tolist(), (out == 0).all(2).all(0).sum().item()


@pytest.mark.parametrize("method", ["magnitude-sp", "wanda-sp", "flap"])
def test_every_layer_loses_its_share(model, config, method):
    with torch.no_grad():
        torch_shrinking.remove(model, dataclasses.replace(config, method=method))
    for layer in model.base_model.layers:
        neurons, heads = gone(layer)
        assert (len(neurons), heads) == (6, 2)


def test_the_adaptive_way_loses_as_many_in_all(model, config):
    config = dataclasses.replace(config, method="flap-adaptive")
    with torch.no_grad():
        torch_shrinking.remove(model, config)
    removed = [gone(layer) for layer in model.base_model.layers]
    assert sum(len(neurons) for neurons, _ in removed) == 3 * 6
    assert sum(heads for _, heads in removed) == 3 * 2


def test_scores_of_the_first_layer_are_those_of_the_formulas(model, config):
    """Wanda-sp: sum_i |W_ij| ||X_j||. FLAP: Var(X_j) ||W_:j||^2."""
    layer, inputs = model.base_model.layers[0], []
    weight = layer.mlp.down_proj.weight.detach().clone()
    handle = layer.mlp.down_proj.register_forward_pre_hook(
        lambda _, args: inputs.append(args[0].detach())
    )
    ids = torch.from_numpy(np.load(config.calibration)[:4])
    with torch.no_grad():
        model(ids)
    handle.remove()
    x = inputs[0].flatten(0, 1)
    scores = {
        "wanda-sp": weight.abs().sum(0) * x.square().sum(0).sqrt(),
        "flap": x.var(0) * weight.square().sum(0),
    }
    config = dataclasses.replace(config, heads=0.0)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    for method, score in scores.items():
        model.load_state_dict(state, strict=False)
        with torch.no_grad():
            torch_shrinking.remove(model, dataclasses.replace(config, method=method))
        assert gone(layer)[0] == sorted(score.argsort()[:6].tolist())
    lost = score.argsort()[:6]
    bias = weight[:, lost] @ x.mean(0)[lost]
    torch.testing.assert_close(layer.mlp.down_proj.bias, bias, rtol=1e-4, atol=1e-6)


def test_layers_that_change_least_are_dropped(model, config):
    with torch.no_grad():
        for name, weight in model.base_model.layers[1].named_parameters():
            if "post_" in name:
                weight.fill_(-1.0)  # Gemma's norms multiply by 1 + weight: adds nothing
        kept = [model.base_model.layers[i] for i in (0, 2)]
        torch_shrinking.remove(
            model, dataclasses.replace(config, method="block-influence", drop=1)
        )
    assert list(model.base_model.layers) == kept


def test_layers_that_stay_keep_their_kind(model, config):
    with torch.no_grad():
        for name, weight in model.base_model.layers[0].named_parameters():
            if "post_" in name:
                weight.fill_(-1.0)
        config = dataclasses.replace(config, method="block-influence", drop=1)
        torch_shrinking.remove(model, config)
    assert model.config.layer_types == ["full_attention", "sliding_attention"]


def divergence(dense, model, ids):
    with torch.no_grad():
        teacher_log_probs, log_probs = (
            m(ids).logits.log_softmax(-1) for m in (dense, model)
        )
    return torch.nn.functional.kl_div(
        log_probs, teacher_log_probs, reduction="batchmean", log_target=True
    ).item()


def test_a_recovery_comes_back_to_the_dense_model_and_keeps_zeros(
    model, config, tmp_path, monkeypatch
):
    monkeypatch.setattr(torch_recovery, "ROWS", 7)  # 20 positions in three parts
    model.save_pretrained(tmp_path / "dense")
    dense = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
    with torch.no_grad():
        torch_shrinking.remove(model, dataclasses.replace(config, method="wanda-sp"))
    before = [gone(layer) for layer in model.base_model.layers]
    embedding = model.get_input_embeddings().weight.clone()
    ids = torch.from_numpy(np.load(config.calibration))
    far = divergence(dense, model, ids[:4])
    with torch.no_grad():
        torch_recovery.recover(model, tmp_path / "dense", ids[:4], 40, 3e-3)
    assert divergence(dense, model, ids[:4]) < 0.5 * far
    assert [gone(layer) for layer in model.base_model.layers] == before
    assert torch.equal(model.get_input_embeddings().weight, embedding)


@pytest.mark.parametrize("method", ["wanda-sp", "flap", "from-scratch"])
def test_what_is_written_computes_what_the_zeroed_model_does(tmp_path, method):
    ids = np.random.default_rng(2).integers(0, 61, (6, 20))
    np.save(tmp_path / "ids.npy", ids)
    settings = transformers.LlamaConfig(
        vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(1)
    llama = transformers.LlamaForCausalLM(settings).eval()
    config = torch_shrinking.Config(
        model=tmp_path, method=method, ffn=0.25, calibration=tmp_path / "ids.npy"
    )
    first = next(llama.parameters()).clone()
    with torch.no_grad():
        torch_shrinking.remove(llama, config)
        expected = llama(torch.tensor(ids)).logits
        torch_shrinking.write_smaller(llama, tmp_path, tmp_path / "small")
    small = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "small").eval()
    assert small.config.intermediate_size == 18
    assert torch.equal(next(small.parameters()), first) == (method != "from-scratch")
    with torch.no_grad():
        torch.testing.assert_close(small(torch.tensor(ids)).logits, expected)
