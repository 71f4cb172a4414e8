"""Groups of real layers: convolutions, normalisation, ViTs, GPTs, every decoder family.

Everywhere the oracle is the same: zeroing the weights of units removes them.
"""

import functools

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxprune as jp
from experiments import gpt
from experiments.gpt.config import GPTConfig
from experiments.phi3_vision.tower import ClipConfig, ClipTower
from jaxprune.lm.models import hf
from jaxprune.lm.models.decoder.model import Decoder
from tests.support import tiny_hf
from tests.support.removal import check, check_alone, check_each_kind, row
from tests.support.small_models import draw, filled
from tests.support.traced import divided

pytestmark = pytest.mark.jax_api

IMAGES = draw(0, 2, 8, 8, 3)


def of_numpy(abstract):
    """Numbers whose cutting compiles nothing."""
    return jax.tree.map(np.asarray, filled(abstract))


def initial(model, x):
    """Parameters of a Linen model, statistics positive as they must be."""
    made = of_numpy(jax.eval_shape(model.init, jax.random.key(0), x))
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: np.abs(leaf) if "var" in str(path[-1]) else leaf, made
    )


def split(make):
    """A function of an NNX model's state and a batch, and the state."""
    graphdef, state = nnx.split(nnx.eval_shape(make), nnx.Param)
    return (lambda state, x: nnx.merge(graphdef, state)(x)), of_numpy(state)


# Convolutions.


class Convolutions(nn.Module):
    """Plain, depthwise, grouped and strided ones, with norms between, and a head."""

    @nn.compact
    def __call__(self, x):
        norm = functools.partial(nn.BatchNorm, use_running_average=True)
        x = nn.relu(norm()(nn.Conv(8, (3, 3))(x)))
        x = nn.Conv(8, (3, 3), feature_group_count=8, name="depthwise")(x)
        x = nn.silu(norm()(nn.Conv(6, (1, 1), name="pointwise")(x)))
        x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = nn.relu(nn.Conv(8, (3, 3), strides=2, name="strided")(x))
        x = nn.avg_pool(x, (2, 2))
        x = x.reshape(x.shape[0], -1)
        return nn.Dense(5, name="head")(x)


def test_channels_go_through_depthwise_kernels_norms_pools_and_flattening():
    model = Convolutions()
    groups, result = check_each_kind(model.apply, initial(model, IMAGES), IMAGES)
    default = {g.name: g.units for g in groups if g.default}
    assert sorted(default.values()) == [6, 8, 8]
    kernels = result.params["params"]
    assert kernels["depthwise"]["kernel"].shape == (3, 3, 1, 4)
    assert kernels["pointwise"]["kernel"].shape == (1, 1, 4, 3)
    assert kernels["strided"]["kernel"].shape == (3, 3, 3, 4)
    assert kernels["head"]["kernel"].shape == (4, 5)


class Grouped(nn.Module):
    """Two groups of channels, each of which sees its own half."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (1, 1))(x))
        x = nn.relu(nn.Conv(12, (3, 3), feature_group_count=4, name="grouped")(x))
        return nn.Dense(2)(x.mean((1, 2)))


def test_the_groups_of_a_convolution_are_units():
    model = Grouped()
    groups, result = check_each_kind(model.apply, initial(model, IMAGES), IMAGES)
    assert [g.units for g in groups if g.default] == [4]
    assert result.params["params"]["grouped"]["kernel"].shape == (3, 3, 2, 6)


class Residual(nn.Module):
    """A block of a residual network, and group normalisation."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3, 3), name="stem")(x)
        y = nn.relu(nn.GroupNorm(num_groups=4)(nn.Conv(8, (3, 3))(x)))
        x = x + nn.Conv(8, (3, 3), name="back")(y)
        return nn.Dense(2)(x.mean((1, 2)))


def test_groups_of_a_norm_go_whole_and_the_residual_is_left_alone():
    model = Residual()
    groups, result = check_each_kind(model.apply, initial(model, IMAGES), IMAGES)
    assert [g.units for g in groups if g.default] == [4]
    assert result.params["params"]["back"]["kernel"].shape == (3, 3, 4, 8)
    (residual,) = (g for g in groups if "residual" in g.why)
    assert residual.units == 8


@pytest.mark.full
def test_an_equinox_network_is_cut():
    class Net(eqx.Module):
        conv: eqx.nn.Conv2d
        mlp: eqx.nn.MLP

        def __init__(self, key):
            self.conv = eqx.nn.Conv2d(3, 6, 3, key=key)
            self.mlp = eqx.nn.MLP(6, 4, 8, 2, key=key)

        def __call__(self, x):
            return self.mlp(jax.nn.relu(self.conv(x)).mean((1, 2)))

    params, static = divided(Net)
    params = jax.tree.map(np.asarray, params)

    def fn(params, images):
        return jax.vmap(eqx.combine(params, static))(images.transpose(0, 3, 1, 2))

    groups, result = check_each_kind(fn, params, IMAGES)
    assert sorted(g.units for g in groups if g.default) == [6, 8, 8]
    assert result.params.conv.weight.shape == (3, 3, 3, 3)
    assert result.params.mlp.layers[1].weight.shape == (4, 4)


# Transformers.


class Layer(nn.Module):
    """Attention and an MLP."""

    @nn.compact
    def __call__(self, x, _=None):
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=2, name="attention")(y)
        y = nn.Dense(6, name="up")(nn.LayerNorm()(x))
        return x + nn.Dense(8, name="down")(nn.gelu(y)), None


