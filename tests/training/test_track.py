"""The tracked averages equal the float64 oracle's, wherever the tracker sits."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

import jaxprune as jp
from tests.support import oracles
from tests.support.averages import STEPS, assert_averages
from tests.support.trajectories import (
    containers,
    find,
    gradients,
    leaves,
    record,
    same_bits,
    weights,
)

OTHER_SCHEDULES = [(5, 1), (0, 4), (22, 1)]


@pytest.mark.parametrize(
    ("start", "every"),
    [
        (0, 1),
        (3, 7),
        (6, 40),
        *(pytest.param(*pair, marks=pytest.mark.full) for pair in OTHER_SCHEDULES),
    ],
)
def test_start_and_interval_pick_the_snapshots(start, every):
    params = weights()
    tracker = jp.track_importance(jp.weightings.power(0.5), start=start, every=every)
    run = record(optax.chain(optax.sgd(0.1), tracker), params, gradients(params, STEPS))
    tracked = jp.get_importance(run.state).weight
    assert_averages(tracked, run.weights, start=start, every=every)


OPTIMIZERS = {"adamw": optax.adamw(0.05), "sgd": optax.sgd(0.1, 0.9)}


@pytest.mark.parametrize(
    ("name", "kind", "p", "dtype"),
    [
        ("adamw", "uniform", 0.0, jnp.float32),
        ("adamw", "power", 0.5, jnp.bfloat16),
        ("sgd", "exponential", 0.9, jnp.bfloat16),
        pytest.param("sgd", "uniform", 0.0, jnp.bfloat16, marks=pytest.mark.full),
        pytest.param("sgd", "power", 0.5, jnp.float32, marks=pytest.mark.full),
        pytest.param("adamw", "exponential", 0.9, jnp.float32, marks=pytest.mark.full),
    ],
)
def test_average_of_weight_and_magnitude_is_exact(name, kind, p, dtype):
    params = weights(dtype)
    weighting = getattr(jp.weightings, kind)(*([] if kind == "uniform" else [p]))
    tracker = jp.track_importance(weighting, average=("weight", "magnitude"))
    tx = optax.chain(OPTIMIZERS[name], tracker)
    run = record(tx, params, gradients(params, STEPS))
    importance = jp.get_importance(run.state)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(importance.weight))
    assert_averages(importance.weight, run.weights, kind, p)
    assert_averages(importance.magnitude, run.weights, kind, p, of=np.abs)


def test_weights_are_rounded_as_apply_updates_rounds_them():
    params = {"kernel": jnp.ones((2, 2), jnp.bfloat16)}
    grads = {"kernel": jnp.full((9, 2, 2), 1e-4, jnp.float32)}  # lost in bfloat16
    tx = optax.chain(optax.scale(-1.0), jp.track_importance())
    run = record(tx, params, grads)
    assert np.all(leaves(run.params)[0] == 1.0)
    assert np.all(leaves(jp.get_importance(run.state).weight)[0] == 1.0)


@pytest.mark.parametrize(("every", "bound"), [(1, 4000 * 2.0**-25), (100, 1e-6)])
def test_slow_drift_is_followed_within_the_documented_bound(every, bound):
    """At snapshot n a drift under n 2^-25 of the weight is lost."""
    steps, jump = 4000, 1000
    moves = np.zeros((steps, 1, 1), np.float32)
    moves[jump] = 1e-5
    tx = jp.track_importance(jp.weightings.uniform(), every=every)
    run = record(tx, {"k": jnp.ones((1, 1))}, {"k": jnp.asarray(moves)})
    (values,) = leaves(run.weights)
    expected = oracles.average(values, "uniform", 0.5, every=every)
    (actual,) = leaves(jp.get_importance(run.state).weight)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=bound)


def test_average_is_exact_over_two_thousand_steps():
    params = weights()
    tx = optax.chain(optax.adamw(1e-3), jp.track_importance())
    run = record(tx, params, gradients(params, 2000))
    assert_averages(jp.get_importance(run.state).weight, run.weights)


def test_before_the_first_snapshot_it_is_the_initial_weight():
    params = weights(jnp.bfloat16)
    tracker = jp.track_importance(start=50, average=("weight", "magnitude"))
    tx = optax.chain(optax.sgd(0.1), tracker)
    fresh = jp.get_importance(tx.init(params))
    later = jp.get_importance(record(tx, params, gradients(params, 3)).state)
    for importance in (fresh, later):
        for a, w in zip(leaves(importance.weight), leaves(params), strict=True):
            np.testing.assert_array_equal(a, w)
        for a, w in zip(leaves(importance.magnitude), leaves(params), strict=True):
            np.testing.assert_array_equal(a, np.abs(w))


@pytest.mark.parametrize("kind", ["uniform", "exponential"])
def test_squares_and_taylor_are_those_of_the_raw_gradient(kind):
    params = weights()
    grads = gradients(params, STEPS)
    weighting = jp.weightings.uniform()
    p = 0.0
    if kind == "exponential":
        p, weighting = 0.8, jp.weightings.exponential(0.8)
    tx = optax.chain(
        jp.track_gradients(weighting, average=("square", "taylor")),
        optax.clip_by_global_norm(0.01),
        optax.sgd(0.1),
        jp.track_importance(),
    )
    run = record(tx, params, grads)
    importance = jp.get_importance(run.state)
    first, after = leaves(params), leaves(run.weights)
    expected = zip(leaves(grads), first, after, strict=True)
    actual = zip(leaves(importance.square), leaves(importance.taylor), strict=True)
    for (square, taylor), (g, w0, w) in zip(actual, expected, strict=True):
        before = np.concatenate([w0[None], w[:-1]])
        mean = oracles.average(g**2, kind, p)
        np.testing.assert_allclose(square, mean, rtol=0, atol=1e-6 * mean.max())
        mean = oracles.average(np.abs(before * g), kind, p)
        np.testing.assert_allclose(taylor, mean, rtol=0, atol=1e-6 * mean.max())


@pytest.mark.parametrize("track", [jp.track_importance, jp.track_gradients])
@pytest.mark.parametrize(
    "dtype",
    [jnp.float32, jnp.bfloat16, pytest.param(jnp.float16, marks=pytest.mark.full)],
)
def test_updates_pass_through_bit_for_bit(track, dtype):
    special = jnp.array([[jnp.nan, -0.0, 0.0], [jnp.inf, -jnp.inf, 1.1]], dtype)
    params = {"kernel": jnp.ones((2, 3), dtype)}
    tx = track()
    for update in (tx.update, jax.jit(tx.update)):
        out, _ = update({"kernel": special}, tx.init(params), params)
        assert same_bits(out, {"kernel": special})


def test_training_is_the_same_with_and_without_tracking():
    params = weights()
    grads = gradients(params, STEPS)
    tracked = optax.chain(jp.track_gradients(), optax.adamw(0.1), jp.track_importance())
    a, b = record(tracked, params, grads), record(optax.adamw(0.1), params, grads)
    for x, y in zip(leaves(a.weights), leaves(b.weights), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-6)  # fusion may differ


@pytest.mark.parametrize("name", containers())
def test_every_kind_of_tree_is_tracked(name):
    params = containers()[name]
    tx = optax.chain(jp.track_gradients(), optax.adam(0.1), jp.track_importance())
    run = record(tx, params, gradients(params, 5))
    importance = jp.get_importance(run.state)
    assert jax.tree.structure(importance.weight) == jax.tree.structure(params)
    assert jax.tree.structure(importance.square) == jax.tree.structure(params)
    assert_averages(importance.weight, run.weights)


def test_integers_are_left_alone():
    params = {"kernel": jnp.ones((2, 2)), "count": jnp.zeros((2, 2), jnp.int32)}
    tx = jp.track_importance()
    updates = {"kernel": jnp.ones((2, 2)), "count": jnp.ones((2, 2), jnp.int32)}
    out, state = jax.jit(tx.update)(updates, tx.init(params), params)
    assert same_bits(out, updates)
    assert isinstance(jp.get_importance(state).weight["count"], optax.MaskedNode)


def test_square_is_read_from_adam_when_it_is_not_tracked():
    params = weights()
    tx = optax.chain(optax.clip(1.0), optax.adamw(0.01), jp.track_importance())
    run = record(tx, params, gradients(params, 9))
    square = leaves(jp.get_importance(run.state).square)
    (nu,) = find(run.state, "nu")
    ratio = np.concatenate(
        [(s / n).ravel() for s, n in zip(square, leaves(nu), strict=True)]
    )
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-5)  # bias-corrected or not


def test_square_is_read_from_rmsprop_too():
    tx, params = optax.chain(optax.rmsprop(0.01), jp.track_importance()), weights()
    state = record(tx, params, gradients(params, 3)).state
    assert same_bits(jp.get_importance(state).square, find(state, "nu")[0])


def test_tracked_square_wins_over_adams():
    params = weights()
    grads = gradients(params, 9)
    tx = optax.chain(jp.track_gradients(), optax.adam(0.01), jp.track_importance())
    run = record(tx, params, grads)
    for s, g in zip(
        leaves(jp.get_importance(run.state).square), leaves(grads), strict=True
    ):
        np.testing.assert_allclose(s, oracles.mean_square(g), rtol=1e-5)


def test_untracked_statistics_are_none():
    params = weights()
    tx = optax.chain(optax.sgd(0.1), jp.track_importance())
    importance = jp.get_importance(tx.init(params))
    assert importance.magnitude is None
    assert importance.square is None
    assert importance.taylor is None


def test_extra_arguments_reach_their_reader():
    params = weights()
    tx = optax.chain(
        jp.track_gradients(),
        optax.adam(0.1),
        contrib.reduce_on_plateau(patience=1, factor=0.5),
        jp.track_importance(),
    )
    run = record(tx, params, gradients(params, 8), value=1.0, unknown_to_all=2)
    (scale,) = find(run.state, "scale")
    assert float(scale) < 1.0


def test_donated_state_and_parameters_share_no_buffer():
    params = weights()
    tx = optax.chain(jp.track_gradients(), optax.adam(0.1), jp.track_importance())
    grads = jax.tree.map(jnp.ones_like, params)
    chex.clear_trace_counter()

    @chex.assert_max_traces(n=1)
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    step = jax.jit(step, donate_argnums=(0, 1))
    state = tx.init(params)
    for _ in range(3):
        params, state = step(params, state, grads)
    importance = jp.get_importance(state)
    params, state = step(params, state, grads)
    assert importance.weight is not None


@pytest.mark.parametrize("every", [1, 3])
def test_init_is_abstract_and_its_types_never_change(every):
    params = weights(jnp.bfloat16)
    tracker = jp.track_importance(every=every, average=("weight", "magnitude"))
    tx = optax.chain(jp.track_gradients(), optax.adam(0.1), tracker)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    real = tx.init(params)
    shapes = jax.eval_shape(tx.init, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(real, shapes)
    chex.assert_trees_all_equal_shapes_and_dtypes(
        real, jax.eval_shape(tx.init, abstract)
    )
    _, new = jax.eval_shape(tx.update, params, real, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(real, new)


def test_tracker_must_see_the_parameters():
    params = weights()
    for tx in (jp.track_importance(), jp.track_gradients(average=("taylor",))):
        with pytest.raises(ValueError, match="param"):
            tx.update(params, tx.init(params))


def test_state_without_a_tracker_says_what_to_chain():
    for state in (optax.sgd(0.1, 0.9).init(weights()), (), None):
        with pytest.raises(ValueError, match=r"jp\.track_importance\(\)"):
            jp.get_importance(state)


def test_adam_alone_gives_its_square_and_nothing_else():
    params = weights()
    state = record(optax.adam(0.1), params, gradients(params, 3)).state
    importance = jp.get_importance(state)
    assert importance.weight is None
    assert same_bits(importance.square, find(state, "nu")[0])


def test_one_leaf_tracked_twice_is_refused():
    tx = optax.chain(jp.track_importance(), jp.track_importance())
    with pytest.raises(ValueError, match="track"):
        jp.get_importance(tx.init(weights()))


@pytest.mark.parametrize("track", [jp.track_importance, jp.track_gradients])
@pytest.mark.parametrize(
    ("bad", "word"),
    [
        ({"every": 0}, "every"),
        ({"every": -2}, "every"),
        ({"start": -1}, "start"),
        ({"average": ("median",)}, "median"),
        ({"average": ()}, "average"),
    ],
)
def test_bad_settings_are_refused(track, bad, word):
    with pytest.raises(ValueError, match=word):
        track(**bad)
