"""Squared gradients of a trained model's loss: closed forms, sharding, one program."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxprune as jp
from tests.support.compilations import compiled
from tests.support.small_models import draw
from tests.support.small_models import quick_compilation as quick_compilation

PARAMS = {"bias": draw(9, 1, 3), "w": draw(0, 4, 3)}
BATCHES = [(draw(i, 8, 4), draw(20 + i, 8, 3)) for i in range(1, 4)]


def squared_error(params, batch):
    x, y = batch
    return jnp.mean(jnp.sum(jnp.square(x @ params["w"] + params["bias"] - y), 1))


def by_hand(batches):
    """E[g^2] of least squares, g = 2 X^T (X W + b - Y) / samples, in float64."""
    w, bias = (PARAMS[k].astype(np.float64) for k in ("w", "bias"))
    gradients = [2 * x.T @ (x @ w + bias - y) / len(x) for x, y in batches]
    return np.mean(np.square(gradients), 0)


def test_squares_are_those_of_least_squares():
    found = jp.contrib.calibrate_gradients(squared_error, PARAMS, iter(BATCHES))
    np.testing.assert_allclose(found.square["w"], by_hand(BATCHES), rtol=1e-5)
    assert found.square["w"].dtype == np.float32
    assert found.square["bias"] == optax.MaskedNode()
    assert found.weight is found.magnitude is found.taylor is None


def test_batches_of_different_sizes_count_alike():
    batches = [BATCHES[0], tuple(x[:3] for x in BATCHES[1])]
    found = jp.contrib.calibrate_gradients(squared_error, PARAMS, batches)
    np.testing.assert_allclose(found.square["w"], by_hand(batches), rtol=1e-5)


def test_criteria_read_calibrated_gradients():
    importance = jp.contrib.calibrate_gradients(squared_error, PARAMS, BATCHES)
    expected = np.abs(PARAMS["w"]) * by_hand(BATCHES) ** 0.25
    scores = jp.scores.preconditioned_magnitude(PARAMS, importance)
    np.testing.assert_allclose(scores["w"], expected, rtol=1e-5)
    obd = jp.scores.obd(PARAMS, importance)["w"]
    np.testing.assert_allclose(obd, PARAMS["w"] ** 2 * by_hand(BATCHES), rtol=1e-5)


def test_squares_of_bfloat16_are_float32_and_lazy_leaves_are_read():
    def read():
        return jnp.asarray(PARAMS["w"], jnp.bfloat16)

    lazy = jp.LazyArray((4, 3), np.dtype(jnp.bfloat16), read)
    found = jp.contrib.calibrate_gradients(
        squared_error, {**PARAMS, "w": lazy}, BATCHES
    )
    assert found.square["w"].dtype == np.float32
    np.testing.assert_allclose(found.square["w"], by_hand(BATCHES), rtol=0.1, atol=0.02)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_squares_lie_like_their_parameters(kind):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(kind,))
    where = NamedSharding(mesh, PartitionSpec("data", None))
    whole = NamedSharding(mesh, PartitionSpec())
    params = {
        "w": jax.device_put(PARAMS["w"], where),
        "bias": jax.device_put(PARAMS["bias"], whole),
    }

    def loss(params, batch):
        x, y = batch
        # A sum over the sharded inputs that Explicit axes need no word about.
        product = jnp.sum(x[:, :, None] * params["w"][None], 1)
        return jnp.mean(jnp.sum(jnp.square(product + params["bias"] - y), 1))

    across = NamedSharding(mesh, PartitionSpec(None, "data"))
    batches = [
        (jax.device_put(x, across), jax.device_put(y, whole)) for x, y in BATCHES
    ]
    with jax.set_mesh(mesh):
        found = jp.contrib.calibrate_gradients(loss, params, batches).square["w"]
    assert found.sharding.is_equivalent_to(where, 2)
    np.testing.assert_allclose(np.asarray(found), by_hand(BATCHES), rtol=1e-5)


def test_more_batches_compile_nothing_more():
    params = jax.tree.map(jnp.asarray, PARAMS)
    counts = []
    jp.contrib.calibrate_gradients(
        squared_error, params, BATCHES[:1]
    )  # what is compiled once
    for number in (1, 3):
        with compiled() as programs:
            jp.contrib.calibrate_gradients(squared_error, params, BATCHES[:1] * number)
        counts.append(len(programs))
    assert counts[1] == counts[0]


def test_what_has_no_gradient_is_refused_with_a_way_out():
    with pytest.raises(ValueError, match="at least one batch"):
        jp.contrib.calibrate_gradients(squared_error, PARAMS, [])
    with pytest.raises(ValueError, match=r"one floating number.*\(8, 3\)"):
        jp.contrib.calibrate_gradients(lambda p, b: b[0] @ p["w"], PARAMS, BATCHES)
    with pytest.raises(ValueError, match="none of 'bias', 'w' is"):
        jp.contrib.calibrate_gradients(
            squared_error, PARAMS, BATCHES, prunable=lambda name, leaf: False
        )
    broken = {**PARAMS, "w": PARAMS["w"] * np.nan}
    with pytest.raises(ValueError, match="must be finite, but those of 'w'"):
        jp.contrib.calibrate_gradients(squared_error, broken, BATCHES)
    with pytest.raises(ValueError, match="outside of jit"):
        jax.jit(lambda p: jp.contrib.calibrate_gradients(squared_error, p, BATCHES))(
            PARAMS
        )


@pytest.mark.parametrize(
    ("leaf", "words"),
    [
        (jnp.ones((2, 2), jnp.int32), "must be floating, but 'c' are not"),
        (jnp.ones((2, 2), jnp.complex64), "must be floating, but 'c' are not"),
        (jax.nn.relu, "must be arrays, but 'c' are not.*eqx.partition"),
    ],
)
def test_leaves_without_a_square_are_named(leaf, words):
    params = {"c": leaf, "w": jnp.ones((2, 2))}
    with pytest.raises(ValueError, match=words):
        jp.contrib.calibrate_gradients(
            lambda p, x: jnp.sum(p["w"]), params, [1.0], prunable=lambda n, x: True
        )
