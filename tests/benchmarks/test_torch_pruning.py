"""The benchmark's competitor does what the papers say: a fair comparison needs that."""

import copy
import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from benchmarks import texts, torch_pruning  # noqa: E402 (they import torch)
from benchmarks.cost import Cost  # noqa: E402

pytestmark = pytest.mark.parity

CONFIG = torch_pruning.Config(model=Path(), method="wanda", block=4)


@pytest.fixture
def weight():
    return torch.from_numpy(np.random.default_rng(0).normal(size=(6, 16))).float()


@pytest.fixture
def hessian():
    rng = np.random.default_rng(1)
    inputs = rng.normal(size=(64, 16)) @ rng.normal(size=(16, 16))
    return torch.from_numpy(inputs.T @ inputs)


@pytest.fixture
def model():
    config = transformers.Gemma3TextConfig(
        vocab_size=61,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )
    torch.manual_seed(0)
    return transformers.Gemma3ForCausalLM(config).eval()


@pytest.fixture
def ids():
    return torch.from_numpy(np.random.default_rng(2).integers(0, 61, (4, 20)))


def optimal_brain_surgeon(weight, hessian, keep_block, block):
    """Column by column with the inverse of what is left, in float64."""
    weight = weight.double().clone()
    inverses = [torch.linalg.inv(hessian[i:, i:]) for i in range(len(hessian))]
    keep = torch.ones_like(weight, dtype=torch.bool)
    for i, inverse in enumerate(inverses):
        if i % block == 0:
            some = slice(i, i + block)
            scale = torch.stack([x[0, 0] for x in inverses[some]])
            keep[:, some] = keep_block(weight[:, some] ** 2 / scale)
        error = torch.where(keep[:, i], 0.0, weight[:, i]) / inverse[0, 0]
        weight[:, i:] -= error[:, None] * inverse[0]
    return torch.where(keep, weight, 0.0)


