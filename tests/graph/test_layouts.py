"""However a linear op is written, it is seen as (batch, in, out) with its input."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from jaxprune.lm.models.product import product as linear_product
from tests.support.small_models import draw, hessian


def everything(name, leaf):
    return True


def case(fn, params, x, *expected):
    """Products that must be found: (name, axes, matrix, input by hand)."""
    return types.SimpleNamespace(fn=fn, params=params, x=x, expected=expected)


def one(fn, weight, x, axes, matrix, inputs):
    return case(
        lambda p, x: fn(p["w"], x), {"w": weight}, x, ("w", axes, matrix, inputs)
    )


X = draw(0, 5, 4)
X3 = draw(1, 2, 3, 4)  # (batch, time, width)
W = draw(2, 4, 6)
HEADS = draw(3, 4, 2, 3)  # (width, heads, head)
EXPERTS = draw(4, 3, 4, 5)  # (expert, in, out)
XE = draw(5, 3, 7, 4)  # (expert, samples, in)


@jax.custom_jvp
def jvp_product(w, x):
    return x @ w


jvp_product.defjvp(lambda p, t: (jvp_product(*p), t[1] @ p[0] + p[1] @ t[0]))


def last(array):
    """All samples of one matrix: (1, samples, in)."""
    return array.reshape(1, -1, array.shape[-1])


PLAIN = {
    "matmul": one(lambda w, x: x @ w, W, X, jp.Axes((0,), (1,)), W[None], X[None]),
    "matmul of a batch of sequences": one(
        lambda w, x: x @ w, W, X3, jp.Axes((0,), (1,)), W[None], last(X3)
    ),
    "the weight on the left": one(
        lambda w, x: w @ x, W.T, X.T, jp.Axes((1,), (0,)), W[None], X[None]
    ),
    "einsum, the weight first": one(
        lambda w, x: jnp.einsum("oi,bti->bto", w, x),
        W.T,
        X3,
        jp.Axes((1,), (0,)),
        W[None],
        last(X3),
    ),
    "heads as outputs": one(
        lambda w, x: jnp.einsum("btd,dhk->bhtk", x, w),
        HEADS,
        X3,
        jp.Axes((0,), (1, 2)),
        HEADS.reshape(1, 4, 6),
        last(X3),
    ),
    "heads as inputs": one(
        lambda w, x: jnp.einsum("bthk,hkd->btd", x, w),
        HEADS.transpose(1, 2, 0),
        draw(6, 2, 5, 2, 3),
        jp.Axes((0, 1), (2,)),
        HEADS.transpose(1, 2, 0).reshape(1, 6, 4),
        draw(6, 2, 5, 2, 3).reshape(1, 10, 6),
    ),
    "heads that a reshape makes of the rows": one(
        lambda w, x: jnp.einsum("bthk,hkd->btd", x, w.reshape(2, 3, 4)),
        HEADS.transpose(1, 2, 0).reshape(6, 4),
        draw(6, 2, 5, 2, 3),
        jp.Axes((0,), (1,)),
        HEADS.transpose(1, 2, 0).reshape(1, 6, 4),
        draw(6, 2, 5, 2, 3).reshape(1, 10, 6),
    ),
    "heads that are turned round behind it": one(
        lambda w, x: jnp.einsum(
            "btkh,khd->btd", x, w.reshape(2, 3, 4).transpose(1, 0, 2)
        ),
        HEADS.transpose(1, 2, 0).reshape(6, 4),
        draw(6, 2, 5, 2, 3).swapaxes(2, 3),
        jp.Axes((0,), (1,)),
        HEADS.transpose(1, 2, 0).reshape(1, 6, 4),
        draw(6, 2, 5, 2, 3).reshape(1, 10, 6),
    ),
    "experts by einsum": one(
        lambda w, x: jnp.einsum("end,edf->enf", x, w),
        EXPERTS,
        XE,
        jp.Axes((1,), (2,)),
        EXPERTS,
        XE,
    ),
    "experts by vmap": one(
        lambda w, x: jax.vmap(lambda w, x: jnp.tanh(x @ w))(w, x),
        EXPERTS,
        XE,
        jp.Axes((1,), (2,)),
        EXPERTS,
        XE,
    ),
    "experts stored behind": one(
        lambda w, x: jax.vmap(lambda w, x: x @ w, in_axes=(2, 0))(w, x),
        EXPERTS.transpose(1, 2, 0),
        XE,
        jp.Axes((0,), (1,)),
        EXPERTS,
        XE,
    ),
    "an input shared by experts": one(
        lambda w, x: jax.vmap(lambda w: x @ w)(w),
        EXPERTS,
        X,
        jp.Axes((1,), (0, 2)),
        EXPERTS.transpose(1, 0, 2).reshape(1, 4, 15),
        X[None],
    ),
    "a layer under vmap over examples": one(
        lambda w, x: jax.vmap(lambda x: w @ x)(x),
        W.T,
        X,
        jp.Axes((1,), (0,)),
        W[None],
        X[None],
    ),
    "transposed before use": one(
        lambda w, x: x @ w.T, W.T, X, jp.Axes((1,), (0,)), W[None], X[None]
    ),
    "reshaped before use": one(
        lambda w, x: x @ w.reshape(4, 6),
        HEADS,
        X,
        jp.Axes((0,), (1, 2)),
        HEADS.reshape(1, 4, 6),
        X[None],
    ),
    "transposed, reshaped, transposed": one(
        lambda w, x: x @ w.transpose(1, 2, 0).reshape(6, 4).T,
        HEADS,
        X,
        jp.Axes((0,), (1, 2)),
        HEADS.reshape(1, 4, 6),
        X[None],
    ),
    "split after the product": one(
        lambda w, x: jnp.split(x @ w, 3, axis=1),
        W,
        X,
        jp.Axes((0,), (1,)),
        W[None],
        X[None],
    ),
    "half precision": one(
        lambda w, x: jnp.tanh(x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16)),
        W,
        X,
        jp.Axes((0,), (1,)),
        W[None],
        np.asarray(jnp.asarray(X, jnp.bfloat16), np.float32)[None],
    ),
    "jit inside jit": one(
        jax.jit(lambda w, x: jax.jit(lambda w, x: x @ w)(w, x)),
        W,
        X,
        jp.Axes((0,), (1,)),
        W[None],
        X[None],
    ),
    "checkpoint": one(
        jax.checkpoint(lambda w, x: jnp.sin(x @ w)),
        W,
        X,
        jp.Axes((0,), (1,)),
        W[None],
        X[None],
    ),
    "custom_vjp": one(
        lambda w, x: linear_product(x, w),
        W,
        X3,
        jp.Axes((0,), (1,)),
        W[None],
        last(X3),
    ),
    "custom_jvp": one(jvp_product, W, X, jp.Axes((0,), (1,)), W[None], X[None]),
    "several operations before": one(
        lambda w, x: jax.nn.gelu(x * 2 + 1) @ w,
        W,
        X,
        jp.Axes((0,), (1,)),
        W[None],
        np.asarray(jax.nn.gelu(X * 2 + 1))[None],
    ),
}


@pytest.mark.parametrize("name", PLAIN)
def test_a_linear_op_is_seen_as_batch_in_out(name):
    own = PLAIN[name]
    traced = jp.trace(own.fn, own.params, own.x)
    assert len(traced.linear_ops) == len(own.expected)
    leaves = jp.tree.named_leaves(own.params)
    for found, (weight, axes, matrix, inputs) in zip(
        traced.linear_ops, own.expected, strict=True
    ):
        assert (found.name, found.leaf, found.operation) == (weight, weight, "dot")
        assert found.index == ()
        assert found.use == 0
        assert found.shape == matrix.shape
        assert found.size == matrix.size
        assert inputs.shape[0] == matrix.shape[0]
        if found.axes is None:
            assert axes is None
        else:
            both = [
                {a % leaves[weight].ndim for a in part}
                for part in (found.axes.inputs, found.axes.outputs)
            ]
            assert both == [set(axes.inputs), set(axes.outputs)]
        view = np.asarray(found.view.read(jnp.asarray(leaves[weight])))
        np.testing.assert_array_equal(view, matrix)
    assert not traced.unseen


@pytest.mark.parametrize("name", PLAIN)
def test_the_input_of_a_linear_op_is_what_it_really_reads(name):
    own = PLAIN[name]
    found = jp.calibrate(own.fn, own.params, [own.x], hessian=True, prunable=everything)
    for weight, _, _, inputs in own.expected:
        moments = found[weight]
        assert moments.samples == inputs.shape[1]
        np.testing.assert_allclose(
            moments.hessian, hessian(inputs), rtol=1e-5, atol=1e-5
        )
        np.testing.assert_allclose(
            moments.mean_square,
            np.einsum("bii->bi", hessian(inputs)),
            rtol=1e-5,
            atol=1e-6,
        )
