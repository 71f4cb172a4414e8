"""keep_masks: what is pruned stays exactly zero at every step, moments too."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from optax import contrib

import jaxprune as jp
from tests.support.trajectories import (
    Module,
    array,
    containers,
    find,
    gradients,
    leaves,
    record,
    same_bits,
    weights,
)


def drawn(*shape):
    return jnp.asarray(np.random.default_rng(3).normal(size=shape), jnp.float32)


def half(params, prunable=jp.tree.prunable):
    return jp.masks.make(jp.scores.magnitude(params, prunable=prunable), 0.5)


def removed(tree, masks):
    """The entries of the matrix that the mask removes."""
    kernel, mask = tree["layer"]["kernel"], np.asarray(masks["layer"]["kernel"])
    return array(kernel)[..., ~mask]


def adamw():
    return optax.chain(
        optax.clip_by_global_norm(0.5),
        optax.adamw(optax.cosine_decay_schedule(1e-2, 1000), weight_decay=0.1),
        jp.track_importance(),
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_thousand_steps_of_adamw_leave_pruned_weights_at_zero(dtype):
    params = weights(dtype)
    masks = half(params)
    params = jp.masks.apply(params, masks)
    tx = jp.keep_masks(adamw(), masks)
    run = record(tx, params, gradients(params, 1000))
    assert removed(run.weights, masks).shape == (1000, 6)
    assert not removed(run.weights, masks).any()
    assert not removed(run.updates, masks).any()
    for name in ("mu", "nu"):
        (moment,) = find(run.state, name)
        assert not removed(moment, masks).any()
        assert np.count_nonzero(array(moment["layer"]["kernel"])) == 6
    average = jp.get_importance(run.state).weight
    assert not removed(average, masks).any()
    moved = array(run.params["layer"]["kernel"]) != array(params["layer"]["kernel"])
    np.testing.assert_array_equal(moved, np.asarray(masks["layer"]["kernel"]))
    assert np.all(array(run.params["layer"]["bias"]) != array(params["layer"]["bias"]))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_first_step_zeroes_weights_that_were_not_pruned_yet(dtype):
    params = weights(dtype)
    masks = half(params)
    run = record(jp.keep_masks(optax.adamw(0.1), masks), params, gradients(params, 3))
    assert removed(params, masks).all()
    assert not removed(run.weights, masks).any()
    (mu,) = find(run.state, "mu")
    assert not removed(mu, masks).any()


def test_clipping_sees_the_masked_gradient():
    """Equal to training only the kept weights, as a vector, with the same optimizer."""
    dense = {"kernel": drawn(6, 4)}
    masks = half(dense)
    mask = np.asarray(masks["kernel"])
    grads = gradients(dense, 60)
    clipped = optax.chain(optax.clip_by_global_norm(0.01), optax.adamw(0.05))
    full = record(jp.keep_masks(clipped, masks), jp.masks.apply(dense, masks), grads)
    small = record(
        clipped,
        {"kernel": np.asarray(dense["kernel"])[mask]},
        {"kernel": np.asarray(grads["kernel"])[:, mask]},
    )
    np.testing.assert_allclose(
        array(full.weights["kernel"])[:, mask],
        array(small.weights["kernel"]),
        rtol=0,
        atol=1e-5,  # the norm's sum has another order, and Adam divides by it
    )


def test_plain_gradient_descent_is_bit_for_bit_that_of_the_kept_weights():
    dense = {"kernel": drawn(6, 4)}
    masks = half(dense)
    mask = np.asarray(masks["kernel"])
    grads = gradients(dense, 20)
    tx = optax.sgd(0.125)  # exact products: no fusion can change a bit
    full = record(jp.keep_masks(tx, masks), jp.masks.apply(dense, masks), grads)
    small = record(
        tx,
        {"kernel": np.asarray(dense["kernel"])[mask]},
        {"kernel": np.asarray(grads["kernel"])[:, mask]},
    )
    np.testing.assert_array_equal(
        array(full.params["kernel"])[mask], array(small.params["kernel"])
    )


def test_non_finite_gradients_of_pruned_weights_do_no_harm():
    params = weights()
    masks = half(params)
    mask = np.asarray(masks["layer"]["kernel"])
    params = jp.masks.apply(params, masks)
    grads = gradients(params, 4)
    bad = np.where(mask, grads["layer"]["kernel"], np.float32(np.nan))
    bad[2] = np.where(mask, bad[2], np.inf)
    grads["layer"]["kernel"] = jnp.asarray(bad)
    run = record(jp.keep_masks(adamw(), masks), params, grads)
    assert all(np.isfinite(x).all() for x in leaves(run.weights))
    assert not removed(run.weights, masks).any()


def test_extra_arguments_reach_the_inner_optimizer():
    params = weights()
    inner = optax.chain(optax.adam(0.1), contrib.reduce_on_plateau(patience=1))
    tx = jp.keep_masks(inner, half(params))
    run = record(tx, params, gradients(params, 8), value=1.0)
    (scale,) = find(run.state, "scale")
    assert float(scale) < 1.0


def test_extra_arguments_are_dropped_before_an_optimizer_without_them():
    params = weights()
    tx = jp.keep_masks(optax.sgd(0.1), half(params))
    updates = jax.eval_shape(
        lambda p: tx.update(p, tx.init(p), p, value=1.0, other=2)[0], params
    )
    assert jax.tree.structure(updates) == jax.tree.structure(params)


def test_donating_the_state_does_not_take_the_masks_away():
    params = weights()
    masks = half(params)
    tx = jp.keep_masks(optax.adam(0.1), masks)
    chex.clear_trace_counter()

    @chex.assert_max_traces(n=1)
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    step = jax.jit(step, donate_argnums=(0, 1))
    for _ in range(2):  # a second init, after the first state is gone
        fresh = weights()
        state = tx.init(fresh)
        for _ in range(3):
            fresh, state = step(fresh, state, jax.tree.map(jnp.ones_like, params))
        assert not removed(fresh, masks).any()
    assert same_bits(masks, half(params))


def test_masks_are_state_and_no_constants_of_the_program():
    params = weights()
    tx = jp.keep_masks(optax.adam(0.1), half(params))
    state = tx.init(params)
    traced = jax.make_jaxpr(lambda g, s, p: tx.update(g, s, p))(params, state, params)
    assert all(np.size(x) <= 1 for x in traced.consts)
    _, after = jax.jit(tx.update)(params, state, params)
    masks = [x for x in jax.tree.leaves(state) if x.shape == (4, 3) and x.dtype == bool]
    kept = [x for x in jax.tree.leaves(after) if x.shape == (4, 3) and x.dtype == bool]
    assert same_bits(masks, kept)
    assert len(masks) == 1


def test_init_is_abstract_and_types_never_change():
    params = weights(jnp.bfloat16)
    tx = jp.keep_masks(adamw(), half(params))
    state = tx.init(params)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    for other in (jax.eval_shape(tx.init, params), jax.eval_shape(tx.init, abstract)):
        chex.assert_trees_all_equal_shapes_and_dtypes(state, other)
    updates, new = jax.eval_shape(tx.update, params, state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, new)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)


@pytest.mark.parametrize("name", containers())
def test_every_kind_of_tree_keeps_its_masks(name):
    params = containers()[name]
    masks = half(params, lambda name, leaf: True)
    run = record(jp.keep_masks(optax.adamw(0.1), masks), params, gradients(params, 4))
    assert jax.tree.structure(run.params) == jax.tree.structure(params)
    kept = [np.asarray(m) for m in jax.tree.leaves(masks)]
    for w, mask in zip(leaves(run.params), kept, strict=True):
        np.testing.assert_array_equal(w != 0, mask)


def test_nnx_optimizer_keeps_its_model_sparse():
    model = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
    params = nnx.state(model, nnx.Param)
    masks = half(params)
    tx = jp.keep_masks(optax.chain(optax.adamw(0.1), jp.track_importance()), masks)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        loss = lambda m: (m(jnp.ones((2, 4))) ** 2).mean()  # noqa: E731
        optimizer.update(model, nnx.grad(loss)(model))

    for _ in range(3):
        step(model, optimizer)
    assert np.count_nonzero(np.asarray(model.kernel[...])) == 8
    importance = jp.get_importance(optimizer)
    assert np.count_nonzero(leaves(importance.weight)[1]) == 8


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: optax.apply_if_finite(tx, 2),
        lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
        lambda tx: optax.chain(optax.clip(1.0), tx),
        lambda tx: optax.masked(
            tx, {"layer": {"kernel": True, "bias": True}, "token_embedding": True}
        ),
    ],
    ids=["apply_if_finite", "MultiSteps", "chain", "masked"],
)
def test_works_inside_optax_containers(wrap):
    params = weights()
    masks = half(params)
    params = jp.masks.apply(params, masks)
    run = record(
        wrap(jp.keep_masks(optax.adamw(0.1), masks)), params, gradients(params, 6)
    )
    assert not removed(run.weights, masks).any()
    assert array(run.params["layer"]["kernel"]).any()


def test_parameters_are_needed():
    params = weights()
    tx = jp.keep_masks(optax.sgd(0.1), half(params))
    with pytest.raises(ValueError, match="param"):
        tx.update(params, tx.init(params))


def test_masks_of_a_pattern_stay_a_pattern():
    params = {"kernel": drawn(8, 4)}
    scores = jp.scores.magnitude(params)
    masks = jp.masks.make(scores, pattern=jp.patterns.NM(2, 4))
    run = record(jp.keep_masks(optax.adam(0.1), masks), params, gradients(params, 9))
    groups = array(run.params["kernel"]).reshape(2, 4, 4)
    assert np.all((groups != 0).sum(1) == 2)


def test_a_dataclass_of_masks_fits_a_dataclass_of_parameters():
    params = Module(jnp.ones((2, 2)), jnp.ones((2,)))
    masks = Module(jnp.asarray(np.eye(2, dtype=bool)), optax.MaskedNode())
    run = record(jp.keep_masks(optax.sgd(0.1), masks), params, gradients(params, 2))
    np.testing.assert_array_equal(array(run.params.kernel) != 0, np.eye(2, dtype=bool))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_first_step_zeroes_weights_that_the_updates_cannot_hold(dtype):
    large = 5.1e4 if dtype == "float16" else 1e5
    params = {"w": jnp.asarray(np.array([1.23, 5.1, large, -1e-3, 2.0]), dtype)}
    masks = {"w": jnp.array([False, False, False, False, True])}
    tx = jp.keep_masks(optax.identity(), masks)
    narrow = ["bfloat16", "float16", "float8_e4m3fn"]

    @jax.jit
    def after(params, gradients):
        updates = [tx.update(g, tx.init(params), params)[0] for g in gradients]
        return [optax.apply_updates(params, step)["w"] for step in updates]

    gradients = [{"w": jnp.asarray(np.ones(5), kind)} for kind in narrow]
    for kind, found in zip(narrow, after(params, gradients), strict=True):
        assert found.dtype == dtype
        assert array(found).tolist() == [0, 0, 0, 0, 3], kind


def test_wider_updates_of_narrow_weights_stay_as_wide_as_they_were():
    params = {"w": jnp.asarray(np.array([1.23, 5.1]), jnp.bfloat16)}
    tx = jp.keep_masks(optax.identity(), {"w": jnp.array([False, True])})
    gradient = {"w": jnp.asarray(np.full(2, 1e-3, np.float32))}

    @jax.jit
    def step(gradient, params):
        updates, _ = tx.update(gradient, tx.init(params), params)
        return updates, optax.apply_updates(params, updates)

    updates, after = step(gradient, params)
    assert updates["w"].dtype == jnp.float32
    assert array(after["w"])[0] == 0


def test_lookahead_inside_keeps_fast_and_slow_weights_at_zero():
    plain = {"w": jnp.asarray(np.arange(1.0, 5.0), jnp.float32)}
    params = optax.LookaheadParams.init_synced(plain)
    mask = {"w": jnp.array([True, False, True, False])}
    inner = optax.lookahead(optax.adam(0.1), sync_period=2, slow_step_size=0.5)
    tx = jp.keep_masks(inner, optax.LookaheadParams(mask, mask))

    @jax.jit
    def step(params, state):
        updates, state = tx.update(plain, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(5):
        params, state = step(params, state)
        for half in params:
            assert (array(half["w"]) == 0).tolist() == [False, True, False, True]


@pytest.mark.parametrize(
    "name",
    [
        *("keep_masks", "int8"),
        pytest.param("lora", marks=pytest.mark.full),
        pytest.param("track_importance", marks=pytest.mark.full),
    ],
)
def test_the_parameters_place_in_a_state_is_found_by_optax(name):
    """Moments are doubled by `map_params`, counters are not."""
    params = {"w": jnp.ones((4, 4)), "b": jnp.ones(4)}
    masks = {"w": np.ones((4, 4), bool), "b": optax.MaskedNode()}
    tx = {
        "keep_masks": jp.keep_masks(optax.adam(0.1), masks),
        "lora": jp.contrib.lora(optax.adam(0.1), rank=2),
        "track_importance": optax.chain(optax.adam(0.1), jp.track_importance()),
        "int8": optax.chain(optax.adam(0.1), jp.track_importance(storage="int8")),
    }[name]
    state = jax.jit(lambda p: tx.update(p, tx.init(p), p)[1])(params)
    state = jax.device_get(state)
    mapped = optax.tree.map_params(tx, lambda x: x + x, state)
    assert jax.tree.structure(mapped) == jax.tree.structure(state)
    for field in ("mu", "nu"):
        (own,), (new,) = find(state, field), find(mapped, field)
        assert same_bits(jax.tree.map(lambda x: 2 * x, own), new)
    assert int(find(mapped, "count")[0]) == 1
