"""Zeros stay zeros while torch trains, whatever the optimizer remembers."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp

torch = pytest.importorskip("torch")
pytest.importorskip("jaxprune.torch.environment")  # torchax
nn = torch.nn
pytestmark = pytest.mark.parity


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def masks_of(module, sparsity=0.5):
    _, params = jp.torch.function(module, torch.ones(2, 6))
    return jp.masks.make(jp.scores.magnitude(params), sparsity)


def train(module, optimizer, steps=5):
    torch.manual_seed(1)
    for _ in range(steps):
        optimizer.zero_grad()
        module(torch.randn(16, 6)).square().mean().backward()
        optimizer.step()


def zeros(module):
    return {n: (p == 0).numpy() for n, p in module.named_parameters() if p.ndim > 1}


def pruned(masks):
    return {n: ~np.asarray(m) for n, m in masks.items() if hasattr(m, "shape")}


@pytest.mark.parametrize("trained_before", [False, True])
def test_zeros_hold_through_steps_of_adamw(trained_before):
    module = network()
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.05, weight_decay=0.1)
    if trained_before:  # then the moments of what is pruned are not zero
        train(module, optimizer)
    masks = masks_of(module)
    names = list(module.state_dict())
    before = module[0].weight.clone()
    with jp.torch.hold(module, masks):
        train(module, optimizer)
        np.testing.assert_equal(zeros(module), pruned(masks))
    assert list(module.state_dict()) == names
    kept = torch.tensor(np.asarray(masks["0.weight"]))
    assert not torch.equal(before[kept], module[0].weight[kept])


def test_what_is_let_go_trains_again():
    module = network()
    masks = masks_of(module)
    held = jp.torch.hold(module, masks)
    held.remove()
    train(module, torch.optim.SGD(module.parameters(), lr=0.1))
    assert not any(mask.any() for mask in zeros(module).values())


def test_gradients_that_are_not_finite_leave_no_trace_on_pruned_weights():
    module = network()
    masks = masks_of(module)
    with jp.torch.hold(module, masks):
        (module(torch.randn(4, 6)).sum() * float("inf")).backward()
    gone = torch.tensor(pruned(masks)["0.weight"])
    assert (module[0].weight.grad[gone] == 0).all()


def test_a_tied_weight_is_held_once_and_a_leaf_left_out_is_not():
    module = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4, bias=False)})
    module["b"].weight = module["a"].weight
    mask = np.eye(4, dtype=bool)
    masks = {"a.weight": jnp.array(mask), "a.bias": optax.MaskedNode()}
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    with jp.torch.hold(module, masks):
        for _ in range(2):
            x = module["b"](module["a"](torch.ones(2, 4)))
            x.square().sum().backward()
            optimizer.step()
    np.testing.assert_array_equal((module["b"].weight != 0).numpy(), mask)


def test_masks_that_do_not_fit_are_named_together():
    module = network()
    masks = {"0.weight": jnp.ones((8, 5), bool), "9": jnp.ones(2, bool)}
    masks["2.bias"] = jnp.ones(3)
    with pytest.raises(ValueError, match="9 is no parameter") as caught:
        jp.torch.hold(module, masks)
    assert "2.bias is not boolean" in str(caught.value)
    assert "0.weight (8, 5) for (8, 6)" in str(caught.value)


@pytest.mark.full
def test_zeros_hold_in_transformers_own_trainer(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=16,
    )  # fmt: skip
    model = transformers.BertForMaskedLM(config)
    tokens = torch.randint(0, 50, (32, 8))
    _, params = jp.torch.function(model, {"input_ids": tokens})
    masks = jp.masks.make(jp.scores.magnitude(params), 0.5)
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), num_train_epochs=2, per_device_train_batch_size=8,
        report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    with jp.torch.hold(model, masks):
        transformers.Trainer(model, arguments, train_dataset=rows).train()
    trained = dict(model.named_parameters())
    for name, gone in pruned(masks).items():
        np.testing.assert_array_equal((trained[name] == 0).numpy(), gone)
    model.save_pretrained(tmp_path / "model")
    reloaded = transformers.BertForMaskedLM.from_pretrained(tmp_path / "model")
    first = next(iter(pruned(masks)))
    assert (dict(reloaded.named_parameters())[first] == 0).sum() == pruned(masks)[
        first
    ].sum()


def test_zeros_hold_in_parameters_that_took_the_place_of_others():
    module = network()
    masks = masks_of(module)
    with jp.torch.hold(module, masks):
        state = {name: torch.ones_like(p) for name, p in module.state_dict().items()}
        module.load_state_dict(state, assign=True)
        train(module, torch.optim.Adam(module.parameters(), lr=0.05))
        np.testing.assert_equal(zeros(module), pruned(masks))
        assert not module[0].weight.grad[torch.tensor(pruned(masks)["0.weight"])].any()


def test_zeros_hold_where_gradients_have_some_rows_alone():
    table, mask = nn.Embedding(5, 3, sparse=True), np.eye(5, 3, dtype=bool)
    optimizer = torch.optim.SparseAdam(table.parameters(), lr=0.1)
    with jp.torch.hold(table, {"weight": mask}):
        table(torch.tensor([0, 1, 1])).sum().backward()
        gradient = table.weight.grad.to_dense().numpy()
        np.testing.assert_array_equal(gradient, mask * [[1], [2], [0], [0], [0]])
        optimizer.step()
    np.testing.assert_array_equal(table.weight.detach().numpy() == 0, ~mask)


def test_none_leaves_a_parameter_alone():
    module = torch.nn.Linear(4, 3)
    masks = {"weight": np.zeros((3, 4), bool), "bias": None}
    with jp.torch.hold(module, masks):
        assert not module.weight.any()
        assert module.bias.any()


def test_tensors_in_the_place_of_arrays_are_told_the_way():
    module, x = torch.nn.Linear(4, 3), torch.ones(2, 4)
    fn, params = jp.torch.function(module, x)
    with pytest.raises(TypeError, match=r"write jp.torch.as_arrays\(batch\)"):
        jp.prune_trained(fn, params, [x], "wanda", sparsity=0.5)
    with pytest.raises(TypeError, match=r"from jp.torch.function\(module, batch\)"):
        jp.scores.magnitude(dict(module.named_parameters()))
