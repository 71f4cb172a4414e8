"""Linen, NNX and Equinox: their layers are seen, with the inputs they really get.

What a layer gets is noted by the frameworks themselves: Linen's interceptors, and
layers of NNX and Equinox that are called one by one.
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
from tests.support.small_models import draw, filled, hessian
from tests.support.traced import FLAT, X, check, divided, inputs_of, shapes
from tests.support.trajectories import same_bits

pytestmark = pytest.mark.jax_api

# Linen.


def initial(model, x):
    """Parameters of a Linen model."""
    return filled(jax.eval_shape(model.init, jax.random.key(0), x))


class Layer(nn.Module):
    """Attention and an MLP."""

    @nn.compact
    def __call__(self, x, _=None):
        x = x + nn.MultiHeadDotProductAttention(num_heads=2, name="attention")(x)
        y = nn.Dense(6, name="up")(nn.LayerNorm()(x))
        return x + nn.Dense(4, name="down")(nn.gelu(y)), None


@functools.cache
def layer():
    """A layer and its parameters, which tests read."""
    return Layer(), initial(Layer(), X)


class Stacked(nn.Module):
    """Two layers in a scan with remat, between a tied embedding's two ends."""

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(7, 4, name="embed")
        layers = nn.scan(
            nn.remat(Layer, prevent_cse=False),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=2,
        )
        x, _ = layers(name="layers")(embed(tokens), None)
        return embed.attend(nn.LayerNorm()(x))


@functools.partial(jax.jit, static_argnums=0)
def noted(model, params, x):
    """What every Dense and DenseGeneral of a Linen model gets, by path; the result."""
    seen = {}

    def note(following, args, kwargs, context):
        kinds = nn.Dense | nn.DenseGeneral | nn.Conv
        if isinstance(context.module, kinds) and context.method_name == "__call__":
            seen["/".join(context.module.path)] = args[0]
        return following(*args, **kwargs)

    with nn.intercept_methods(note):
        result = model.apply(params, x)
    return seen, result


def test_linen_layers_are_seen_with_what_they_get():
    model, params = layer()
    seen, _ = noted(model, params, X)
    by_hand = {}
    for path, own in seen.items():
        own = np.asarray(own)
        if path.endswith("out"):  # heads and their widths are both inputs
            own = own.reshape(*own.shape[:-2], 4)
        by_hand[f"params/{path}/kernel"] = own
    assert len(by_hand) == 6
    check(model.apply, params, X, by_hand)


def test_linen_attention_has_heads_as_outputs_and_shares_its_input():
    model, params = layer()
    traced = jp.trace(model.apply, params, X)
    own = {p.name.removeprefix("params/"): p for p in traced.linear_ops}
    for part in ("query", "key", "value"):
        op = own[f"attention/{part}/kernel"]
        assert op.axes == jp.Axes((0,), (1, 2))
        assert op.shape == (1, 4, 4)
        assert op.input == own["attention/query/kernel"].input
    out = own["attention/out/kernel"]
    assert out.axes == jp.Axes((0, 1), (2,))
    assert out.input != own["attention/query/kernel"].input
    assert own["up/kernel"].shape == (1, 4, 6)
    # The biases of the heads have two axes and are no matrices.
    assert set(traced.unseen) == {
        f"params/attention/{part}/bias" for part in ("query", "key", "value")
    }


def test_linen_scan_over_layers_with_remat_is_layer_by_layer():
    # Of the shape of X: `noted` is compiled for it already.
    tokens = np.arange(15).reshape(3, 5) % 7
    model = Stacked()
    params = initial(model, tokens)
    traced = jp.trace(model.apply, params, tokens)
    kernels = [p for p in traced.linear_ops if p.leaf.startswith("params/layers")]
    assert len(kernels) == 2 * 6
    assert [p.index for p in kernels] == [(0,)] * 6 + [(1,)] * 6
    up = next(p for p in kernels if p.name == "params/layers/up/kernel/1")
    assert up.axes == jp.Axes((1,), (2,))
    head = traced.linear_ops[-1]
    assert (head.name, head.shape) == ("params/embed/embedding", (1, 4, 7))
    assert head.axes == jp.Axes((1,), (0,))

    # By hand: the same layers one after the other.
    leaves = params["params"]
    x = leaves["embed"]["embedding"][tokens]
    by_hand = {}
    for i in range(2):
        own = {"params": jax.tree.map(lambda leaf, i=i: leaf[i], leaves["layers"])}
        seen, (x, _) = noted(Layer(), own, x)
        for path, value in seen.items():
            value = np.asarray(value)
            if path.endswith("out"):
                value = value.reshape(*value.shape[:-2], 4)
            by_hand[f"params/layers/{path}/kernel/{i}"] = value
    check(model.apply, params, tokens, by_hand)


