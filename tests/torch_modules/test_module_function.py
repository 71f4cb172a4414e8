"""Torch's own forward pass is the oracle of the function that JAX runs.

The folder is not called `torch`: beside `tests/conftest.py` it would be importable as
such where torch is not installed.
"""

import importlib
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp

torch = pytest.importorskip("torch")
pytest.importorskip("jaxprune.torch.environment")  # torchax
nn = torch.nn
pytestmark = pytest.mark.parity

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = (ROOT / "docs" / "reference" / "torch.md").read_text()


def normed_mlp():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3)
    )


def in_torch(module, *args, **kwargs):
    training = module.training
    module.eval()
    with torch.no_grad():
        result = module(*args, **kwargs)
    module.train(training)
    return result


def test_the_function_gives_what_the_module_gives_in_eval_mode():
    module = normed_mlp()
    module(torch.randn(32, 6))  # statistics of the batch norm
    fn, params = jp.torch.function(module, torch.randn(2, 6))
    x = torch.randn(5, 6)  # of another size than the example
    result = jax.jit(fn)(params, jp.torch.as_arrays(x))
    np.testing.assert_allclose(result, in_torch(module, x).numpy(), atol=1e-6)


def test_the_module_is_left_in_the_mode_that_each_part_was_in():
    module = normed_mlp()
    module[1].eval()
    fn, params = jp.torch.function(module, torch.randn(2, 6))
    fn(params, jnp.ones((2, 6)))
    modes = [part.training for part in module]
    assert modes == [True, False, True, True, True]
    assert module.training


def test_the_function_reads_parameters_and_not_the_module():
    module = normed_mlp()
    x = torch.randn(4, 6)
    before = in_torch(module, x).numpy()
    fn, params = jp.torch.function(module, x)
    with torch.no_grad():
        for tensor in [*module.parameters(), *module.buffers()]:
            tensor.zero_()
    result = fn(params, jp.torch.as_arrays(x))
    np.testing.assert_allclose(result, before, atol=1e-6)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.inner = nn.Linear(4, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens, *, scale=None, double=False):
        x = self.inner(self.embed(tokens))
        x = x if scale is None else x * scale
        return {"logits": self.head(x) * (2 if double else 1), "pair": (x, None)}


def test_a_tied_weight_is_one_parameter():
    module = Tied()
    fn, params = jp.torch.function(module, torch.tensor([[1, 2]]))
    assert set(params) == {"embed.weight", "inner.weight", "inner.bias"}
    other = {**params, "embed.weight": 2 * params["embed.weight"]}
    tokens = jnp.array([[3, 1, 6]])
    # The embedding and the head are both doubled.
    bias_free = {**other, "inner.bias": 0 * params["inner.bias"]}
    plain = {**params, "inner.bias": 0 * params["inner.bias"]}
    ratio = fn(bias_free, tokens)["logits"] / fn(plain, tokens)["logits"]
    np.testing.assert_allclose(ratio, 4, rtol=1e-4)


