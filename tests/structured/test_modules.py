"""A shrunk function as a module again: the classes, sizes and outputs that it has."""

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax import nnx

import jaxprune as jp
from jaxprune.structured.output_difference import relative_difference
from tests.support.small_models import draw
from tests.support.small_models import quick_compilation as quick_compilation

X = draw(0, 3, 5, 8)  # (batch, positions, width)


class Block(nnx.Module):
    """Attention, whose heads its own class counts, and an MLP; `depth` is no size."""

    def __init__(self, rngs):
        self.heads, self.depth = 4, 4
        self.qkv = nnx.Linear(8, 3 * 16, rngs=rngs)
        self.out = nnx.LinearGeneral((4, 4), 8, axis=(-2, -1), rngs=rngs)
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.up = nnx.Linear(8, 12, rngs=rngs)
        self.down = nnx.Linear(12, 8, rngs=rngs)

    def __call__(self, x):
        qkv = self.qkv(self.norm(x)).reshape(*x.shape[:2], 3, self.heads, -1)
        query, key, value = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        x = x + self.out(jax.nn.dot_product_attention(query, key, value))
        return x + self.down(nnx.relu(self.up(x)))


class Picture(nnx.Module):
    """Convolutions, one of them depthwise, with statistics of a batch norm."""

    def __init__(self, rngs):
        self.first = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(8, use_running_average=True, rngs=rngs)
        self.depthwise = nnx.Conv(8, 8, (3, 3), feature_group_count=8, rngs=rngs)
        self.last = nnx.Conv(8, 2, (1, 1), rngs=rngs)

    def __call__(self, x):
        return self.last(self.depthwise(nnx.relu(self.norm(self.first(x)))))


def shrunk(model, batch):
    """The result of halving all units of an NNX module."""
    graphdef, params = nnx.split(model)

    def fn(params, x):
        return nnx.merge(graphdef, params)(x)

    return jp.shrink(fn, params, [batch], jp.scores.magnitude, 0.5)


def assert_computes_the_same(module, result, batch):
    np.testing.assert_allclose(
        module(batch), result.fn(result.params, batch), atol=1e-5, rtol=1e-5
    )


@pytest.mark.full
def test_an_nnx_module_has_the_smaller_sizes_and_the_model_keeps_its_own():
    model = Block(nnx.Rngs(0))
    result = shrunk(model, X)
    small = result.module(model, X)
    assert_computes_the_same(small, result, X[:2])
    assert (small.heads, small.depth, small.out.in_features) == (2, 4, (2, 4))
    assert (small.up.out_features, small.down.in_features) == (6, 6)
    assert (model.heads, model.up.out_features) == (4, 12)


@pytest.mark.full
def test_convolutions_and_batch_norms_are_cut_with_their_groups():
    model, batch = Picture(nnx.Rngs(0)), draw(1, 2, 6, 6, 3)
    small = (result := shrunk(model, batch)).module(model, batch)
    assert_computes_the_same(small, result, batch)
    assert small.depthwise.feature_group_count == small.norm.num_features == 4
    assert small.depthwise.kernel_shape == small.depthwise.kernel.shape


def test_flax_attention_loses_heads():
    attention = nnx.MultiHeadAttention(4, 8, 16, decode=False, rngs=nnx.Rngs(0))
    small = (result := shrunk(attention, X)).module(attention, X)
    assert_computes_the_same(small, result, X)
    assert (small.num_heads, small.qkv_features) == (2, 8)


@pytest.mark.full
def test_running_averages_are_those_of_the_result_though_the_module_was_called():
    rngs = nnx.Rngs(0)
    norm = nnx.BatchNorm(12, rngs=rngs)  # each call moves its averages
    model = nnx.Sequential(
        nnx.Linear(8, 12, rngs=rngs), norm, nnx.Linear(12, 2, rngs=rngs)
    )
    small = (result := shrunk(model, X)).module(model, X)
    averages = {
        n: a for n, a in jp.tree.named_leaves(nnx.state(small)).items() if "/1/" in n
    }
    assert len(averages) == 4
    expected = jp.tree.named_leaves(result.params)
    for name, average in averages.items():
        np.testing.assert_array_equal(average, expected[name])


