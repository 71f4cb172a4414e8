"""How modules are called: names, arguments of several kinds, what is left behind."""

import collections

import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp

torch = pytest.importorskip("torch")
pytest.importorskip("jaxprune.torch.environment")  # torchax
nn = torch.nn
pytestmark = pytest.mark.parity


class Scaled(nn.Module):
    """A layer whose argument is a pair, or a dictionary."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, pair):
        x, scale = pair.values() if isinstance(pair, dict) else pair
        return self.layer(x) * scale


@pytest.mark.parametrize(
    "pair", [(torch.ones(3, 4), 3), {"x": torch.ones(3, 4), "scale": 3}]
)
def test_an_entry_of_tensors_and_others_is_refused(pair):
    with pytest.raises(TypeError, match="tensors alone, or none, but 'pair' has both"):
        jp.torch.function(Scaled(), {"pair": pair})


def test_a_named_tuple_of_tensors_is_an_argument():
    Pair = collections.namedtuple("Pair", ["x", "scale"])
    pair = Pair(torch.ones(3, 4), torch.full((), 3.0))
    fn, params = jp.torch.function(Scaled(), {"pair": pair})
    batch = jp.torch.as_arrays({"pair": pair})
    assert isinstance(batch["pair"], Pair)
    weight, bias = (np.asarray(params[f"layer.{name}"]) for name in ("weight", "bias"))
    expected = 3 * (np.ones((3, 4)) @ weight.T + bias)
    np.testing.assert_allclose(fn(params, batch), expected, 1e-6)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [({"biass": 1.0}, "'biass is unknown'"), ({"bias": None}, "'bias is missing'")],
)
def test_parameters_of_other_names_are_refused(changes, sentence):
    fn, params = jp.torch.function(nn.Linear(4, 2), torch.ones(3, 4))
    changed = {k: v for k, v in (params | changes).items() if v is not None}
    with pytest.raises(ValueError, match=sentence):
        fn(changed, jnp.ones((3, 4)))


class Remembering(nn.Module):
    """Keeps what it computes in an attribute."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x):
        self.hidden = self.up(x).relu()
        return self.down(self.hidden)


def test_what_a_module_keeps_of_a_call_is_not_left_behind():
    module, x = Remembering(), torch.ones(3, 4)
    jp.torch.function(module, x)
    assert not hasattr(module, "hidden")
    small = jp.torch.shrink(module, x, jp.scores.magnitude, 0.5).module
    assert small(x).shape == (3, 2)
    assert small.hidden.shape == (3, 4)


@pytest.mark.parametrize(
    "layer",
    [
        nn.ConvTranspose2d(4, 6, 3, groups=2),
        nn.ConvTranspose2d(6, 6, 3, groups=6, stride=2, dilation=2),
        nn.ConvTranspose1d(4, 6, 3, groups=2, stride=2, padding=1, output_padding=1),
        nn.AvgPool2d(3, 2, ceil_mode=True),
        nn.AvgPool2d(2, ceil_mode=True),
        nn.AvgPool2d(5, 3, 2, ceil_mode=True),
        nn.AvgPool2d((3, 2), ceil_mode=True, count_include_pad=False, padding=1),
        nn.AvgPool1d(3, 3, 1, ceil_mode=True),
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [9, 10])
def test_layers_that_torchax_gets_wrong_are_those_of_torch(layer, size):
    channels = getattr(layer, "in_channels", 3)
    x = torch.randn(2, channels, *([size] * (1 if "1d" in str(layer) else 2)))
    fn, params = jp.torch.function(layer, x)
    result = fn(params, jp.torch.as_arrays(x))
    np.testing.assert_allclose(result, layer(x).detach().numpy(), 1e-5, 1e-5)
