"""Every linear op of a parameter with an activation is found, and its layout."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name

import jaxprune as jp
from tests.support.small_models import draw, hessian

f32 = jnp.float32


def rows(traced):
    """What a reader of the table sees."""
    return [(p.name, p.shape, p.axes, p.input, p.use) for p in traced.linear_ops]


X = draw(0, 5, 4)
X3 = draw(1, 2, 3, 4)  # (batch, time, width)
W = draw(2, 4, 6)
EXPERTS = draw(4, 3, 4, 5)  # (expert, in, out)
XE = draw(5, 3, 7, 4)  # (expert, samples, in)


# Stacked layers.


def scanned(p, x, wrap=lambda f: f, **options):
    def layer(x, w):
        return jnp.tanh(wrap(lambda w, x: x @ w)(w, x)), None

    return jax.lax.scan(layer, x, p["w"], **options)[0]


STACK = draw(7, 3, 4, 4) / 2


def walked(x, stack=STACK):
    """The input of each layer of a stack."""
    inputs, x = [], np.asarray(x, np.float64)
    for w in stack:
        inputs.append(x)
        x = np.tanh(x @ w)
    return inputs


@pytest.mark.parametrize(
    "fn",
    [
        scanned,
        functools.partial(scanned, wrap=jax.checkpoint),
        functools.partial(scanned, wrap=jax.jit),
        functools.partial(scanned, unroll=3),
        jax.jit(scanned),
        lambda p, x: jax.lax.fori_loop(0, 3, lambda i, x: jnp.tanh(x @ p["w"][i]), x),
        lambda p, x: functools.reduce(lambda x, w: jnp.tanh(x @ w), p["w"], x),
        lambda p, x: jax.lax.scan(
            lambda x, i: (jnp.tanh(x @ p["w"][i]), None), x, jnp.arange(3)
        )[0],
        lambda p, x: jax.lax.scan(
            lambda x, i: (jnp.tanh(x @ jnp.take(p["w"], i, 0)), None), x, jnp.arange(3)
        )[0],
        # As Haliax has it around what each layer of its `fold` reads.
        functools.partial(
            scanned, wrap=lambda f: lambda w, x: f(checkpoint_name(w, "layer"), x)
        ),
    ],
    ids=[
        "scan",
        "remat",
        "jit-in",
        "unroll",
        "jit",
        "fori",
        "python",
        "indices",
        "take",
        "named",
    ],
)
def test_a_stacked_leaf_has_one_linear_op_a_layer(fn):
    params = {"w": jnp.asarray(STACK)}
    traced = jp.trace(fn, params, X)
    expected = [
        (f"w/{i}", (1, 4, 4), jp.Axes((1,), (2,)), i, 0) for i in range(len(STACK))
    ]
    assert rows(traced) == expected
    assert [p.index for p in traced.linear_ops] == [(0,), (1,), (2,)]
    assert {p.leaf for p in traced.linear_ops} == {"w"}
    for p, w in zip(traced.linear_ops, STACK, strict=True):
        np.testing.assert_array_equal(p.view.read(params["w"]), w[None])
    found = jp.calibrate(fn, params, [X], hessian=True)
    for i, x in enumerate(walked(X)):
        np.testing.assert_allclose(
            found[f"w/{i}"].hessian, hessian(x[None]), rtol=1e-4, atol=1e-5
        )


def test_a_reversed_scan_names_the_layers_by_their_place_in_the_leaf():
    traced = jp.trace(lambda p, x: scanned(p, x, reverse=True), {"w": STACK}, X)
    assert [p.name for p in traced.linear_ops] == ["w/2", "w/1", "w/0"]
    assert [p.input for p in traced.linear_ops] == [0, 1, 2]


def test_a_stack_of_stacks_has_two_indices():
    stack = draw(8, 2, 3, 4, 4)
    traced = jp.trace(
        lambda p, x: jax.lax.scan(lambda x, w: (scanned({"w": w}, x), None), x, p["w"])[
            0
        ],
        {"w": stack},
        X,
    )
    assert [p.index for p in traced.linear_ops] == [
        (i, j) for i in range(2) for j in range(3)
    ]
    assert traced.linear_ops[4].name == "w/1/1"


def test_experts_in_stacked_layers_are_batch_and_layers_are_index():
    stack = draw(9, 2, 3, 4, 4)
    traced = jp.trace(
        lambda p, x: jax.lax.scan(
            lambda x, w: (jnp.einsum("end,edf->enf", x, w), None), x, p["w"]
        )[0],
        {"w": stack},
        XE,
    )
    assert rows(traced) == [
        ("w/0", (3, 4, 4), jp.Axes((2,), (3,)), 0, 0),
        ("w/1", (3, 4, 4), jp.Axes((2,), (3,)), 1, 0),
    ]


# Parts of a leaf.


def test_a_fused_kernel_that_is_split_before_use_is_three_weights_of_one_input():
    def fn(p, x):
        q, k, v = jnp.split(p["qkv"], 3, axis=1)
        return x @ q, x @ k, x @ v

    kernel = draw(10, 4, 12)
    traced = jp.trace(fn, {"qkv": kernel}, X)
    assert [p.name for p in traced.linear_ops] == [
        f"qkv[:,{a}:{a + 4}]" for a in (0, 4, 8)
    ]
    assert [p.input for p in traced.linear_ops] == [0, 0, 0]
    assert [p.use for p in traced.linear_ops] == [0, 0, 0]
    for i, p in enumerate(traced.linear_ops):
        assert p.shape == (1, 4, 4)
        part = kernel[None, :, 4 * i : 4 * i + 4]
        np.testing.assert_array_equal(p.view.read(jnp.asarray(kernel)), part)


def test_a_kernel_cut_along_its_input_has_parts_with_inputs_of_their_own():
    def fn(p, x):
        return x[:, :2] @ p["w"][:2] + x[:, 2:] @ p["w"][2:]

    traced = jp.trace(fn, {"w": W}, X)
    assert [p.name for p in traced.linear_ops] == ["w[0:2,:]", "w[2:4,:]"]
    assert [p.input for p in traced.linear_ops] == [0, 1]
    found = jp.calibrate(fn, {"w": W}, [X], hessian=True)
    for name, x in (("w[0:2,:]", X[:, :2]), ("w[2:4,:]", X[:, 2:])):
        np.testing.assert_allclose(
            found[name].hessian, hessian(x[None]), rtol=1e-5, atol=1e-6
        )


# Which linear ops share an input.


def attention(p, x, cast=lambda x: x):
    q, k, v = (cast(x) @ p[n] for n in "qkv")
    mixed = jax.nn.softmax(q @ jnp.swapaxes(k, 1, 2)) @ v
    return cast(mixed) @ p["out"]


QKV = {name: draw(11 + i, 4, 4) for i, name in enumerate(["q", "k", "v", "out"])}


@pytest.mark.parametrize(
    "cast",
    [
        lambda x: x,
        lambda x: x.astype(jnp.float16),
        jax.jit(lambda x: x.astype(jnp.float16)),
        lambda x: jnp.swapaxes(jnp.swapaxes(x, 0, 1), 0, 1),
        jax.checkpoint(lambda x: x / jnp.sqrt(jnp.square(x).mean(-1, keepdims=True))),
    ],
    ids=["itself", "cast by each", "jitted cast", "moved by each", "norm by each"],
)
def test_queries_keys_and_values_share_their_input(cast):
    traced = jp.trace(lambda p, x: attention(p, x, cast), QKV, X3)
    by_name = {p.name: p.input for p in traced.linear_ops}
    assert by_name == {"q": 0, "k": 0, "v": 0, "out": 1}


def test_different_inputs_are_not_shared():
    def fn(p, x):
        return x @ p["a"], jnp.tanh(x) @ p["b"], (x + 0) @ p["c"], x[::-1] @ p["d"]

    params = {name: draw(1, 4, 3) for name in "abcd"}
    numbers = [p.input for p in jp.trace(fn, params, X).linear_ops]
    assert numbers[0] != numbers[1]
    assert len(set(numbers[:2] + numbers[3:])) == 3


# Tied leaves.


def test_a_tied_embedding_is_seen_at_the_head_alone():
    def fn(p, tokens):
        x = p["embedding"][tokens]
        return jnp.tanh(x @ p["w"]) @ p["embedding"].T

    params = {"embedding": draw(2, 9, 4), "w": draw(3, 4, 4)}
    traced = jp.trace(fn, params, np.array([[0, 1], [8, 3]]))
    assert rows(traced) == [
        ("w", (1, 4, 4), jp.Axes((0,), (1,)), 0, 0),
        ("embedding", (1, 4, 9), jp.Axes((1,), (0,)), 1, 0),
    ]


def test_each_use_of_a_tied_weight_has_its_own_input():
    def fn(p, x):
        return jnp.tanh(jnp.tanh(x @ p["w"]) @ p["w"]) @ p["w"].T

    traced = jp.trace(fn, {"w": draw(2, 4, 4)}, X)
    assert [(p.name, p.use, p.input) for p in traced.linear_ops] == [
        ("w", 0, 0),
        ("w", 1, 1),
        ("w", 2, 2),
    ]
    assert traced.linear_ops[0].axes == jp.Axes((0,), (1,))
    assert traced.linear_ops[2].axes == jp.Axes((1,), (0,))


# Low rank, and products of parameters alone.


def test_both_factors_of_a_low_rank_product_are_seen():
    def fn(p, x):
        return (x @ p["down"]) @ p["up"]

    traced = jp.trace(fn, {"down": draw(1, 4, 2), "up": draw(2, 2, 6)}, X)
    assert [(p.name, p.input) for p in traced.linear_ops] == [("down", 0), ("up", 1)]


# What cannot be seen.


def counting(p, x):
    def more(state):
        return jnp.abs(state[0]).sum() > 1e-3

    def body(state):
        return state[0] @ p["w"] * 0.1, state[1] + 1

    return jax.lax.while_loop(more, body, (x, 0))[0]


SQUARE = draw(3, 4, 4)
HIDDEN = {
    "scaled": (lambda p, x: x @ (p["w"] * p["scale"]), SQUARE, "mul"),
    "normalised": (
        lambda p, x: x @ (p["w"] / jnp.linalg.norm(p["w"], axis=0, keepdims=True)),
        SQUARE,
        "div",
    ),
    "masked": (
        lambda p, x: x @ jnp.where(jnp.eye(4) > 0, p["w"], jnp.zeros((4, 4))),
        SQUARE,
        "select_n",
    ),
    "while": (counting, SQUARE, "while"),
    "cond": (
        lambda p, x: jax.lax.cond(x.sum() > 0, lambda x: x @ p["w"], lambda x: x, x),
        SQUARE,
        "cond",
    ),
    "joined": (
        lambda p, x: x @ jnp.concatenate([p["w"], p["w"]], 1),
        SQUARE,
        "concatenate",
    ),
    "lookup": (
        lambda p, x: p["w"][jnp.argmax(x, 1)],
        SQUARE,
        "gather",
    ),
    # Beyond the end a take gives NaN, which is no part of the leaf.
    "beyond": (lambda p, x: x @ jnp.take(p["w"], 3, 0), STACK, "gather"),
    "elementwise": (lambda p, x: x * p["w"][:1], SQUARE, "mul"),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_what_hides_a_weight_is_named(name):
    fn, weight, reason = HIDDEN[name]
    traced = jp.trace(fn, {"w": weight, "scale": jnp.float32(2)}, X)
    assert [p.name for p in traced.linear_ops] == []
    assert set(traced.unseen) == {"w"}
    assert reason in traced.unseen["w"]
    assert f"unseen: w: {traced.unseen['w']}" in str(traced)


def test_a_weight_that_low_rank_factors_are_added_to_is_unseen_and_named():
    def fn(p, x):
        return x @ (p["w"] + p["a"] @ p["b"])

    params = {"w": SQUARE, "a": draw(1, 4, 2), "b": draw(2, 2, 4)}
    traced = jp.trace(fn, params, X)
    assert not traced.linear_ops
    assert set(traced.unseen) == {"w", "a", "b"}
    assert "add" in traced.unseen["w"]


def test_a_leaf_that_nothing_uses_is_named_and_vectors_are_not():
    traced = jp.trace(
        lambda p, x: x @ p["w"] + p["bias"][None],
        {"w": W, "bias": draw(1, 6), "idle": W, "scalar": jnp.float32(1)},
        X,
    )
    assert traced.unseen == {"idle": "is not used"}
    assert [p.name for p in traced.linear_ops] == ["w"]


def test_a_product_of_activations_is_no_linear_op_of_a_parameter():
    traced = jp.trace(lambda p, x: (x @ p["w"]) @ (x @ p["w"]).T, {"w": W}, X)
    assert {p.name for p in traced.linear_ops} == {"w"}


# What may be given.


def test_tracing_computes_nothing():
    kind = functools.partial(jax.ShapeDtypeStruct, dtype=f32)
    params = {"a": kind((2**20, 2**20)), "b": kind((2**20, 2**22))}
    traced = jp.trace(
        lambda p, b: jnp.tanh(b["x"] @ p["a"]) @ p["b"],
        params,
        {"x": kind((2**22, 2**20))},
    )
    assert [p.size for p in traced.linear_ops] == [2**40, 2**42]
    assert traced.linear_ops[1].shape == (1, 2**20, 2**22)


def test_the_batch_may_be_any_tree():
    def fn(p, batch):
        tokens, (mask, extra) = batch["tokens"], batch["more"]
        return (p["embedding"][tokens] * mask[..., None]) @ p["w"] + extra

    params = {"embedding": draw(1, 9, 4), "w": W}
    batch = {"tokens": np.array([[1, 2]]), "more": (np.ones((1, 2)), np.float32(1))}
    traced = jp.trace(fn, params, batch)
    assert [p.name for p in traced.linear_ops] == ["w"]
    assert "gather" in traced.unseen["embedding"]


def test_names_are_those_of_the_tree():
    params = {"blocks": [{"w": draw(1, 4, 4)}, {"w": draw(2, 4, 4)}], "a": (W,)}

    def fn(p, x):
        for block in p["blocks"]:
            x = x @ block["w"]
        return x @ p["a"][0]

    traced = jp.trace(fn, params, X)
    assert [p.name for p in traced.linear_ops] == ["blocks/0/w", "blocks/1/w", "a/0"]
    assert {p.name for p in traced.linear_ops} == set(jp.tree.names(params))


def test_the_table_has_one_line_a_linear_op():
    lines = str(jp.trace(lambda p, x: attention(p, x), QKV, X3)).splitlines()
    assert len(lines) == 1 + len(QKV)
    assert [line.split()[0] for line in lines[1:]] == ["q", "k", "v", "out"]
    assert all("1 x 4 x 4" in line for line in lines[1:])


def test_a_constant_in_the_function_is_no_parameter():
    constant = jnp.asarray(W)
    traced = jp.trace(lambda p, x: (x @ constant) @ p["w"], {"w": draw(1, 6, 2)}, X)
    assert [p.name for p in traced.linear_ops] == ["w"]