def test_arguments_by_name_keep_settings_and_results_keep_containers():
    module = Tied()
    example = {"tokens": torch.tensor([[1, 2]]), "scale": torch.tensor(3.0)}
    fn, params = jp.torch.function(module, {**example, "double": True})
    batch = jp.torch.as_arrays({**example, "double": True})
    assert set(batch) == {"tokens", "scale"}
    result = fn(params, batch)
    expected = in_torch(module, **example, double=True)
    assert result["pair"][1] is None
    for name in ("logits", "pair"):
        torch_leaf = jax.tree.leaves(jp.torch.as_arrays(expected[name]))[0]
        leaf = jax.tree.leaves(result[name])[0]
        np.testing.assert_allclose(leaf, torch_leaf, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes_are_kept_bit_by_bit(dtype):
    module = nn.Linear(5, 3).to(dtype)
    fn, params = jp.torch.function(module, torch.randn(2, 5, dtype=dtype))
    assert str(params["weight"].dtype) == str(dtype).removeprefix("torch.")
    np.testing.assert_array_equal(
        params["weight"].astype(jnp.float32), module.weight.detach().float().numpy()
    )
    assert (
        fn(params, jnp.ones((2, 5), params["weight"].dtype)).dtype
        == params["weight"].dtype
    )


def test_a_tensor_that_the_module_makes_on_the_cpu_is_a_constant():
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.shift = torch.ones(1, 4)  # no buffer
            self.out = nn.Linear(4, 2)

        def forward(self, x):
            return self.out(x + torch.arange(4) + self.shift)

    module, x = Positions(), torch.randn(3, 4)
    fn, params = jp.torch.function(module, x)
    result = fn(params, jp.torch.as_arrays(x))
    np.testing.assert_allclose(result, in_torch(module, x).numpy(), atol=1e-6)


@pytest.mark.full
def test_it_works_with_trace_and_pruning_and_shrinking():
    module = normed_mlp()
    x = torch.randn(64, 6)
    fn, params = jp.torch.function(module, x)
    batch = jp.torch.as_arrays(x)
    assert [op.name for op in jp.trace(fn, params, batch).linear_ops] == [
        "0.weight",
        "4.weight",
    ]
    pruned = jp.prune_trained(fn, params, [batch], "sparsegpt", sparsity=0.5)
    assert {name: float((w == 0).mean()) for name, w in pruned.params.items()} == {
        "0.bias": 0,
        "0.weight": 0.5,
        "1.bias": 1,  # of a new batch norm
        "1.weight": 0,
        "4.bias": 0,
        "4.weight": 0.5,
    }
    small = jp.shrink(fn, params, [batch], jp.scores.magnitude, 0.75)
    assert small.params["1.bias"].shape == (6,)


def test_kinds_of_groups_put_stars_for_the_numbers_of_layers():
    layers = [nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))] * 1
    layers += [nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))]
    fn, params = jp.torch.function(nn.Sequential(*layers), torch.ones(2, 4))
    groups = jp.axis_groups(fn, params, jnp.ones((2, 4)))
    kinds = {group.name: group.kind for group in groups}
    assert kinds["0.0.bias:0"] == kinds["1.0.bias:0"] == "*.*.bias:0"


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.ModuleDict({"gate": Gate()})

    def forward(self, x):
        return self.inner["gate"](x)


