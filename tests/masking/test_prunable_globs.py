"""Globs in the place of a rule: the matrices that match, wherever a rule goes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp

PARAMS = {
    "a": {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)},
    "head": {"kernel": jnp.arange(1.0, 17.0).reshape(4, 4)},
}


def pruned_names(tree):
    named = jp.tree.named_leaves(tree)
    return {name for name, leaf in named.items() if hasattr(leaf, "shape")}


def model(params, x):
    return jnp.tanh(x @ params["a"]["kernel"]) @ params["head"]["kernel"]


@pytest.mark.parametrize(
    ("globs", "names"),
    [
        ("a/*", {"a/kernel"}),
        ("head/*", {"head/kernel"}),
        (["a/*", "head/kernel"], {"a/kernel", "head/kernel"}),
        ("*", {"a/kernel", "head/kernel"}),
    ],
)
def test_a_glob_means_the_matrices_that_it_matches(globs, names):
    scores = jp.scores.magnitude(PARAMS, prunable=globs)
    assert pruned_names(scores) == names
    rows = jp.tree.explain(PARAMS, prunable=globs)
    assert {row.name for row in rows if row.pruned} == names
    tx = jp.gradual(optax.adam(1e-2), {1: 0.5}, prunable=globs)
    assert pruned_names(jp.masks.get(tx.init(PARAMS))) == names
    lora = jp.contrib.lora(optax.sgd(0.1), 1, targets=globs)
    assert len(jax.tree.leaves(lora.init(PARAMS))) == 2 * len(names)
    result = jp.prune_trained(
        model,
        PARAMS,
        [np.ones((2, 4), np.float32)],
        "magnitude",
        sparsity=0.5,
        prunable=globs,
    )
    assert {row["name"] for row in result.report["weights"]} == names


@pytest.mark.parametrize(
    ("prunable", "error", "sentence"),
    [
        ("b/*", ValueError, "prunable='b/\\*' must match a leaf.*near it are"),
        (3, TypeError, "must be a function .* or globs on names, got 3"),
    ],
)
def test_what_matches_nothing_and_what_is_no_rule_is_refused(prunable, error, sentence):
    with pytest.raises(error, match=sentence):
        jp.scores.magnitude(PARAMS, prunable=prunable)
