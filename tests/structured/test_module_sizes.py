"""Which attributes of a smaller module are set: those that hold a size that changed."""

import types

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax import nnx

import jaxprune as jp
from jaxprune.structured.cut import LeafCut
from jaxprune.structured.module_sizes import layer_sizes
from tests.support.small_models import draw
from tests.support.small_models import quick_compilation as quick_compilation


def shrunk(model, batch, keep=0.5, kinds=nnx.Param):
    graphdef, params, rest = nnx.split(model, kinds, ...)

    def fn(params, x):
        return nnx.merge(graphdef, params, rest)(x)

    return jp.shrink(fn, params, [batch], jp.scores.magnitude, keep)


class Tables(nnx.Module):
    """Sizes of one value, of which one changes."""

    def __init__(self, rngs):
        self.vocab_size = self.context_size = self.hidden = 16
        self.table = nnx.Embed(self.vocab_size, 6, rngs=rngs)
        self.up = nnx.Linear(6, self.hidden, rngs=rngs)
        self.down = nnx.Linear(self.hidden, 6, rngs=rngs)

    def __call__(self, ids):
        x = nnx.relu(self.up(self.table(ids))).reshape(*ids.shape, self.hidden)
        return self.down(x)


def test_another_size_of_the_same_value_stays():
    model, ids = Tables(nnx.Rngs(0)), np.arange(12).reshape(3, 4)
    graphdef, params = nnx.split(model)
    result = jp.shrink(
        lambda p, ids: nnx.merge(graphdef, p)(ids),
        params,
        [ids],
        jp.scores.magnitude,
        keep={"down/*": 0.5},
    )
    small = result.module(model, ids)
    assert (small.vocab_size, small.context_size, small.hidden) == (16, 16, 8)
    assert (small.table.num_embeddings, small.up.out_features) == (16, 8)


class Depthwise(nnx.Module):
    """A convolution of each channel of the input, several outputs each."""

    def __init__(self, rngs):
        self.each = nnx.Conv(3, 12, (3, 3), feature_group_count=3, rngs=rngs)
        self.last = nnx.Conv(12, 5, (1, 1), rngs=rngs)

    def __call__(self, x):
        return self.last(jax.nn.relu(self.each(x)))


def test_outputs_inside_of_groups_leave_the_groups():
    model, batch = Depthwise(nnx.Rngs(0)), draw(1, 2, 6, 6, 3)
    small = (result := shrunk(model, batch)).module(model, batch)
    assert (small.each.feature_group_count, small.each.in_features) == (3, 3)
    assert (small.each.out_features, small.last.in_features) == (6, 6)
    np.testing.assert_allclose(
        small(batch), result.fn(result.params, batch), atol=1e-5, rtol=1e-5
    )


class Transposed(nnx.Module):
    """A convolution whose kernel has its outputs before its inputs."""

    def __init__(self, rngs):
        self.first = nnx.Conv(3, 8, (1, 1), rngs=rngs)
        shape = {"transpose_kernel": True, "kernel_size": (3, 3)}
        self.wider = nnx.ConvTranspose(8, 6, **shape, rngs=rngs)
        self.last = nnx.Conv(6, 2, (1, 1), rngs=rngs)

    def __call__(self, x):
        return self.last(jax.nn.relu(self.wider(jax.nn.relu(self.first(x)))))


def test_the_axes_of_a_kernel_are_known_by_the_sizes_that_it_had():
    model, batch = Transposed(nnx.Rngs(0)), draw(1, 2, 5, 5, 3)
    small = shrunk(model, batch).module(model, batch)
    assert small.wider.kernel.shape == (3, 3, 3, 4)
    assert (small.wider.in_features, small.wider.out_features) == (4, 3)