def test_linen_half_precision_is_cast_inside_and_still_seen():
    model = nn.Dense(3, dtype=jnp.bfloat16)
    params = initial(model, FLAT)
    assert params["params"]["kernel"].dtype == np.float32
    half = np.asarray(jnp.asarray(FLAT, jnp.bfloat16), np.float32)
    check(model.apply, params, FLAT, {"params/kernel": half})


def test_linen_convolutions_are_seen():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(6, (3, 3), feature_group_count=2)(x)
            x = nn.relu(nn.Conv(8, (1, 1), strides=2, use_bias=False)(x))
            return nn.Dense(3)(x.mean((1, 2)))

    model, image = Net(), draw(2, 2, 6, 6, 4)
    params = initial(model, image)
    traced = jp.trace(model.apply, params, image)
    assert shapes(traced) == {
        "params/Conv_0/kernel": (2, 18, 3),
        "params/Conv_1/kernel": (1, 6, 8),
        "params/Dense_0/kernel": (1, 8, 3),
    }
    seen, _ = noted(model, params, image)
    moments = jp.calibrate(model.apply, params, [image], hessian=True)
    strided = np.asarray(seen["Conv_1"])[:, ::2, ::2].reshape(1, -1, 6)
    np.testing.assert_allclose(
        moments["params/Conv_1/kernel"].hessian, hessian(strided), 1e-4, 1e-5
    )


# NNX.


def split(make):
    """Graph and state of an NNX model."""
    graphdef, state = nnx.split(nnx.eval_shape(make))
    return graphdef, filled(state)


class Net(nnx.Module):
    """Linear, Einsum, attention."""

    def __init__(self, rngs):
        self.first = nnx.Linear(4, 8, rngs=rngs)
        self.mix = nnx.Einsum("btd,dhk->bthk", (8, 2, 4), (2, 4), rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            num_heads=2, in_features=8, decode=False, rngs=rngs
        )
        self.norm = nnx.RMSNorm(8, rngs=rngs)
        self.last = nnx.Linear(8, 3, use_bias=False, rngs=rngs)

    def parts(self, x):
        """The input of each layer, by calling them one by one."""
        seen = {"first": x}
        x = nnx.silu(self.first(x))
        seen["mix"] = x
        x = self.mix(x).reshape(*x.shape[:2], 8)
        seen["attention"] = x
        x = self.norm(x + self.attention(x))
        seen["last"] = x
        return self.last(x), seen

    def __call__(self, x):
        return self.parts(x)[0]


def test_nnx_layers_are_seen_with_what_they_get():
    graphdef, state = split(lambda: Net(nnx.Rngs(0)))

    def fn(state, x):
        return nnx.merge(graphdef, state)(x)

    traced = jp.trace(fn, state, X)
    assert shapes(traced) == {
        "first/kernel": (1, 4, 8),
        "mix/kernel": (1, 8, 8),
        "attention/query/kernel": (1, 8, 8),
        "attention/key/kernel": (1, 8, 8),
        "attention/value/kernel": (1, 8, 8),
        "attention/out/kernel": (1, 8, 8),
        "last/kernel": (1, 8, 3),
    }
    assert not {k: v for k, v in traced.unseen.items() if "kernel" in k}
    numbers = inputs_of(traced)
    attention = {numbers[f"attention/{n}/kernel"] for n in ("query", "key", "value")}
    assert len(attention) == 1
    seen = jax.jit(lambda s, x: nnx.merge(graphdef, s).parts(x)[1])(state, X)
    found = jp.calibrate(fn, state, [X], hessian=True)
    for name, weight in (
        ("first", "first/kernel"),
        ("mix", "mix/kernel"),
        ("attention", "attention/key/kernel"),
        ("last", "last/kernel"),
    ):
        own = np.asarray(seen[name]).reshape(1, -1, seen[name].shape[-1])
        np.testing.assert_allclose(
            found[weight].hessian, hessian(own), rtol=1e-4, atol=1e-4
        )


