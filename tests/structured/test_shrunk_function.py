"""Smaller functions: what they compute, what is cut with them, what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import export
from jax.sharding import AxisType

import jaxprune as jp
from jaxprune.arrays import lazy as lazy_
from tests.support.removal import kept_weights, random_scores, zeroed
from tests.support.small_models import draw
from tests.support.small_models import quick_compilation as quick_compilation

X = draw(0, 3, 8)
PARAMS = {
    "down": draw(1, 6, 8),
    "head": draw(2, 8, 3),
    "stack": {"down": draw(3, 2, 4, 8), "up": draw(4, 2, 8, 4)},
    "up": draw(5, 8, 6),
}


def fn(params, x):
    """An MLP beside a residual stream, two layers in a scan, and a head."""
    x = x + jax.nn.relu(x @ params["up"]) @ params["down"]

    def layer(x, own):
        return x + jnp.tanh(x @ own["up"]) @ own["down"], None

    x, _ = jax.lax.scan(layer, x, params["stack"])
    return x @ params["head"]


run = jax.jit(fn)


def loss(f):
    return lambda params, x: jnp.mean(jnp.square(f(params, x)))


gradient_of_fn = jax.jit(jax.grad(loss(fn)))


@pytest.fixture(scope="module")
def small():
    return jp.shrink(fn, PARAMS, [X], jp.scores.magnitude, 0.5)


@pytest.fixture(scope="module")
def run_small(small):
    """The small function, compiled."""
    return jax.jit(small.fn)


@pytest.fixture(scope="module")
def dense(small):
    """The dense parameters with zeros for what was removed."""
    groups = jp.axis_groups(fn, PARAMS, X)
    kept = {name: np.array(units) for name, units in small.report["kept"].items()}
    return zeroed(PARAMS, groups, kept)


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


# What is kept.


def test_units_with_the_largest_scores_are_kept(small):
    score = np.abs(PARAMS["up"]).sum(0) + np.abs(PARAMS["down"]).sum(1)
    best = np.sort(np.argsort(-score)[:3])
    assert small.report["kept"]["down:0"] == best.tolist()
    np.testing.assert_array_equal(small.params["up"], PARAMS["up"][:, best])
    np.testing.assert_array_equal(small.params["down"], PARAMS["down"][best])


def test_each_layer_of_a_stack_keeps_its_own(small):
    for i, of in enumerate(PARAMS["stack"]["up"]):
        score = np.abs(of).sum(0) + np.abs(PARAMS["stack"]["down"][i]).sum(1)
        best = np.sort(np.argsort(-score)[:2])
        np.testing.assert_array_equal(small.params["stack"]["up"][i], of[:, best])


def test_of_equal_scores_the_first_are_kept():
    ones = jax.tree.map(np.ones_like, PARAMS)
    kept = jp.shrink(fn, PARAMS, [X], ones, keep={"down:0": 0.5}).report["kept"]
    assert kept == {"down:0": [0, 1, 2]}


def test_the_report_counts_parameters_bytes_and_flops(small):
    before, after = small.report["before"], small.report["after"]
    assert before["parameters"] == sum(x.size for x in jax.tree.leaves(PARAMS))
    assert after["parameters"] == sum(x.size for x in jax.tree.leaves(small.params))
    assert after["bytes"] == 4 * after["parameters"]
    # Each weight meets each of three rows once.
    assert before["flops"] == 2 * 3 * before["parameters"]
    assert after["flops"] == 2 * 3 * after["parameters"]
    assert small.report["groups"]["down:0"] == {"before": 6, "after": 3}


def test_experts_count_for_the_rows_they_are_given_and_stay_as_fast():
    params = {"up": draw(0, 4, 8, 6), "down": draw(1, 4, 6, 8)}
    batch = {"x": draw(2, 20, 8), "sizes": np.array([7, 0, 10, 3], np.int32)}

    def experts(p, batch):
        hidden = jax.nn.relu(jax.lax.ragged_dot(batch["x"], p["up"], batch["sizes"]))
        return jax.lax.ragged_dot(hidden, p["down"], batch["sizes"])

    groups = jp.axis_groups(experts, params, batch)
    assert {name for name, own in groups.kinds().items() if own[0].removable} == {
        "down:1"
    }
    small = jp.shrink(experts, params, [batch], jp.scores.magnitude, 0.5)
    assert [leaf.shape for leaf in small.params.values()] == [(4, 3, 8), (4, 8, 3)]
    assert small.report["before"]["flops"] == 2 * 20 * (8 * 6 + 6 * 8)
    assert small.report["after"]["flops"] == 2 * 20 * (8 * 3 + 3 * 8)
    kept = np.array(small.report["kept"]["down:1"])
    left = {"up": params["up"][:, :, kept], "down": params["down"][:, kept]}
    found = jax.jit(small.fn)(small.params, batch)
    np.testing.assert_allclose(found, jax.jit(experts)(left, batch), atol=1e-5)
    # As the model itself does: rows of each expert alone.
    assert "while" in str(jax.make_jaxpr(small.fn)(small.params, batch))


# What it computes.


def test_it_computes_what_zeros_compute(small, dense, run_small):
    close(run_small(small.params, X), run(dense, X))


def test_it_takes_batches_of_other_shapes(small, dense, run_small):
    x = draw(7, 2, 8)
    close(run_small(small.params, x), run(dense, x))


def test_it_takes_parameters_of_another_dtype(small, dense, run_small):
    half, zeros, x = jax.tree.map(
        lambda a: np.asarray(a).astype(jnp.bfloat16), (small.params, dense, X)
    )
    found = run_small(half, x)
    assert found.dtype == jnp.bfloat16
    found, expected = (np.asarray(y, np.float32) for y in (found, run(zeros, x)))
    np.testing.assert_allclose(found, expected, rtol=0.1, atol=0.5)


def test_its_gradient_is_that_of_what_is_kept(small, dense):
    found = jax.jit(jax.grad(loss(small.fn)))(small.params, X)
    expected = small.cut(gradient_of_fn(dense, X))
    jax.tree.map(close, found, expected)


def test_it_can_be_exported(small, dense):
    exported = export.export(jax.jit(small.fn))(small.params, X)
    close(exported.call(small.params, X), run(dense, X))


def test_lazy_leaves_and_abstract_ones_become_smaller_too():
    def lazy(leaf):
        return jp.LazyArray(leaf.shape, leaf.dtype, lambda: jnp.asarray(leaf))

    stored = jax.tree.map(lazy, PARAMS)
    scores = random_scores(PARAMS)
    found = jp.shrink(fn, stored, [X], scores, 0.5).params
    assert all(isinstance(leaf, jp.LazyArray) for leaf in jax.tree.leaves(found))
    found = lazy_.loaded(found)
    expected = jp.shrink(fn, PARAMS, [X], scores, 0.5).params
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    shapes = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, PARAMS))
    batch = jax.ShapeDtypeStruct(X.shape, X.dtype)
    small = jp.shrink(fn, shapes, [batch], scores, 0.5).params
    assert jax.tree.map(jnp.shape, small) == jax.tree.map(jnp.shape, expected)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharded_leaves_stay_sharded(kind):
    rng = np.random.default_rng(0)
    params = {"up": draw(0, 8, 32), "down": draw(1, 32, 6)}
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    specs = {"up": jax.P(None, "data"), "down": jax.P("data")}
    placed = {
        name: jax.device_put(leaf, jax.NamedSharding(mesh, specs[name]))
        for name, leaf in params.items()
    }

    def mlp(params, x):
        return jax.nn.relu(x @ params["up"]) @ params["down"]

    scores = jax.tree.map(lambda leaf: rng.random(leaf.shape, np.float32), params)
    small = jp.shrink(mlp, params, [X], scores, 0.5)
    for name, leaf in small.cut(placed).items():
        np.testing.assert_array_equal(leaf, small.params[name])
        assert leaf.sharding.is_equivalent_to(
            jax.NamedSharding(mesh, specs[name]), leaf.ndim
        )
        assert leaf.sharding.mesh == mesh


def test_numbers_and_keys_among_the_parameters_stay():
    params = {
        "down": draw(0, 6, 3),
        "key": jax.random.key(0),
        "rate": 0.5,
        "up": draw(1, 8, 6),
    }

    def noisy(params, x):
        noise = jax.random.normal(params["key"], (3,))
        wide = jnp.tanh(x @ params["up"]) * params["rate"]
        return wide @ params["down"] + noise[None]

    scores = random_scores({"down": params["down"], "up": params["up"]})
    scores |= {"key": optax.MaskedNode(), "rate": optax.MaskedNode()}
    small = jp.shrink(noisy, params, [X], scores, 0.5)
    assert small.params["rate"] == 0.5
    kept = small.report["kept"]["down:0"]
    by_hand = {"up": params["up"][:, kept], "down": params["down"][kept]}
    found = jax.jit(small.fn)(small.params, X)
    close(found, jax.jit(noisy)({**params, **by_hand}, X))


# What is cut with it.


def test_training_goes_on_with_the_same_state(small, dense):
    """A step of the small model is the step of the dense one whose zeros are held."""
    groups = jp.axis_groups(fn, PARAMS, X)
    kept = {name: np.array(units) for name, units in small.report["kept"].items()}
    masks = kept_weights(groups, kept)
    masks = jax.tree.unflatten(jax.tree.structure(PARAMS), list(masks.values()))
    tx = optax.chain(optax.adam(1e-2), jp.track_importance())
    update = jax.jit(tx.update)
    state = tx.init(dense)
    gradient = gradient_of_fn(dense, X)
    held = jax.tree.map(np.multiply, gradient, masks)
    _, state = update(held, state, dense)
    little = small.cut(state)
    assert little[0][0].mu["up"].shape == (8, 3)

    expected, _ = update(held, state, dense)
    gradient = jax.jit(jax.grad(loss(small.fn)))(small.params, X)
    found, _ = update(gradient, little, small.params)
    jax.tree.map(close, found, small.cut(expected))


def test_averages_in_one_byte_are_cut_too(small):
    params = jax.tree.map(jnp.asarray, PARAMS)
    tx = jp.track_importance(storage="int8")
    state = small.cut(tx.init(params))
    shapes = {leaf.shape for leaf in jax.tree.leaves(state)}
    assert (8, 3) in shapes
    assert (8, 6) not in shapes


def test_a_state_of_another_shape_is_refused(small):
    tx = optax.scale_by_factored_rms(min_dim_size_to_factor=2)
    with pytest.raises(ValueError, match=r"differs at .*up.*make it anew"):
        small.cut(tx.init(jax.tree.map(jnp.asarray, PARAMS)))


# Masks.


def whole_masks():
    masks = {
        "down": np.ones((6, 8), bool),
        "head": optax.MaskedNode(),
        "stack": {"down": np.ones((2, 4, 8), bool), "up": np.ones((2, 8, 4), bool)},
        "up": np.ones((8, 6), bool),
    }
    masks["down"][[1, 4]] = False
    masks["up"][:, [1, 4]] = False
    return masks


def test_masks_of_whole_units_make_it_smaller():
    result = jp.shrink(fn, PARAMS, [X], whole_masks())
    assert result.report["kept"] == {"down:0": [0, 2, 3, 5]}
    close(
        jax.jit(result.fn)(result.params, X),
        run(jp.masks.apply(PARAMS, whole_masks()), X),
    )


def test_masks_that_prune_single_weights_are_refused():
    masks = whole_masks()
    masks["up"][0, 0] = False
    with pytest.raises(ValueError, match="those of 'up' also prune single weights"):
        jp.shrink(fn, PARAMS, [X], masks)


def test_masks_that_prune_one_side_of_a_unit_are_refused():
    masks = whole_masks()
    masks["up"][:, 0] = False
    with pytest.raises(ValueError, match="also prune single weights"):
        jp.shrink(fn, PARAMS, [X], masks)


def test_masks_that_leave_layers_of_different_sizes_are_refused():
    masks = whole_masks()
    masks["stack"]["up"][0, :, 1] = False
    masks["stack"]["down"][0, 1] = False
    with pytest.raises(ValueError, match="must keep as many units in each"):
        jp.shrink(fn, PARAMS, [X], masks)


def test_masks_that_leave_nothing_of_a_group_are_refused():
    masks = whole_masks()
    masks["up"][:] = False
    masks["down"][:] = False
    with pytest.raises(ValueError, match="the masks prune all of 'down:0'"):
        jp.shrink(fn, PARAMS, [X], masks)


# What is refused.

SCORES = jp.scores.magnitude(PARAMS)


@pytest.mark.parametrize(
    ("keep", "told"),
    [
        (0.0, r"share in \(0, 1\] or a whole number .* got 'down:0' \(of 6: 0.0\)"),
        (1.1, "at least one unit: a share"),
        (0.05, "at least one unit"),
        ({"down:0": 7}, "a whole number of its units"),
        ({"nowhere*": 0.5}, "'nowhere\\*' match none of 'down:0'"),
        ({"head:1": 0.5}, "head:1: is an axis of the result"),
        (None, "needs keep, what stays of the units"),
        ({"parameters": 1.0}, r"a share in \(0, 1\), got"),
        ({"parameters": 0.01}, "within reach, but 0.01 of .* parameters is not"),
        ({"bytes": 0.5, "flops": 0.5}, "a budget is one measure"),
    ],
)
def test_what_cannot_stay_is_refused(keep, told):
    with pytest.raises(ValueError, match=told):
        jp.shrink(fn, PARAMS, [X], SCORES, keep)


def test_units_under_a_statistic_are_refused_with_its_name():
    def normed(params, x):
        wide = x @ params["up"]
        wide = (wide - wide.mean(-1, keepdims=True)) / wide.std(-1, keepdims=True)
        return wide @ params["down"]

    params = {"up": PARAMS["up"], "down": PARAMS["down"]}
    with pytest.raises(ValueError, match=r"match none of .*down:0: .*; print"):
        jp.shrink(normed, params, [X], jp.scores.magnitude, keep={"down:0": 0.5})


@pytest.mark.parametrize(
    "more", [{"keep": 0.5}, {"sizes": {"down:0": (1,)}}, {"groups": ["down:0"]}]
)
def test_masks_say_what_stays_by_themselves(more):
    with pytest.raises(ValueError, match="masks say it themselves, with neither keep"):
        jp.shrink(fn, PARAMS, [X], whole_masks(), **more)


def test_nan_scores_are_refused():
    scores = jax.tree.map(np.copy, random_scores(PARAMS))
    scores["up"][0, 0] = np.nan
    with pytest.raises(ValueError, match="must not be NaN, but those of 'down:0' are"):
        jp.shrink(fn, PARAMS, [X], scores, 0.5)


def test_groups_without_scores_are_refused():
    scores = random_scores(PARAMS)
    scores["up"] = scores["down"] = optax.MaskedNode()
    with pytest.raises(ValueError, match="but 'down:0' have none"):
        jp.shrink(fn, PARAMS, [X], scores, 0.5)


def test_the_dense_parameters_are_refused_by_the_small_function(small):
    with pytest.raises(ValueError, match=r"'up' \(\(8, 6\) for \(8, 3\)\)"):
        small.fn(PARAMS, X)
    with pytest.raises(ValueError, match="in the containers that shrink returned"):
        small.fn(list(small.params.values()), X)


def test_a_batch_that_ties_other_units_is_refused():
    def by_length(params, x):
        wide = jax.nn.relu(x @ params["up"])
        if len(x) == 2:
            wide = jax.nn.softmax(wide)
        return wide @ params["down"]

    params = {"up": PARAMS["up"], "down": PARAMS["down"]}
    small = jp.shrink(by_length, params, [X], random_scores(params), 0.5)
    with pytest.raises(ValueError, match="the same units for every batch"):
        small.fn(small.params, X[:2])


def test_a_tree_of_scores_and_masks_is_refused():
    mixed = {**SCORES, "up": SCORES["up"] > 0}
    with pytest.raises(ValueError, match="got a tree of both"):
        jp.shrink(fn, PARAMS, [X], mixed, 0.5)
