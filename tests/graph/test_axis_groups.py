"""Groups of slices, against their oracle: zeroing a group's weights removes it.

Where an axis cannot lose positions, the reason is given and nothing is removed.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name

import jaxprune as jp
from tests.support import removal
from tests.support.removal import check_each_kind, row
from tests.support.small_models import draw

X = draw(0, 3, 8)


def weights(seed, **shapes):
    return {
        name: draw(seed + i, *shape) for i, (name, shape) in enumerate(shapes.items())
    }


def groups_of(fn, params, batch=X):
    return jp.axis_groups(fn, params, batch)


def why(groups, name):
    (group,) = (group for group in groups if group.name == name)
    assert not group.removable
    assert not group.default
    return group.why


# What goes together.


def test_a_neuron_is_a_column_a_bias_and_a_row():
    params = weights(0, up=(8, 6), bias=(6,), down=(6, 3))

    def fn(p, x):
        return jnp.tanh(x @ p["up"] + p["bias"][None]) @ p["down"]

    groups, result = check_each_kind(fn, params, X)
    assert row(groups, "bias:0") == (1, 6, True, True)
    (group,) = (group for group in groups if group.default)
    assert {(m.leaf, m.axis) for m in group.members} == {
        ("bias", 0),
        ("down", 0),
        ("up", 1),
    }
    assert group.weights == 6 + 18 + 48
    assert result.params["up"].shape == (8, 3)


def test_gates_and_values_of_a_fused_matrix_go_together():
    params = weights(0, fused=(8, 12), down=(6, 3))

    def fn(p, x):
        gate, up = jnp.split(x @ p["fused"], 2, axis=-1)
        return (jax.nn.silu(gate) * up) @ p["down"]

    groups, result = check_each_kind(fn, params, X)
    assert row(groups, "down:0") == (1, 6, True, True)
    assert result.params["fused"].shape == (8, 6)


def test_a_gate_that_is_interleaved_goes_with_its_values():
    params = weights(0, fused=(8, 12), down=(6, 3))

    def fn(p, x):
        both = (x @ p["fused"]).reshape(-1, 6, 2)
        return (jax.nn.silu(both[..., 0]) * both[..., 1]) @ p["down"]

    groups, result = check_each_kind(fn, params, X)
    assert row(groups, "down:0") == (1, 6, True, True)
    assert result.params["fused"].shape == (8, 6)


def test_the_width_of_a_residual_stream_is_left_alone_unless_it_is_asked_for():
    params = weights(0, first=(8, 6), up=(6, 10), down=(10, 6), head=(6, 3))

    def fn(p, x):
        x = x @ p["first"]
        x = x + jnp.tanh(x @ p["up"]) @ p["down"]
        return x @ p["head"]

    groups, result = check_each_kind(fn, params, X)
    assert row(groups, "down:1") == (1, 6, True, False)
    assert "residual" in str(groups)
    assert result.params["first"].shape == (8, 6)


def test_the_sum_of_a_root_mean_square_loses_units_and_keeps_its_divisor():
    params = weights(0, first=(8, 6), scale=(6,), head=(6, 3))

    def fn(p, x):
        x = x @ p["first"]
        square = jnp.mean(jnp.square(x), -1, keepdims=True)
        return (x * jax.lax.rsqrt(square + 1e-6) * p["scale"][None]) @ p["head"]

    groups, _ = check_each_kind(fn, params, X)
    assert row(groups, "first:1") == (1, 6, True, True)


def test_parts_of_an_axis_are_groups_of_their_own():
    params = weights(0, up=(8, 10), left=(4, 3), right=(6, 3))

    def fn(p, x):
        x = jnp.tanh(x @ p["up"])
        return x[:, :4] @ p["left"] + x[:, 4:] @ p["right"]

    groups, result = check_each_kind(fn, params, X)
    assert row(groups, "left:0") == (1, 4, True, True)
    assert row(groups, "right:0") == (1, 6, True, True)
    assert result.params["up"].shape == (8, 5)


def test_what_is_concatenated_is_cut_in_each_part():
    params = weights(0, one=(8, 4), two=(8, 6), down=(10, 3))

    def fn(p, x):
        parts = [jnp.tanh(x @ p["one"]), x @ p["two"]]
        return jnp.concatenate(parts, -1) @ p["down"]

    groups, result = check_each_kind(fn, params, X)
    assert result.params["down"].shape == (5, 3)
    assert row(groups, "down:0.0") == (1, 4, True, True)


def attention(p, x, heads, kv_heads):
    """Grouped-query attention, keys and values repeated."""
    batch, time, _ = x.shape
    q = (x @ p["q"]).reshape(batch, time, heads, -1)
    k, v = ((x @ p[n]).reshape(batch, time, kv_heads, -1) for n in "kv")
    k, v = (jnp.repeat(a, heads // kv_heads, axis=2) for a in (k, v))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / 2
    y = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)
    return y.reshape(batch, time, -1) @ p["out"]


def test_query_heads_go_with_the_key_head_that_they_share():
    params = weights(0, q=(8, 24), k=(8, 8), v=(8, 8), out=(24, 8))
    fn = functools.partial(attention, heads=6, kv_heads=2)
    x = draw(1, 2, 5, 8)
    groups, result = check_each_kind(fn, params, x)
    assert row(groups, "k:1.0") == (1, 2, True, True)
    assert row(groups, "out:0.1") == (1, 3, True, False)
    assert result.params["q"].shape == (8, 12)
    assert result.params["k"].shape == (8, 4)


def test_query_heads_of_the_only_key_head_are_free():
    params = weights(0, q=(8, 16), k=(8, 4), v=(8, 4), out=(16, 8))
    fn = functools.partial(attention, heads=4, kv_heads=1)
    groups, result = check_each_kind(fn, params, draw(1, 2, 5, 8))
    assert row(groups, "out:0.0") == (1, 4, True, True)
    assert result.params["q"].shape == (8, 8)
    assert result.params["k"].shape == (8, 4)


def test_einsum_leaves_have_heads_as_an_axis():
    params = weights(0, qkv=(3, 8, 4, 5), out=(4, 5, 8))

    def fn(p, x):
        q, k, v = jnp.einsum("btw,swhd->sbthd", x, p["qkv"])
        scores = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k))
        y = jnp.einsum("bhqk,bkhd->bqhd", scores, v)
        return jnp.einsum("bthd,hdw->btw", y, p["out"])

    groups, result = check_each_kind(fn, params, draw(1, 2, 5, 8))
    assert row(groups, "out:0") == (1, 4, True, True)
    assert result.params["qkv"].shape == (3, 8, 2, 5)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_stacked_layers_choose_their_own_units_on_whatever_axis(axis):
    params = weights(0, up=(3, 8, 6), down=(3, 6, 8))
    params = jax.tree.map(lambda leaf: np.moveaxis(leaf, 0, axis), params)

    def fn(p, x):
        def layer(x, own):
            return x + jnp.tanh(x @ own["up"]) @ own["down"], None

        if axis < 2:
            first = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, axis, 0), p)
            return jax.lax.scan(layer, x, first)[0]
        for i in range(3):
            own = {k: jax.lax.index_in_dim(v, i, axis, False) for k, v in p.items()}
            x, _ = layer(x, own)
        return x

    groups, result = check_each_kind(fn, params, X)
    assert row(groups, "down/*:" + "100"[axis]) == (3, 6, True, True)
    kept = [tuple(units) for units in result.report["kept"].values()]
    assert len(set(kept)) == 3
    assert sorted(result.params["up"].shape) == [3, 3, 8]


def test_experts_keep_the_same_neurons_and_stay_themselves():
    params = weights(0, router=(8, 4), up=(4, 8, 6), down=(4, 6, 8))

    def fn(p, x):
        share = jax.nn.softmax(x @ p["router"])
        hidden = jax.nn.relu(jnp.einsum("bw,ewf->ebf", x, p["up"]))
        return jnp.einsum("ebf,efw,be->bw", hidden, p["down"], share)

    groups, result = check_each_kind(fn, params, X)
    assert row(groups, "down:1") == (1, 6, True, True)
    assert "reduce_max runs over it" in why(groups, "down:0")
    assert result.params["up"].shape == (4, 8, 3)


@pytest.mark.parametrize(
    "what",
    [
        lambda x: jnp.cumsum(x, 0),
        lambda x: jnp.sort(x, 0),
        lambda x: jnp.broadcast_to(jnp.max(x, 0, keepdims=True), x.shape),
        lambda x: x[::-1],
        lambda x: x[jnp.array([2, 0, 0])],
        lambda x: jnp.clip(x, -0.5, 0.5) ** 3 + jnp.power(jnp.abs(x), 1.5),
        lambda x: jnp.where(jnp.arange(3)[:, None] > 1, x, -x),
        lambda x: jnp.where(x > 0, x, jnp.exp(x)),
        lambda x: jax.lax.dynamic_update_slice(jnp.ones((5, 6)), x, (1, 0))[1:4],
        lambda x: jax.lax.dynamic_slice(x, (1, 0), (3, 6)),
        lambda x: jnp.pad(x, ((1, 0), (0, 0)))[:3],
        lambda x: jnp.stack([x, jnp.cos(x)]).reshape(6, 6)[1:4],
        lambda x: sum(jnp.split(jnp.tile(x, (1, 2)), 2, -1)),
        lambda x: jax.lax.reduce_window(
            x[:, None], -jnp.inf, jax.lax.max, (2, 1, 1), (1, 1, 1), "SAME"
        )[:, 0],
        lambda x: jnp.einsum("bf,cf->bcf", x, x).mean(1),
        lambda x: jax.vmap(lambda row: row[jnp.newaxis].T[:, 0])(x),
        lambda x: jax.checkpoint(jnp.tanh)(x) + jax.jit(jnp.sin)(x),
        lambda x: jax.lax.fori_loop(0, 2, lambda i, y: jnp.tanh(y) * x, x),
        lambda x: jax.nn.dot_product_attention(*[x.reshape(1, 3, 1, 6)] * 3)[0, :, 0],
        lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True),
        lambda x: x * jax.random.normal(jax.random.key(0), (6,))[None],
    ],
)
def test_what_leaves_units_to_themselves_keeps_them_removable(what):
    params = weights(0, up=(8, 6), down=(6, 3))

    def fn(p, x):
        return what(jnp.tanh(x @ p["up"])) @ p["down"]

    groups, result = check_each_kind(fn, params, X)
    assert row(groups, "down:0") == (1, 6, True, True)
    assert result.params["up"].shape == (8, 3)


# What does not go.


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        (lambda x: jax.nn.softmax(x), "reduce_max runs over it"),
        (lambda x: jax.nn.standardize(x), "a sum runs over it"),
        (lambda x: jnp.sort(x), "sort runs along it"),
        (lambda x: jnp.cumsum(x, -1), "cumsum runs along it"),
        (lambda x: x[:, ::-1], "rev runs along it"),
        (lambda x: jax.lax.top_k(x, 6)[0], "top_k runs along it"),
        (lambda x: jnp.fft.ifft(jnp.fft.fft(x)).real, "fft, which is not understood"),
        (lambda x: x[:, ::2] + x[:, 1::2], "a part of it is taken"),
        (lambda x: jnp.log(jnp.square(x)), "log runs over what is zero"),
        (jnp.arccosh, "acosh runs over what is zero"),
        (lambda x: x / jnp.abs(x), "div divides by what is zero"),
        (lambda x: x**-2, "integer_pow divides by what is zero"),
        (lambda x: jnp.abs(x) ** -0.5, "pow divides by what is zero"),
        (lambda x: jnp.sum(jnp.exp(x), -1, keepdims=True) * x, "a sum runs over it"),
        (lambda x: x[:, jnp.array([1, 0, 2, 3, 4, 5])], "is indexed by data"),
        (
            lambda x: jnp.pad(x, ((0, 1), (0, 0)), constant_values=1.0),
            "a sum runs over it",
        ),
        (lambda x: x @ jnp.linalg.inv(x.T @ x + jnp.eye(6)), "not understood"),
    ],
)
def test_what_looks_at_all_units_freezes_them_and_says_why(what, reason):
    params = weights(0, up=(8, 6))

    def fn(p, x):
        return jnp.sum(jnp.square(what(jnp.tanh(x @ p["up"]))), -1)

    assert reason in why(groups_of(fn, params), "up:1")


def test_a_mean_that_is_subtracted_freezes_what_is_squared_after_it_only():
    params = weights(0, up=(8, 6), down=(6, 3))

    def fn(p, x):
        x = jnp.tanh(x @ p["up"])
        return (x - jnp.mean(x, -1, keepdims=True)) @ p["down"]

    groups, _ = check_each_kind(fn, params, X)
    assert row(groups, "down:0") == (1, 6, True, True)


def test_the_batch_and_the_result_keep_their_axes():
    params = weights(0, only=(8, 6))
    groups = groups_of(lambda p, x: x @ p["only"], params)
    assert why(groups, "only:0") == "is an axis of the batch"
    assert why(groups, "only:1") == "is an axis of the result"


def test_a_table_that_is_looked_up_keeps_its_rows():
    params = weights(0, table=(11, 6), head=(6, 3))
    tokens = np.array([[1, 2, 3], [4, 5, 6]])
    groups, _ = check_each_kind(lambda p, x: p["table"][x] @ p["head"], params, tokens)
    assert why(groups, "table:0") == "is indexed by data"
    assert row(groups, "head:0") == (1, 6, True, True)


def test_integers_are_no_weights():
    params = {"w": np.ones((8, 6), np.float32), "order": np.arange(6)}

    def fn(p, x):
        return jnp.sum((x @ p["w"]) * p["order"][None], -1)

    groups = groups_of(fn, params)
    assert why(groups, "order:0") == "is not floating"


def test_leaves_that_are_not_used_stay():
    params = weights(0, up=(8, 6), down=(6, 3), unused=(6, 3))
    groups = groups_of(lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"], params)
    assert why(groups, "unused:0") == why(groups, "unused:1") == "is not used"


def test_rows_that_this_batch_does_not_reach_stay_by_default():
    params = weights(0, table=(11, 8), head=(8, 3))
    groups = groups_of(lambda p, x: (x + p["table"][: len(x)]) @ p["head"], params)
    assert row(groups, "table:0.1") == (1, 8, True, False)


def test_layers_of_a_stack_that_are_not_all_used_keep_the_same_units():
    params = weights(0, up=(3, 8, 6), down=(3, 6, 8))

    def fn(p, x):
        for i in range(2):
            x = x + jnp.tanh(x @ p["up"][i]) @ p["down"][i]
        return x

    groups, _ = check_each_kind(fn, params, X)
    assert row(groups, "down:1") == (1, 6, True, True)


def test_nothing_is_computed():
    params = jax.eval_shape(lambda: weights(0, up=(8, 6), down=(6, 3)))
    batch = jax.ShapeDtypeStruct((3, 8), jnp.float32)
    groups = groups_of(lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"], params, batch)
    assert [group.name for group in groups if group.default] == ["down:0"]


# Random functions.


def taken(params, i):
    return jax.tree.map(lambda leaf: jnp.take(leaf, i, axis=1), params)


def named(params, i):
    """As remat policies have it: the whole stack bears a name."""
    return jax.tree.map(lambda leaf: checkpoint_name(leaf, "layers")[:, i], params)


@pytest.mark.full
@pytest.mark.parametrize("way", [taken, named])
def test_layers_that_are_looked_up_by_their_number_choose_their_own(way):
    params = {"up": draw(0, 8, 3, 6), "down": draw(1, 6, 3, 8)}

    def fn(params, x):
        def layer(x, i):
            own = way(params, i)
            return x + jnp.tanh(x @ own["up"]) @ own["down"], None

        return jax.lax.scan(layer, x, jnp.arange(3))[0]

    groups, small = removal.check(fn, params, draw(2, 4, 8), 0.5)
    assert [(g.kind, g.units) for g in groups if g.default] == [("down/*:0", 6)] * 3
    assert small.params["up"].shape == (8, 3, 3)