def test_ties_keep_the_first():
    scores = torch.tensor([[1.0, 2.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    expected = [[True, True, False, False]] * 2
    assert torch_pruning.keep_highest(scores, 2).tolist() == expected
    assert torch_pruning.keep_first(scores.T, 2).T.tolist() == expected
    assert not torch_pruning.keep_highest(scores, 0).any()


@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.8])
def test_wanda_keeps_the_highest_of_each_output(weight, hessian, sparsity):
    config = dataclasses.replace(CONFIG, sparsity=sparsity)
    pruned = torch_pruning.wanda(weight, hessian.diagonal().float(), config)
    scores = weight.double().abs() * hessian.diagonal().sqrt()
    for row, row_scores, dense in zip(pruned, scores, weight, strict=True):
        removed = row_scores.argsort()[: round(sparsity * 16)]
        expected = dense.clone()
        expected[removed] = 0
        assert torch.equal(row, expected)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_two_of_each_four_inputs_are_kept(weight, hessian, method):
    config = dataclasses.replace(CONFIG, method=method, pattern="2:4")
    linear = torch.nn.Linear(16, 6, bias=False)
    with torch.no_grad():
        linear.weight.copy_(weight)
        if method == "magnitude":
            pruned = torch_pruning.magnitude(linear.weight, config)
        else:
            hessian = hessian.float()
            total = hessian if method == "sparsegpt" else hessian.diagonal()
            torch_pruning.prune_group([linear], total.clone(), config)
            pruned = linear.weight
    assert ((pruned.reshape(6, 4, 4) != 0).sum(-1) == 2).all()
    with pytest.raises(ValueError, match="inputs divisible by 5, got 16"):
        torch_pruning.keep_of_outputs(
            weight, dataclasses.replace(config, pattern="2:5")
        )


def test_the_factor_squares_to_the_inverse_of_the_damped_hessian(hessian):
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(16)
    factor = torch_pruning.inverse_factor(hessian.float(), 0.01).double()
    assert torch.equal(factor, factor.triu())
    # Float32 against the condition number of the Hessian.
    inverse = torch.linalg.inv(damped)
    torch.testing.assert_close(factor.T @ factor, inverse, rtol=1e-3, atol=1e-8)


@pytest.mark.parametrize(
    ("pattern", "sparsity"), [(None, 0.5), (None, 0.7), ("2:4", 0)]
)
def test_sparsegpt_is_the_optimal_brain_surgeon_column_by_column(
    weight, hessian, pattern, sparsity
):
    block = 4

    def keep_block(scores):
        if pattern:
            return scores.argsort(1, descending=True).argsort(1) < 2
        order = scores.flatten().argsort(descending=True).argsort()
        return (order < scores.numel() - removed.pop(0)).view_as(scores)

    due = [round(sparsity * 6 * x) for x in range(0, 17, block)]
    removed = [after - before for before, after in itertools.pairwise(due)]
    config = dataclasses.replace(
        CONFIG, method="sparsegpt", sparsity=sparsity, pattern=pattern, damping=0.01
    )
    factor = torch_pruning.inverse_factor(hessian.float(), 0.01)
    pruned = torch_pruning.sparsegpt(weight, factor, config)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(16)
    expected = optimal_brain_surgeon(weight, damped, keep_block, block).float()
    assert int((pruned == 0).sum()) == (48 if pattern else round(sparsity * 96))
    torch.testing.assert_close(pruned, expected, rtol=1e-3, atol=1e-4)


def test_every_layer_gets_its_own_arguments(model, ids):
    with torch.no_grad():
        hidden, arguments = torch_pruning.capture(model, ids)
        for layer, kwargs in zip(model.model.layers, arguments, strict=True):
            hidden = layer(hidden, **kwargs)
        expected = model.model(ids).last_hidden_state
        torch.testing.assert_close(model.model.norm(hidden), expected)


def test_layers_with_one_input_share_its_sum(model, ids):
    layer = model.model.layers[0]
    batches = []
    with torch.no_grad():
        hidden, arguments = torch_pruning.capture(model, ids)
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, x: batches.append(x[0]))
        with torch_pruning.input_sums(layer, hessian=True) as sums:
            for batch in hidden.split(2):
                layer(batch, **arguments[0])
    groups = [len(group) for _, group in torch_pruning.by_input(sums)]
    assert groups == [3, 1, 2, 1]  # q k v, o, gate up, down
    inputs = torch.cat(batches).flatten(0, 1).double()
    total = sums[layer.mlp.down_proj].double()
    torch.testing.assert_close(total, inputs.T @ inputs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_a_layer_is_pruned_by_what_the_pruned_ones_before_it_give(
    model, ids, method, tmp_path
):
    np.save(tmp_path / "ids.npy", ids.numpy().astype(np.int32))
    config = dataclasses.replace(
        CONFIG, method=method, calibration=tmp_path / "ids.npy", block=128
    )
    last, batches = model.model.layers[-1], []
    dense = copy.deepcopy(last)
    with torch.no_grad():
        torch_pruning.prune(model, config, Cost())
        pruned = [x.weight for x in torch_pruning.linears(model.model.layers)]
        # The last layer dense again, behind the others as pruned.
        model.model.layers[-1] = dense
        dense.mlp.down_proj.register_forward_pre_hook(lambda _, x: batches.append(x[0]))
        model(ids)
        inputs = batches[0].flatten(0, 1)
        total = inputs.T @ inputs
        total = total if method == "sparsegpt" else total.diagonal()
        torch_pruning.prune_group([dense.mlp.down_proj], total, config)
    torch.testing.assert_close(last.mlp.down_proj.weight, dense.mlp.down_proj.weight)
    assert all(int((x == 0).sum()) == x.numel() // 2 for x in pruned)


def test_perplexity_is_that_of_the_models_own_loss(model, ids):
    with torch.no_grad():
        loss = model(ids, labels=ids).loss
        ours = torch_pruning.perplexity(model, ids, rows=7)
    assert ours == pytest.approx(loss.exp().item(), rel=1e-5)


def test_sequences_share_no_token_and_mixtures_hold_their_shares():
    documents = [" ".join(map(str, range(n, n + 50))) for n in (100, 200, 300)]

    def encode(text):
        return [2, *map(int, text.split())]

    cut = texts.sequences(documents, encode, count=14, length=11)
    assert cut.dtype == np.int32
    assert set(cut[:, 0]) == {2}
    assert len(set(cut[:, 1:].flatten())) == 140
    with pytest.raises(ValueError, match="must give 16 sequences of 11 tokens, got 15"):
        texts.sequences(documents, encode, count=16, length=11)
    pools = {"shakespeare": np.zeros((16, 3)), "technical": np.ones((16, 3))}
    assert texts.mixture(pools, 0.75, 16)[:, 0].sum() == 4
    assert texts.mixture(pools, 1.0, 16)[:, 0].sum() == 0
