"""Equinox models, as they are written."""

import equinox as eqx
import jax
import numpy as np

import jaxprune as jp
from tests.support.small_models import draw, hessian
from tests.support.traced import FLAT, X, check, divided, inputs_of


def test_an_equinox_mlp_under_vmap_is_seen_from_output_to_input():
    params, static = divided(eqx.nn.MLP, 4, 2, 6, 2)

    def fn(params, x):
        return jax.vmap(eqx.combine(params, static))(x)

    traced = jp.trace(fn, params, FLAT)
    assert [p.name for p in traced.linear_ops] == [
        f"layers/{i}/weight" for i in range(3)
    ]
    assert [p.shape for p in traced.linear_ops] == [(1, 4, 6), (1, 6, 6), (1, 6, 2)]
    assert all(p.axes == jp.Axes((1,), (0,)) for p in traced.linear_ops)
    x, by_hand = FLAT, {}
    for i, layer in enumerate(params.layers):
        by_hand[f"layers/{i}/weight"] = x
        x = np.maximum(x @ np.asarray(layer.weight).T + np.asarray(layer.bias), 0)
    check(fn, params, FLAT, by_hand)


def test_equinox_attention_shares_its_input():
    params, static = divided(eqx.nn.MultiheadAttention, 2, 4)

    def fn(params, x):
        return jax.vmap(lambda x: eqx.combine(params, static)(x, x, x))(x)

    traced = jp.trace(fn, params, X)
    numbers = inputs_of(traced)
    assert set(numbers) == {
        f"{part}_proj/weight" for part in ("query", "key", "value", "output")
    }
    assert len({numbers[f"{n}_proj/weight"] for n in ("query", "key", "value")}) == 1
    assert numbers["output_proj/weight"] != numbers["query_proj/weight"]
    own = X.reshape(1, -1, 4)
    moments = jp.calibrate(fn, params, [X], hessian=True)
    for part in ("query", "key", "value"):
        np.testing.assert_allclose(
            moments[f"{part}_proj/weight"].hessian, hessian(own), 1e-5, 1e-5
        )


def test_an_equinox_convolution_has_its_channels_first():
    params, static = divided(eqx.nn.Conv2d, 4, 6, 3, groups=2)
    (found,) = jp.trace(
        lambda p, x: jax.vmap(eqx.combine(p, static))(x), params, draw(3, 2, 4, 5, 5)
    ).linear_ops
    assert (found.name, found.operation) == ("weight", "convolution")
    assert found.shape == (2, 18, 3)


# Pruning keeps what each framework wraps its parameters in.