class VisionTransformer(nn.Module):
    """Patches, a class token, two layers in a scan, the class token's state."""

    stacked: int = 0

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (4, 4), strides=4)(x).reshape(x.shape[0], -1, 8)
        first = self.param("class", nn.initializers.normal(), (1, 1, 8))
        x = jnp.concatenate([jnp.broadcast_to(first, (x.shape[0], 1, 8)), x], 1)
        x = x + self.param("place", nn.initializers.normal(), (1, 5, 8))
        layers = nn.scan(
            nn.remat(Layer, prevent_cse=False),
            variable_axes={"params": self.stacked},
            split_rngs={"params": True},
            length=2,
        )
        x, _ = layers(name="layers")(x, None)
        return nn.Dense(3)(nn.LayerNorm()(x)[:, 0])


@pytest.mark.parametrize("stacked", [pytest.param(0, marks=pytest.mark.full), 1])
def test_layers_of_a_scanned_vision_transformer_choose_their_own(stacked):
    model = VisionTransformer(stacked)
    params = initial(model, IMAGES)
    groups, result = check(model.apply, params, IMAGES, 0.5)
    kinds = {k for k, own in groups.kinds().items() if own[0].default}
    assert len(kinds) == 2
    assert {row(groups, kind)[:2] for kind in kinds} == {(2, 2), (2, 6)}
    kernel = result.params["params"]["layers"]["up"]["kernel"]
    assert sorted(kernel.shape) == [2, 3, 8]
    (width,) = (group for group in groups if "residual" in group.why)
    assert width.units == 8


@pytest.mark.full
def test_every_removable_kind_of_a_scanned_vision_transformer():
    """The width too: Linen's norms take E[x^2] - E[x]^2, sums of what is zero."""
    model = VisionTransformer(1)
    groups = check_alone(model.apply, initial(model, IMAGES), IMAGES)
    (width,) = (group for group in groups if "residual" in group.why)
    assert width.removable


def test_the_gpt_of_the_experiments():
    config = GPTConfig(
        vocab_size=17, context=12, layers=2, heads=4, width=16, bias=True, gelu="tanh"
    )
    fn, params = split(lambda: gpt.GPT(config, rngs=nnx.Rngs(0)))
    ids = draw(3, 2, 8).argsort().astype(np.int32)
    groups, _ = check(fn, params, ids, 0.5)
    assert row(groups, "blocks/*/mlp/down/kernel:0") == (2, 64, True, True)
    assert row(groups, "blocks/*/attention/out/kernel:0.0") == (2, 4, True, True)


def test_the_groups_of_a_vision_tower():
    config = ClipConfig(image=8, patch=4, layers=2, width=8, heads=2, mlp_width=12)
    fn, params = split(lambda: ClipTower(config, rngs=nnx.Rngs(0)))
    groups, _ = check(fn, params, IMAGES, 0.5)
    kinds = groups.kinds().values()
    default = [(len(own), own[0].units) for own in kinds if own[0].default]
    assert sorted(default) == [(2, 2), (2, 12)]


# Our decoders.


@functools.cache
def decoder(name):
    """A family's function and random parameters."""
    config = hf.decoder_config(tiny_hf.config_json(name))
    fn, state = split(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    return config, fn, state


FIRST = ("gpt2", "gemma3")
# They differ from another one in numbers alone, of rope or windows: no axis moves.
ALIKE = {
    *("llama-linear", "llama-dynamic", "llama-long", "llama-yarn", "qwen3-yarn"),
    *("mistral-full", "qwen2-full", "phi3-long", "phi3-yarn", "gemma3-linear"),
    *("gemma2-plain", "olmo2-odd", "smollm3-sliding", "granite-odd", "opt-plain"),
    "starcoder2-odd",
}


@pytest.mark.parametrize(
    "name",
    [
        name if name in FIRST else pytest.param(name, marks=pytest.mark.full)
        for name in tiny_hf.CONFIGS
        if name not in ALIKE
    ],
)
def test_neurons_and_heads_of_every_family(name):
    config, fn, params = decoder(name)
    ids = tiny_hf.tokens(1, 9)
    groups, result = check(fn, params, ids, 0.5)
    neurons = row(groups, "layers/*/mlp/down/kernel:0")
    assert neurons == (config.layers, config.mlp_width, True, True)
    heads = [
        own
        for kind, own in groups.kinds().items()
        if "attention" in kind and own[0].default
    ]
    count = config.kv_heads if config.kv_heads > 1 else config.heads
    assert [(len(own), own[0].units) for own in heads] == [(config.layers, count)]
    small = hf.resized(config, result.params)
    assert small.mlp_width == config.mlp_width // 2
    left = count - round(0.5 * count)  # key heads, or queries where they share one
    assert small.heads == config.heads // count * left


@pytest.mark.full
@pytest.mark.parametrize("name", FIRST)
def test_every_removable_kind_of_a_family(name):
    _, fn, params = decoder(name)
    groups = check_alone(fn, params, tiny_hf.tokens(1, 9))
    assert sum(own[0].removable for own in groups.kinds().values()) >= 4


def test_the_table_has_a_line_a_kind():
    _, fn, params = decoder("llama")
    text = str(jp.axis_groups(fn, params, tiny_hf.tokens(1, 9)))
    lines = {line.split()[0]: line for line in text.splitlines()}
    assert lines["layers/*/mlp/down/kernel:0"].split()[1:] == [
        *("2", "x", "48"),
        "9,216",
        "3",
        "yes",
    ]
    assert "no: is indexed by data" in lines["embedding/embedding:0"]
    assert "if asked: it is the width of a residual" in lines["embedding/embedding:1"]