@pytest.mark.full
def test_normalised_groups_of_channels_go_as_wholes():
    rngs = nnx.Rngs(0)
    convolved = nnx.Conv(3, 8, (3, 3), rngs=rngs)
    norm = nnx.GroupNorm(8, num_groups=4, rngs=rngs)
    model = nnx.Sequential(convolved, norm, nnx.relu, nnx.Conv(8, 2, (1, 1), rngs=rngs))
    batch = draw(1, 2, 6, 6, 3)
    small = (result := shrunk(model, batch)).module(model, batch)
    assert_computes_the_same(small, result, batch)
    assert small.layers[1].num_groups == 2


def test_masked_logits_are_no_difference():
    output = np.array([1.0, -np.inf, 2.0])
    assert relative_difference(output, output) == 0
    assert relative_difference(output, np.array([1.0, -np.inf, 4.0])) == 0.5
    assert relative_difference(output, np.array([1.0, 0.0, 2.0])) == np.inf
    assert relative_difference(output, np.array([1.0, np.inf, 2.0])) == np.inf
    assert relative_difference(output, np.array([1.0, np.nan, 2.0])) == np.inf
    rows = np.array([1.0, np.nan])  # whole rows that are masked
    assert relative_difference(rows, rows) == 0


def test_the_imaginary_part_of_a_difference_counts():
    assert relative_difference(np.array([1 + 1j]), np.array([1 + 0j])) == 1


class Wide(nn.Module):
    """The width is a field, so that the class can be made with another."""

    width: int = 12

    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(nn.relu(nn.Dense(self.width)(x)))


class Literal(nn.Module):
    """The width is a number in the code."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(nn.relu(nn.Dense(12)(x)))


LINEN = {
    "field": Wide(),
    "layers": nn.Sequential([nn.Dense(12), nn.relu, nn.Dense(12), nn.Dense(2)]),
}


def shrunk_linen(model):
    params = model.init(jax.random.key(0), X)
    return jp.shrink(model.apply, params, [X], jp.scores.magnitude, 0.5)


@pytest.mark.parametrize(
    "name", ["field", pytest.param("layers", marks=pytest.mark.full)]
)
def test_a_linen_module_is_cloned_with_other_fields(name):
    result = shrunk_linen(LINEN[name])
    small = result.module(LINEN[name], X)
    np.testing.assert_allclose(
        small.apply(result.params, X), result.fn(result.params, X), atol=1e-6
    )
    fresh = small.init(jax.random.key(1), X)
    assert jax.tree.map(np.shape, fresh) == jax.tree.map(np.shape, result.params)


def test_a_linen_module_is_handed_to_call_with_its_parameters():
    result = shrunk_linen(Wide())
    assert result.module(Wide(), X, lambda module, x: module(x)).width == 6
    by_hand = result.module(Wide(), X, lambda module, x: module.apply(result.params, x))
    assert by_hand.width == 6


def test_a_class_with_a_number_in_its_code_is_refused_with_the_way_out():
    with pytest.raises(
        ValueError, match=r"Literal cannot have them .*call=.* use fn of"
    ):
        shrunk_linen(Literal()).module(Literal(), X)


def test_what_is_no_module_is_refused():
    with pytest.raises(TypeError, match="NNX, Flax Linen or Equinox, got dict"):
        shrunk_linen(Wide()).module({}, X)


@pytest.mark.full
def test_an_equinox_module_has_the_smaller_sizes():
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.MLP(8, 2, width_size=12, depth=2, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def call(model, x):
        return jax.vmap(model)(x)

    def fn(params, x):
        return call(eqx.combine(params, static), x)

    result = jp.shrink(fn, params, [X[0]], jp.scores.magnitude, 0.5)
    small = result.module(model, X[0], call)
    np.testing.assert_allclose(
        call(small, X[0]), result.fn(result.params, X[0]), atol=1e-6
    )
    sizes = [(layer.in_features, layer.out_features) for layer in small.layers]
    assert (sizes, small.width_size) == ([(8, 6), (6, 6), (6, 2)], 6)
    assert model.layers[0].out_features == 12


@pytest.mark.full
def test_a_scalar_of_equinox_stays_one():
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.MLP("scalar", "scalar", 12, 1, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def call(model, x):
        return jax.vmap(model)(x)

    def fn(params, x):
        return call(eqx.combine(params, static), x)

    x = draw(2, 5)  # (batch,)
    result = jp.shrink(fn, params, [x], jp.scores.magnitude, 0.5)
    small = result.module(model, x, call)
    assert (small.layers[0].in_features, small.layers[0].out_features) == ("scalar", 6)
