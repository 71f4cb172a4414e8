"""Parameters go back to where they came from, all of them or none."""

import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp

torch = pytest.importorskip("torch")
pytest.importorskip("jaxprune.torch.environment")  # torchax
nn = torch.nn
pytestmark = pytest.mark.parity


def tied():
    module = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4, bias=False)})
    module["b"].weight = module["a"].weight
    module["c"] = nn.Linear(4, 2).to(torch.bfloat16)
    return module


def parameters_of(module):
    return {name: jp.torch.as_arrays(p) for name, p in module.named_parameters()}


def test_values_are_written_in_place_with_dtypes_and_ties():
    module = tied()
    pointers = {name: p.data_ptr() for name, p in module.named_parameters()}
    params = {name: 2 * value for name, value in parameters_of(module).items()}
    jp.torch.load(module, params)
    assert {n: p.data_ptr() for n, p in module.named_parameters()} == pointers
    assert module["b"].weight is module["a"].weight
    assert module["c"].weight.dtype is torch.bfloat16
    for name, value in parameters_of(module).items():
        np.testing.assert_array_equal(value, params[name])


def test_values_of_another_dtype_are_rounded_to_that_of_the_module():
    module = tied()
    params = parameters_of(module)
    jp.torch.load(module, {**params, "c.bias": jnp.array([1.001, 2.0])})
    assert module["c"].bias.tolist() == [1.0, 2.0]


def test_all_that_differs_is_named_and_nothing_is_written():
    module = tied()
    before = {name: p.clone() for name, p in module.named_parameters()}
    params = {name: 0 * value for name, value in parameters_of(module).items()}
    del params["a.bias"]
    params |= {"d": jnp.ones(2), "c.weight": jnp.ones((4, 2))}
    with pytest.raises(ValueError, match="bias is missing") as caught:
        jp.torch.load(module, params)
    assert "'a.bias is missing', 'd is no parameter', " in str(caught.value)
    assert "c.weight (4, 2) for (2, 4)" in str(caught.value)
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, before[name])


def test_a_dtype_that_torch_has_not_is_named_and_nothing_is_written():
    module = nn.Linear(4, 2)
    before = module.weight.clone()
    params = {"weight": jnp.zeros((2, 4)), "bias": jnp.zeros(2, "float8_e4m3b11fnuz")}
    with pytest.raises(ValueError, match="bias is float8_e4m3b11fnuz, which torch has"):
        jp.torch.load(module, params)
    assert torch.equal(module.weight, before)
