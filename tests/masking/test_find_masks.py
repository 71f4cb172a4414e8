"""Masks of a state: found, replaced, packed, compared."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp
from jaxprune.masking.packed_mask import PackedMask
from tests.support.compilations import compiled
from tests.support.trajectories import gradients, record, same_bits, weights


def half(params):
    return jp.masks.make(jp.scores.magnitude(params), 0.5)


def test_packed_masks_take_an_eighth_and_change_no_bit():
    params = weights()
    masks, grads = half(params), gradients(params, 8)
    plain = record(jp.keep_masks(optax.adamw(0.1), masks), params, grads)
    tx = jp.keep_masks(optax.adamw(0.1), masks, packed=True)
    packed = record(tx, params, grads)
    assert same_bits(packed.weights, plain.weights)
    assert isinstance(packed.state.masks["layer"]["kernel"], PackedMask)
    assert same_bits(jp.masks.get(packed.state), jp.masks.get(plain.state))
    big = {"w": jnp.ones((64, 64))}
    held = jp.gradual(optax.sgd(0.1), {1: 0.5}, criterion=jp.scores.magnitude)
    small = jp.gradual(
        optax.sgd(0.1), {1: 0.5}, criterion=jp.scores.magnitude, packed=True
    )
    size = lambda tx: sum(x.nbytes for x in jax.tree.leaves(tx.init(big).masks))  # noqa: E731
    assert (size(held), size(small)) == (4096, 512)


@pytest.mark.parametrize("packed", [False, True])
def test_replaced_masks_are_those_of_the_next_step(packed):
    params = weights()
    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        jp.keep_masks(optax.adamw(0.1), half(params), packed=packed),
    )
    state = tx.init(params)
    mask = np.arange(12).reshape(4, 3) % 3 == 0
    kept = jnp.asarray(mask)
    other = {"layer": {"kernel": kept, "bias": None}, "token_embedding": True}
    state = jp.masks.replace(state, other)
    updates, state = jax.jit(tx.update)(params, state, params)
    before, step = (np.asarray(x["layer"]["kernel"]) for x in (params, updates))
    np.testing.assert_array_equal(before + step != 0, mask)
    np.testing.assert_array_equal(jp.masks.get(state)["layer"]["kernel"], mask)


def test_a_loop_that_replaces_masks_compiles_its_step_once():
    params = weights()
    tx = jp.keep_masks(optax.adamw(0.1), half(params))
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(params, state, params)
        return optax.apply_updates(params, updates), state

    found = []
    for _ in range(3):
        state = jp.masks.replace(state, half(params))
        with compiled() as programs:
            params, state = step(params, state)
        found.append(len(programs))
    assert found == [1, 0, 0]


def test_what_cannot_be_found_or_replaced_is_refused_in_one_sentence():
    params = weights()
    masks = half(params)
    state = jp.keep_masks(optax.adamw(0.1), masks).init(params)
    everywhere = jax.tree.map(lambda x: jnp.ones(x.shape, bool), params)
    nested = jp.keep_masks(jp.keep_masks(optax.sgd(0.1), masks), masks).init(params)
    cases = [
        (lambda: jp.masks.get(optax.adamw(0.1).init(params)), "holds no masks"),
        (lambda: jp.masks.get((state, state)), "each leaf must have one mask"),
        (lambda: jp.masks.replace(state, {"w": jnp.ones(3, bool)}), "unknown 'w'"),
        (lambda: jp.masks.replace(state, everywhere), "'layer/bias'"),
    ]
    for call, says in cases:
        with pytest.raises(ValueError, match=says) as caught:
            call()
        assert not str(caught.value).endswith(".")
    # The outer one's masks hold the inner one's state, which is not looked into.
    assert same_bits(jp.masks.get(nested), jp.masks.get(state))
    with pytest.raises(TypeError, match="boolean"):
        jp.masks.replace(state, params)


def test_overlap_is_counted_exactly_leaf_by_leaf():
    random = np.random.default_rng(0)
    one = {"a": random.random((40, 30)) > 0.5, "b": random.random((7,)) > 0.5}
    two = {"a": random.random((40, 30)) > 0.5, "b": optax.MaskedNode()}
    found = jp.masks.overlap(one, two)
    both, either = (one["a"] & two["a"]).sum(), (one["a"] | two["a"]).sum()
    assert found.by_leaf == {"a": (both, either)}
    assert found.total == both / either
    assert str(found).splitlines()[-1].startswith("total")
    assert jp.masks.overlap(one, one).total == 1.0
    assert jp.masks.overlap({"a": one["a"]}, {"a": ~one["a"]}).total == 0.0
    none = {"a": np.zeros((3, 3), bool)}
    assert jp.masks.overlap(none, none).total == 1.0
    with pytest.raises(ValueError, match="unknown 'b'"):
        jp.masks.overlap({"a": one["a"]}, one)
    with pytest.raises(TypeError, match="boolean"):
        jp.masks.overlap(one, jax.tree.map(np.float32, one))


def test_replaced_masks_are_copies_that_a_step_may_be_given():
    params = weights()
    tx, masks = jp.keep_masks(optax.sgd(0.1), half(params)), half(params)
    state = jp.masks.replace(tx.init(params), masks)
    step = jax.jit(tx.update, donate_argnums=1)
    step(params, state, params)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(masks))


@pytest.mark.parametrize("kind", ["numpy", "committed"])
def test_masks_from_elsewhere_leave_the_step_compiled(kind):
    params = weights()
    tx = jp.keep_masks(optax.sgd(0.1), half(params))
    before, masks = tx.init(params), half(params)
    here = jax.devices()[0]
    elsewhere = np.asarray if kind == "numpy" else lambda x: jax.device_put(x, here)
    state = jp.masks.replace(before, jax.tree.map(elsewhere, masks))
    assert same_bits(jp.masks.get(state), masks)
    step = jax.jit(tx.update)
    step(params, before, params)
    with compiled() as programs:
        step(params, state, params)
    assert not programs


@pytest.mark.parametrize("empty", [None, {}])
def test_two_transformations_may_share_an_empty_part(empty):
    params = {"a": jnp.ones((2, 4)), "b": jnp.ones((2, 4)), "c": empty}
    own = jp.keep_masks(optax.sgd(0.1), {k: np.eye(2, 4, dtype=bool) for k in "ab"})
    tx = optax.partition({"x": own, "y": own}, {"a": "x", "b": "y", "c": empty})
    found = jp.masks.get(tx.init(params))
    assert found["c"] == empty
    assert same_bits([found["a"], found["b"]], [np.eye(2, 4, dtype=bool)] * 2)


def test_masks_of_leaves_that_another_optimizer_trains_are_left_out():
    params, masks = {"w": jnp.ones((2, 4))}, {"w": np.eye(2, 4, dtype=bool)}
    own = {"x": jp.keep_masks(optax.sgd(0.1), masks), "y": optax.sgd(0.1)}
    tx = optax.partition(own, lambda params: "y")
    assert not jax.tree.leaves(jp.masks.get(tx.init(params)))


def test_packed_masks_of_models_that_vmap_stacks_are_all_counted():
    tx = jp.keep_masks(optax.sgd(0.1), {"w": np.eye(4, 12, dtype=bool)}, packed=True)
    state = jax.vmap(lambda w: tx.init({"w": w}))(jnp.ones((3, 4, 12)))
    assert jp.sparsity(state.masks).total == 1 - 12 / 144
    found = jp.masks.get(state)["w"]
    assert same_bits([found], [np.stack([np.eye(4, 12, dtype=bool)] * 3)])


def test_committed_masks_leave_the_second_step_compiled():
    params = weights()
    masks = jax.device_put(half(params), jax.devices()[0])
    tx = jp.keep_masks(optax.sgd(0.1), masks)
    step, state = jax.jit(tx.update), tx.init(params)
    _, state = step(params, state, params)
    with compiled() as programs:
        step(params, state, params)
    assert not programs