class Gate(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


class Airy(nn.Module):
    def forward(self, x):
        return torch.special.airy_ai(x)


class InPlace(nn.Module):
    def forward(self, x):
        table = torch.zeros(2, 6)
        table.add_(x)
        return table


@pytest.mark.parametrize(
    ("module", "sentence"),
    [
        (Branching(), "must not depend on values, but .* in 'inner.gate' reads one"),
        (Airy(), "every operation of a module must be one that torchax has"),
        (InPlace(), "must not write into a tensor that it made on the CPU"),
    ],
)
def test_what_cannot_be_traced_is_refused_with_operation_and_part(module, sentence):
    module = nn.Sequential(nn.Identity(), module)
    with pytest.raises(TypeError, match=sentence.replace("'inner", "'1.inner")):
        jp.torch.function(module, torch.ones(2, 6))
    assert not module._forward_hooks


@pytest.mark.parametrize(
    ("module", "example", "error", "sentence"),
    [
        (len, torch.ones(2), TypeError, "takes a torch.nn.Module, got"),
        (nn.Linear(2, 2), (torch.ones(2), True), TypeError, "must hold tensors alone"),
        (nn.Linear(2, 2).double(), torch.ones(2), ValueError, "'weight', 'bias' have"),
        (nn.Linear(2, 2, device="meta"), torch.ones(2), ValueError, "must have values"),
        (
            nn.Linear(2, 2).bfloat16(),
            torch.ones(2),
            TypeError,
            "must run in torch on the example, .* dtype.*; give what module",
        ),
        (
            nn.Linear(2, 2),
            torch.ones(3, 4),
            TypeError,
            "must run in torch on the example, .*cannot be multiplied",
        ),
    ],
)
def test_bad_arguments_are_refused(module, example, error, sentence):
    with pytest.raises(error, match=sentence):
        jp.torch.function(module, example)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize(
    "record",
    [
        torch.jit.script,
        lambda module: torch.jit.trace(module, torch.ones(2, 6)),
        lambda module: nn.Sequential(torch.jit.script(module)),
        pytest.param(
            lambda module: torch.export.export(module, (torch.ones(2, 6),)),
            marks=pytest.mark.full,
        ),
        pytest.param(
            lambda module: torch.export.export(module, (torch.ones(2, 6),)).module(),
            marks=pytest.mark.full,
        ),
    ],
)
def test_a_recorded_program_is_refused(record):
    sentence = "must consist of its layers, .* recorded .*; give the module that it was"
    with pytest.raises(TypeError, match=sentence):
        jp.torch.function(record(nn.Linear(6, 3)), torch.ones(2, 6))


@pytest.mark.full
def test_a_compiled_module_is_a_function_and_runs_in_torch_as_before():
    module = torch.compile(nn.Linear(6, 3), backend="eager")
    x = torch.randn(2, 6)
    fn, params = jp.torch.function(module, x)
    with torch.no_grad():
        expected = module(x).numpy()
    result = fn(params, jp.torch.as_arrays(x))
    np.testing.assert_allclose(result, expected, atol=1e-6)


def test_torch_has_no_device_more_than_before():
    jp.torch.function(nn.Linear(6, 3), torch.ones(2, 6))
    # It looks for accelerators when it is made.
    assert nn.DataParallel(nn.Linear(6, 3))(torch.ones(2, 6)).shape == (2, 3)


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("last", [False, True])
def test_bags_of_embeddings_are_those_of_torch(mode, last):
    torch.manual_seed(0)
    module = nn.EmbeddingBag(9, 4, mode=mode, include_last_offset=last, padding_idx=2)
    # The second bag is empty, the third has padding alone.
    offsets = [0, 3, 3, 4] + [7] * last
    example = {
        "input": torch.tensor([1, 2, 5, 2, 8, 1, 1]),
        "offsets": torch.tensor(offsets),
    }
    if mode == "sum":
        example["per_sample_weights"] = torch.randn(7)
    fn, params = jp.torch.function(module, example)
    result = jax.jit(fn)(params, jp.torch.as_arrays(example))
    expected = in_torch(module, **example).numpy()
    np.testing.assert_allclose(result, expected, atol=1e-6)
    rows = torch.tensor([[1, 2, 5], [8, 8, 3]])
    plain = nn.EmbeddingBag(9, 4, mode=mode)
    fn, params = jp.torch.function(plain, rows)
    result = fn(params, jp.torch.as_arrays(rows))
    np.testing.assert_allclose(result, in_torch(plain, rows).numpy(), atol=1e-6)


def test_bags_in_half_precision_are_added_up_in_float32_as_by_torch():
    torch.manual_seed(0)
    module = nn.EmbeddingBag(9, 4, mode="sum").bfloat16()
    rows = torch.randint(0, 9, (2, 300))
    fn, params = jp.torch.function(module, rows)
    result = np.asarray(fn(params, jp.torch.as_arrays(rows)), np.float32)
    expected = in_torch(module, rows).float().numpy()
    np.testing.assert_allclose(result, expected, rtol=2**-7)


class _Autocasting(nn.Linear):
    """Turns autocast off on whatever device it runs, as transformers' norms do."""

    def forward(self, x):
        with torch.autocast(device_type=x.device.type, enabled=False):
            return super().forward(x)


def test_a_module_may_ask_autocast_of_the_device_that_it_runs_on():
    module, x = _Autocasting(4, 3), torch.ones(2, 4)
    fn, params = jp.torch.function(module, x)
    result = fn(params, jp.torch.as_arrays(x))
    np.testing.assert_allclose(result, in_torch(module, x).numpy(), atol=1e-6)
    assert not hasattr(torch, "privateuseone")


def test_the_namespace_shows_what_is_meant_and_all_of_it_is_documented():
    assert dir(jp.torch) == sorted(jp.torch.__all__)
    for public in jp.torch.__all__:
        value = getattr(jp.torch, public)
        assert value.__doc__
        assert f"::: {value.__module__}.{public}\n" in REFERENCE
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        jp.torch.nothing  # noqa: B018


@pytest.mark.full
def test_a_package_that_is_missing_is_said_with_what_to_install():
    program = (
        "import sys; sys.modules['torchax'] = None\n"
        "import jaxprune as jp\n"
        "assert 'torch' not in sys.modules\n"
        "try:\n    jp.torch.function\n"
        "except ImportError as error:\n    print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout.strip().endswith(
        "needs the package 'torchax', which is not installed; pip install '.[torch]'"
    )


def test_importing_torchax_leaves_the_settings_of_the_process():
    importlib.import_module("jaxprune.torch.environment")
    assert torch.backends.mha.get_fastpath_enabled()


def test_experts_whose_rows_lie_side_by_side_are_seen_as_matmuls():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Parameter(torch.randn(3, 4, 6))

        def forward(self, x):
            ends = torch.tensor([2, 2, 5], dtype=torch.int32, device=x.device)
            return torch._grouped_mm(x, self.up, offs=ends)

    module, x = Experts(), torch.randn(5, 4)
    fn, params = jp.torch.function(module, x)
    batch = jp.torch.as_arrays(x)
    up = module.up.detach().numpy()
    expected = np.concatenate([x[:2].numpy() @ up[0], x[2:].numpy() @ up[2]])
    np.testing.assert_allclose(fn(params, batch), expected, atol=1e-5)
    assert [op.name for op in jp.trace(fn, params, batch).linear_ops] == ["up"]