class Stacked(nnx.Module):
    """Blocks that are one block of stacked leaves, run in turn."""

    def __init__(self, rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def make(rngs):
            return nnx.MultiHeadAttention(4, 16, decode=False, rngs=rngs)

        self.blocks = make(rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def run(x, block):
            return x + block(x)

        return run(x, self.blocks)


@pytest.mark.full
def test_layers_that_are_stacked_have_the_sizes_of_one():
    model, batch = Stacked(nnx.Rngs(0)), draw(1, 2, 5, 16)
    small = shrunk(model, batch).module(model, batch)
    assert (small.blocks.num_heads, small.blocks.head_dim) == (2, 4)
    assert (small.blocks.in_features, small.blocks.qkv_features) == (16, 8)


class Normalised(nnx.Module):
    """Statistics that are no parameters."""

    def __init__(self, rngs):
        self.first = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(8, use_running_average=True, rngs=rngs)
        self.last = nnx.Conv(8, 4, (1, 1), rngs=rngs)

    def __call__(self, x):
        return self.last(nnx.relu(self.norm(self.first(x))))


def test_statistics_that_are_not_cut_are_named_with_the_way_out():
    model, batch = Normalised(nnx.Rngs(0)), draw(1, 2, 6, 6, 3)
    with pytest.raises(ValueError, match=r"norm/mean.*must be cut too.*nnx.BatchStat"):
        shrunk(model, batch).module(model, batch)
    result = shrunk(model, batch, kinds=(nnx.Param, nnx.BatchStat))
    assert result.module(model, batch).norm.num_features == 4


class TwoWidths(nnx.Module):
    """Two sizes of one value, which become different ones."""

    def __init__(self, rngs):
        self.h1 = self.h2 = 16
        self.a, self.b = nnx.Linear(6, 16, rngs=rngs), nnx.Linear(16, 6, rngs=rngs)
        self.c, self.d = nnx.Linear(6, 16, rngs=rngs), nnx.Linear(16, 6, rngs=rngs)

    def __call__(self, x):
        x = x + self.b(nnx.relu(self.a(x)).reshape(-1, self.h1))
        return x + self.d(nnx.relu(self.c(x)).reshape(-1, self.h2))


def test_sizes_of_one_value_may_become_different():
    model, batch = TwoWidths(nnx.Rngs(0)), draw(1, 5, 6)
    small = shrunk(model, batch, {"a/*": 0.5, "c/*": 0.75}).module(model, batch)
    assert (small.h1, small.h2) == (8, 12)


class Twice(nn.Module):
    """A module that stands in two fields."""

    a: nn.Module
    b: nn.Module
    last: nn.Module

    def __call__(self, x):
        return self.last(nn.relu(self.a(x)) + nn.relu(self.b(2 * x)))


def test_a_linen_module_in_two_fields_stays_one():
    dense, batch = nn.Dense(8), draw(1, 5, 6)
    model = Twice(dense, dense, nn.Dense(3))
    params = model.init(jax.random.key(0), batch)
    result = jp.shrink(model.apply, params, [batch], jp.scores.magnitude, 0.5)
    small = result.module(model, batch)
    assert small.a is small.b
    assert small.a.features == 4


def test_equinox_counts_inputs_and_neurons_of_one_value_apart():
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.MLP(8, 8, 8, 2, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)
    batch = draw(1, 3, 8)

    def call(module, x):
        return jax.vmap(module)(x)

    result = jp.shrink(
        lambda p, x: call(eqx.combine(p, static), x),
        params,
        [batch],
        jp.scores.magnitude,
        0.5,
    )
    small = result.module(model, batch, call)
    assert (small.in_size, small.out_size, small.width_size) == (8, 8, 4)


def test_an_attribute_that_is_left_out_stays_so_where_a_leaf_has_fewer_axes():
    cut = LeafCut((8,), (4,), None, ((np.arange(4),),))
    part = types.SimpleNamespace(in_features=3, out_features=None, num_features=8)
    sizes = layer_sizes({"norm": part}, {"norm/weight": cut, "norm/scale": cut})
    assert sizes == {("norm", "num_features"): 4}