def test_nnx_scan_with_remat_over_stacked_layers_is_layer_by_layer():
    class Block(nnx.Module):
        def __init__(self, rngs):
            self.up = nnx.Linear(4, 6, rngs=rngs)
            self.down = nnx.Linear(6, 4, rngs=rngs)

        def __call__(self, x):
            return x + self.down(nnx.relu(self.up(x)))

    class Deep(nnx.Module):
        def __init__(self, rngs):
            @nnx.split_rngs(splits=3)
            @nnx.vmap(in_axes=(0,), out_axes=0)
            def blocks(rngs):
                return Block(rngs)

            self.blocks = blocks(rngs)

        def __call__(self, x):
            @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
            @nnx.remat
            def forward(x, block):
                return block(x)

            return forward(x, self.blocks)

    graphdef, state = split(lambda: Deep(nnx.Rngs(0)))

    def fn(state, x):
        return nnx.merge(graphdef, state)(x)

    traced = jp.trace(fn, state, FLAT)
    assert [p.name for p in traced.linear_ops] == [
        f"blocks/{part}/kernel/{i}" for i in range(3) for part in ("up", "down")
    ]
    leaves = {k: np.asarray(v) for k, v in jp.tree.named_leaves(state).items()}
    x, by_hand = FLAT.astype(np.float64), {}
    for i in range(3):
        own = {k.removeprefix("blocks/"): v[i] for k, v in leaves.items()}
        by_hand[f"blocks/up/kernel/{i}"] = x
        hidden = np.maximum(x @ own["up/kernel"] + own["up/bias"], 0)
        by_hand[f"blocks/down/kernel/{i}"] = hidden
        x = x + hidden @ own["down/kernel"] + own["down/bias"]
    check(fn, state, FLAT, by_hand)


def test_an_nnx_module_itself_or_its_plain_dict_may_be_the_parameters():
    model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    check(lambda model, x: model(x), model, FLAT, {"kernel": FLAT})
    state = nnx.state(model, nnx.Param)
    graphdef = nnx.graphdef(model)
    pure = nnx.to_pure_dict(state)

    def fn(pure, x):
        rebuilt = nnx.state(model, nnx.Param)
        nnx.replace_by_pure_dict(rebuilt, pure)
        return nnx.merge(graphdef, rebuilt)(x)

    check(fn, pure, FLAT, {"kernel": FLAT})


def test_nnx_convolution_and_an_embedding_used_as_head():
    class Tied(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(7, 4, rngs=rngs)
            self.conv = nnx.Conv(4, 4, (3,), rngs=rngs)

        def __call__(self, tokens):
            return self.embed.attend(nnx.relu(self.conv(self.embed(tokens))))

    graphdef, state = split(lambda: Tied(nnx.Rngs(0)))
    tokens = np.array([[0, 1, 2, 3], [6, 5, 4, 3]])
    traced = jp.trace(lambda s, x: nnx.merge(graphdef, s)(x), state, tokens)
    found = {p.name: p for p in traced.linear_ops}
    assert set(found) == {"conv/kernel", "embed/embedding"}
    assert found["conv/kernel"].operation == "convolution"
    assert found["conv/kernel"].shape == (1, 12, 4)
    assert found["embed/embedding"].shape == (1, 4, 7)
    assert found["embed/embedding"].axes == jp.Axes((1,), (0,))


# Equinox: weights are (out, in).


def linen():
    model = nn.Dense(6)
    return model.apply, initial(model, FLAT)


def nnx_state():
    graphdef, state = split(lambda: nnx.Linear(4, 6, rngs=nnx.Rngs(0)))
    return lambda s, x: nnx.merge(graphdef, s)(x), state


def equinox():
    params, static = divided(eqx.nn.Linear, 4, 6)
    return lambda p, x: jax.vmap(eqx.combine(p, static))(x), params


@pytest.mark.parametrize("make", [linen, nnx_state, equinox])
def test_pruning_gives_back_the_same_containers(make):
    fn, params = make()
    pruned = jp.prune_trained(fn, params, [FLAT], method="wanda", sparsity=0.5).params
    assert jax.tree.structure(pruned) == jax.tree.structure(params)
    assert type(pruned) is type(params)
    before, after = jp.tree.named_leaves(params), jp.tree.named_leaves(pruned)
    assert list(before) == list(after)
    for name, leaf in before.items():
        if leaf.ndim < 2:
            assert after[name] is leaf
            continue
        out_in = make is equinox
        old, new = (
            np.asarray(w).T if out_in else np.asarray(w) for w in (leaf, after[name])
        )
        scores = np.abs(old) * np.sqrt(np.square(FLAT).mean(0))[:, None]
        kept = scores >= np.sort(scores, 0)[2]
        np.testing.assert_array_equal(new, np.where(kept, old, 0))
    # It is still a model.
    assert np.isfinite(np.asarray(fn(pruned, FLAT))).all()
    assert not same_bits(pruned, params)
