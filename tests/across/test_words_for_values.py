"""Names stand for values; a metric inside a jitted step; complex weights by modulus."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp

PARAMS = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(8, 8)), jnp.float32)}


def zeros_after(tx, steps=4):
    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(steps):
        updates, state = tx.update(jax.tree.map(jnp.cos, params), state, params)
        params = optax.apply_updates(params, updates)
    return np.asarray(params["w"]) == 0


@pytest.mark.parametrize(
    ("named", "value"),
    [
        ({"criterion": "magnitude"}, {"criterion": jp.scores.magnitude}),
        ({"criterion": "obd"}, {"criterion": jp.scores.obd}),
        ({"grow": "rigl"}, {"grow": jp.grow.gradient()}),
        ({"grow": "set"}, {"grow": jp.grow.random()}),
    ],
)
def test_a_name_stands_for_its_value(named, value):
    events = {1: 0.5, 3: 0.75}
    a, b = (
        zeros_after(jp.gradual(optax.adam(1e-2), events, **options))
        for options in (named, value)
    )
    np.testing.assert_array_equal(a, b)
    assert a.sum() == 48


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"criterion": "largest"}, ValueError, "one of .*magnitude.*'largest'"),
        (
            {"criterion": {"w": jnp.ones(2)}},
            TypeError,
            r"function of \(params, importance\), got \{",
        ),
        ({"grow": "rig"}, ValueError, "'rigl', 'set' or a value of jp.grow"),
        ({"grow": jp.grow.gradient}, TypeError, "call it, as in grow="),
    ],
)
def test_what_is_no_name_and_no_value_is_refused(options, error, sentence):
    with pytest.raises(error, match=sentence):
        jp.gradual(optax.adam(1e-2), {1: 0.5}, **options)


def test_a_jitted_step_returns_its_sparsity_and_its_churn():
    masks = jp.masks.make(jp.scores.magnitude(PARAMS), 0.75)
    others = jp.masks.make(jp.scores.random(PARAMS), 0.5)

    @jax.jit
    def metrics(params, masks, others):
        counted, shared = jp.sparsity(params), jp.masks.overlap(masks, others)
        by_leaf = {
            name: zeros / size for name, (zeros, size) in counted.by_leaf.items()
        }
        return counted.total, by_leaf, shared.total

    pruned = jp.masks.apply(PARAMS, masks)
    total, by_leaf, shared = metrics(pruned, masks, others)
    assert (total, by_leaf) == (0.75, {"w": 0.75})
    kept, kept_others = (np.asarray(m["w"]) for m in (masks, others))
    np.testing.assert_allclose(
        shared, (kept & kept_others).sum() / (kept | kept_others).sum(), rtol=1e-6
    )


def test_complex_weights_rank_by_their_modulus():
    weights = {"w": jnp.array([[3j, 0.1], [1 + 1j, 2j]])}

    def every_leaf(name, leaf):
        return True

    scores = jp.scores.magnitude(weights, prunable=every_leaf)
    np.testing.assert_allclose(scores["w"], [[3, 0.1], [np.sqrt(2), 2]], rtol=1e-6)
    square = {"w": jnp.full((2, 2), 16.0)}
    for criterion, factor in ((jp.scores.obd, 16), (jp.scores.magnitude, 1)):
        ranked = criterion(weights, jp.Importance(square=square), prunable=every_leaf)
        modulus = np.abs(np.asarray(weights["w"]))
        expected = modulus**2 * factor if factor > 1 else modulus
        np.testing.assert_allclose(ranked["w"], expected, rtol=1e-6)
    pruned = jp.prune(weights, scores, 0.5)["w"]
    np.testing.assert_array_equal(pruned, [[3j, 0], [0, 2j]])
