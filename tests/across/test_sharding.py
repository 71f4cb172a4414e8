"""On eight devices: the same bits as on one, sharded as before."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxprune as jp
from tests.support.trajectories import same_bits

AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
KINDS = [AUTO, pytest.param(EXPLICIT, marks=pytest.mark.full)]
SPECS = {
    "a": P("x"),  # inputs
    "m": P(None, "y"),  # outputs
    "n": P("x", "y"),
    "o": P(),
    "s": P(None, "x", "y"),  # stacked layers
    "bias": P(("x", "y")),
}
SHAPES = {
    "a": (16, 8),
    "m": (8, 16),
    "n": (24, 16),
    "o": (8, 8),
    "s": (2, 8, 4),
    "bias": (16,),
}

pytestmark = [
    pytest.mark.jax_api,
    pytest.mark.skipif(
        len(jax.devices()) < 8, reason="needs the eight CPU devices of conftest.py"
    ),
]


def on_one_device():
    rng = np.random.default_rng(0)
    return {
        k: jnp.asarray(np.round(rng.normal(size=s), 1), jnp.float32)  # with ties
        for k, s in SHAPES.items()
    }


def spread(tree, kind):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind, kind))
    return {
        k: jax.device_put(v, NamedSharding(mesh, SPECS[k])) for k, v in tree.items()
    }


def assert_sharded_as(tree, reference):
    for name, x in tree.items():
        if isinstance(x, jax.Array):
            expected = reference[name].sharding
            assert x.sharding.is_equivalent_to(expected, x.ndim), name


def local(tree):
    return jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), tree)


def optimizer():
    return optax.chain(
        jp.track_gradients(average=("square", "taylor")),
        optax.adamw(0.125),
        jp.track_importance(average=("weight", "magnitude")),
    )


def trained(tx, params, steps=3):
    """Elementwise work only, so that the number of devices can change no bit."""

    @jax.jit
    def step(params, state):
        grads = jax.tree.map(lambda w: w * 0.5 + 0.25, params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(steps):
        params, state = step(params, state)
    return params, state


@functools.cache
def watched(kind=None, steps=3):
    """Parameters and state after steps on one device or on a mesh."""
    one = on_one_device()
    return trained(optimizer(), one if kind is None else spread(one, kind), steps)


@pytest.fixture(params=KINDS, ids=str)
def kind(request):
    return request.param


def test_make_mesh_is_explicit_unless_told_otherwise():
    assert jax.make_mesh((8,), ("x",)).axis_types == (AxisType.Explicit,)


@pytest.mark.full
def test_averages_are_sharded_as_the_parameters(kind):
    params = spread(on_one_device(), kind)
    for init in (optimizer().init, jax.jit(optimizer().init)):
        for average in jp.get_importance(init(params)):
            assert_sharded_as(average, params)
    after, state = watched(kind)
    assert_sharded_as(after, params)
    for average in jp.get_importance(state):
        assert_sharded_as(average, params)


@pytest.mark.full
def test_averages_have_the_bits_of_one_device(kind):
    (_, one), (_, many) = watched(), watched(kind)
    assert same_bits(local(jp.get_importance(many)), local(jp.get_importance(one)))


CRITERIA = [
    *(
        "preconditioned_magnitude",
        "magnitude",
        "averaged_weight",
        "averaged_magnitude",
        "obd",
    ),
    *("taylor", "random"),
]


@jax.jit
def every_score(params, importance):
    return {name: getattr(jp.scores, name)(params, importance) for name in CRITERIA}


@pytest.mark.full
@pytest.mark.parametrize(
    ("kind", "outside_of_jit"),
    [
        # The others are as elementwise, but for the drawn numbers.
        (AUTO, ["preconditioned_magnitude", "random"]),
        (EXPLICIT, CRITERIA),
    ],
)
def test_scores_keep_the_sharding_and_the_bits(kind, outside_of_jit):
    params, state = watched(steps=1)
    importance = jp.get_importance(state)
    sharded = spread(params, kind)
    held = jp.Importance(*[spread(tree, kind) for tree in importance])
    for name in outside_of_jit:
        assert_sharded_as(getattr(jp.scores, name)(sharded, held), sharded)
    found, expected = every_score(sharded, held), every_score(params, importance)
    for name in CRITERIA:
        assert_sharded_as(found[name], sharded)
        assert same_bits(local(found[name]), local(expected[name])), name


@pytest.mark.full
@pytest.mark.parametrize(
    ("kind", "jitted", "allocation"),
    [
        (AUTO, True, "global"),
        pytest.param(EXPLICIT, True, "layer", marks=pytest.mark.full),
        pytest.param(EXPLICIT, False, "global", marks=pytest.mark.full),
        pytest.param(AUTO, False, "layer", marks=pytest.mark.full),
    ],
)
def test_masks_and_prune_keep_the_sharding_and_the_bits(kind, allocation, jitted):
    one = on_one_device()
    many = spread(one, kind)

    def both(params):
        scores = jp.scores.magnitude(params)
        masks = jp.masks.make(scores, 0.6, allocation=allocation)
        return masks, jp.prune(params, scores, 0.6, allocation=allocation)

    run = jax.jit(both) if jitted else both
    masks, pruned = run(many)
    assert_sharded_as(masks, many)
    assert_sharded_as(pruned, many)
    expected_masks, expected = both(one)
    assert same_bits(local(masks), expected_masks)
    assert same_bits(local(pruned), expected)


@pytest.mark.full
@pytest.mark.parametrize(
    ("kind", "jitted", "pattern"),
    [
        (EXPLICIT, False, jp.patterns.NM(2, 4)),
        (AUTO, True, jp.patterns.NM(2, 4)),
        (AUTO, False, jp.patterns.Block(4, 2)),
        (EXPLICIT, True, jp.patterns.Block(4, 2)),
        (EXPLICIT, False, jp.patterns.Channel()),
        (AUTO, True, jp.patterns.Channel()),
    ],
    ids=str,
)
def test_patterns_keep_the_sharding_and_the_bits(kind, jitted, pattern):
    one = {k: on_one_device()[k] for k in ("a", "m", "n", "s")}
    many = spread(one, kind)

    def both(params):
        scores = jp.scores.magnitude(params)
        masks = jp.masks.make(scores, 0.5, pattern=pattern)
        return masks, jp.prune(params, scores, 0.5, pattern=pattern)

    masks, pruned = (jax.jit(both) if jitted else both)(many)
    expected_masks, expected = both(one)
    assert same_bits(local(masks), expected_masks)
    assert same_bits(local(pruned), expected)
    assert_sharded_as(masks, many)
    assert_sharded_as(pruned, many)


@pytest.mark.full
def test_block_tiles_may_cross_the_edge_of_a_device(kind):
    one = {"n": on_one_device()["n"]}
    many = spread(one, kind)
    pattern = jp.patterns.Block(5, 3)
    expected = jp.prune(one, jp.scores.magnitude(one), 0.5, pattern=pattern)
    scores = jp.scores.magnitude(many)
    pruned = jp.prune(many, scores, 0.5, pattern=pattern)
    assert same_bits(local(pruned), expected)


@functools.cache
def retrained(kind=None):
    params = on_one_device() if kind is None else spread(on_one_device(), kind)
    masks = jp.masks.make(jp.scores.magnitude(params), 0.5)
    return masks, *trained(jp.keep_masks(optimizer(), masks), params)


@pytest.mark.full
def test_kept_masks_are_sharded_and_hold(kind):
    many = spread(on_one_device(), kind)
    masks, params, state = retrained(kind)
    assert_sharded_as(params, many)
    for average in jp.get_importance(state):
        assert_sharded_as(average, many)
    for name, mask in masks.items():
        if isinstance(mask, jax.Array):
            kept = np.asarray(params[name]) != 0
            np.testing.assert_array_equal(kept, np.asarray(mask))
    assert same_bits(local(params), local(retrained()[1]))


@pytest.mark.full
def test_packing_and_threshold_work_on_many_devices(kind):
    one = on_one_device()
    many = spread(one, kind)
    make = lambda p: jp.masks.above(  # noqa: E731
        jp.scores.threshold(p, jp.Importance(weight=p)), 0.5
    )
    masks = make(many)
    np.testing.assert_array_equal(
        np.asarray(masks["n"]), np.abs(one["n"]) > 0.5 * np.std(one["n"])
    )
    assert same_bits(local(jp.masks.unpack(jp.masks.pack(masks))), local(masks))
