"""Smaller functions are exported with symbolic batches, wherever the dense one is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import jaxprune as jp
from tests.support.removal import zeroed
from tests.support.small_models import draw

pytestmark = pytest.mark.jax_api

WIDTH, HEADS, TOKENS = 8, 2, 10
PARAMS = {
    "embed": draw(0, TOKENS, WIDTH),
    **{name: draw(i + 1, WIDTH, WIDTH) / 4 for i, name in enumerate("qkvo")},
    "up": draw(5, WIDTH, 12),
    "down": draw(6, 12, WIDTH),
}


def attention(params, tokens):
    """Attention over heads, then an MLP on all tokens of all sequences as rows."""
    batch, length = tokens.shape
    x = params["embed"][tokens]  # (batch, length, width)

    def heads(name):
        y = (x @ params[name]).reshape(batch, length, HEADS, WIDTH // HEADS)
        return y.transpose(0, 2, 1, 3)  # (batch, head, length, size)

    logits = heads("q") @ heads("k").swapaxes(-1, -2)
    positions = jnp.arange(length)
    earlier = (positions[:, None] >= positions[None])[None, None]
    mixed = jax.nn.softmax(jnp.where(earlier, logits, -1e9)) @ heads("v")
    mixed = mixed.transpose(0, 2, 1, 3).reshape(batch, length, WIDTH)
    rows = (x + mixed @ params["o"]).reshape(batch * length, WIDTH)
    rows = rows + jax.nn.relu(rows @ params["up"]) @ params["down"]
    return rows.reshape(batch, length, WIDTH)


def abstract(params):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)


def drawn_tokens(*shape):
    return jnp.asarray(np.random.default_rng(0).integers(0, TOKENS, shape))


@pytest.fixture(scope="module")
def small():
    scores = jp.scores.magnitude(PARAMS)
    return jp.shrink(attention, PARAMS, [drawn_tokens(2, 3)], scores, 0.5)


@pytest.fixture(scope="module")
def dense(small):
    """The dense parameters with zeros for what was removed."""
    groups = jp.axis_groups(attention, PARAMS, drawn_tokens(2, 3))
    kept = {name: np.array(units) for name, units in small.report["kept"].items()}
    return zeroed(PARAMS, groups, kept)


@pytest.mark.full
@pytest.mark.parametrize("symbols", ["b, 3", "b, s"])
def test_an_exported_function_takes_batches_of_every_size(small, dense, symbols):
    shape = export.symbolic_shape(symbols)
    tokens = jax.ShapeDtypeStruct(shape, drawn_tokens(1, 1).dtype)
    exported = export.export(jax.jit(small.fn))(abstract(small.params), tokens)
    for batch, length in ((1, 3), (4, 3), (2, 5)):
        if symbols == "b, s" or length == 3:
            tokens = drawn_tokens(batch, length)
            np.testing.assert_allclose(
                exported.call(small.params, tokens),
                attention(dense, tokens),
                rtol=1e-5,
                atol=1e-5,
            )


def test_sizes_that_nothing_orders_are_refused_in_a_sentence():
    def folded(params, x):
        x = x.reshape(x.shape[1], x.shape[0], 4)
        return x @ params["up"] @ params["down"]

    params = {"up": draw(0, 4, 6), "down": draw(1, 6, 4)}
    x, scores = draw(2, 2, 3, 4), jp.scores.magnitude(params)
    small = jp.shrink(folded, params, [x], scores, 0.5)
    batch, length = export.symbolic_shape("b, s")
    symbolic = jax.ShapeDtypeStruct((batch, length, 4), x.dtype)
    with pytest.raises(ValueError, match=r"^the symbolic sizes .* sizes as numbers"):
        export.export(jax.jit(small.fn))(abstract(small.params), symbolic)
