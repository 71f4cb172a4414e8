"""MaxText, Tunix, bonsai, Levanter: whichever axes a trainer keeps its weights on."""

import functools

import jax
import numpy as np
import optax
import pytest

import jaxprune as jp
from tests.support import removal
from tests.support.trainer_layouts import HEADS, KEYS, LAYERS, LAYOUTS, NEURONS, TOKENS

pytestmark = pytest.mark.jax_api

names = pytest.mark.parametrize("name", LAYOUTS)
some = pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name == "maxtext" else pytest.mark.full)
        for name in LAYOUTS
    ],
)


@functools.cache
def layout(name):
    return LAYOUTS[name]()


def groups_of_four(leaf, axes):
    """(..., inputs / 4, 4): consecutive inputs of each output, by hand."""
    rest = [a for a in range(leaf.ndim) if a not in axes.inputs]
    return np.transpose(leaf, (*rest, *axes.inputs)).reshape(
        *(leaf.shape[a] for a in rest), -1, 4
    )


@names
def test_each_matrix_is_seen_with_its_true_axes(name):
    fn, params, axes = layout(name)
    traced = jp.trace(fn, params, TOKENS)
    assert traced.axes() == axes
    # Seven matrices a layer, but for Tunix, which has keys and values in one; a head.
    count = LAYERS * (6 if name == "tunix" else 7) + 1
    assert len(traced.linear_ops) == count


@names
def test_what_may_be_pruned_is_the_layers_matrices(name):
    params, axes = layout(name)[1:]
    pruned = {
        path
        for path, leaf in jp.tree.named_leaves(params).items()
        if jp.tree.prunable(path, leaf)
    }
    assert pruned == set(axes)


@pytest.mark.full
@some
def test_two_of_four_are_kept_along_the_true_inputs(name):
    fn, params, axes = layout(name)
    scores = jp.scores.magnitude(params)
    masks = jp.masks.make(
        scores, pattern="2:4", axes=jp.trace(fn, params, TOKENS).axes()
    )
    leaves = jp.tree.named_leaves(params)
    for path, mask in jp.tree.named_leaves(masks).items():
        if path not in axes:
            assert jp.tree.is_excluded(mask)
            continue
        kept = groups_of_four(np.asarray(mask), axes[path])
        size = np.abs(groups_of_four(np.asarray(leaves[path]), axes[path]))
        np.testing.assert_array_equal(kept, size >= np.sort(size, -1)[..., 2:3])
        assert (kept.sum(-1) == 2).all()


@pytest.mark.full
@names
def test_it_is_pruned_while_it_trains(name):
    fn, params, axes = layout(name)
    tx = jp.gradual(
        optax.adamw(1e-2), {1: "2:4"}, axes=jp.trace(fn, params, TOKENS).axes()
    )

    def loss(params):
        logits = fn(params, TOKENS[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(
            logits, TOKENS[:, 1:]
        ).mean()

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    after, state = params, jax.jit(tx.init)(params)
    for _ in range(3):
        after, state = step(after, state)
    assert jax.tree.structure(after) == jax.tree.structure(params)
    for path, leaf in jp.tree.named_leaves(after).items():
        if path in axes:
            zeros = groups_of_four(np.asarray(leaf), axes[path]) == 0
            assert (zeros.sum(-1) == 2).all()
        else:
            assert (np.asarray(leaf) != 0).all()


@pytest.mark.full
@names
def test_a_solver_leaves_two_of_four_along_the_true_inputs(name):
    fn, params, axes = layout(name)
    found = jp.prune_trained(fn, params, [TOKENS], jp.passes.sparsegpt(pattern="2:4"))
    for path, leaf in jp.tree.named_leaves(found.params).items():
        if path in axes:
            kept = groups_of_four(np.asarray(leaf), axes[path]) != 0
            assert (kept.sum(-1) == 2).all()


@pytest.mark.full
@names
def test_it_becomes_smaller_by_heads_and_neurons(name):
    fn, params, axes = layout(name)
    found = removal.check(fn, params, TOKENS, 0.5)[1]
    units = sorted(own["before"] for own in found.report["groups"].values())
    assert units == sorted([KEYS, NEURONS] * LAYERS)
    small = jp.tree.named_leaves(found.params)
    for path, leaf in jp.tree.named_leaves(params).items():
        # Key heads, each with its queries, or neurons: one axis of each matrix.
        assert small[path].size == leaf.size // (2 if path in axes else 1)
    assert HEADS > KEYS
