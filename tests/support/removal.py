"""The oracle of structural removal: zeroing the weights of units removes the units."""

import jax
import numpy as np

import jaxprune as jp
from jaxprune.arrays import tree
from jaxprune.graph.axis_dims import kept_positions


def kept_weights(groups, kept):
    """Leaf name to booleans: which weights belong to no unit that is removed."""
    left = {
        group.dim: np.isin(np.arange(group.units), kept[group.name])
        for group in groups
        if group.name in kept
    }
    weights = {}
    for leaf in groups.trace.leaves:
        own = weights[leaf.name] = np.ones(leaf.shape, bool)
        for part, dims in enumerate(leaf.parts):
            for axis, dim in enumerate(dims):
                where = [slice(None)] * len(leaf.shape)
                if leaf.stacked is not None:
                    where[leaf.stacked] = part
                here = own[tuple(where)]
                gone = ~kept_positions(dim, left)
                if leaf.stacked is not None:
                    if axis == leaf.stacked:
                        continue
                    axis -= axis > leaf.stacked
                inside = [slice(None)] * here.ndim
                inside[axis] = gone
                here[tuple(inside)] = False
    return weights


def zeroed(params, groups, kept):
    """The parameters with zeros for the weights of the units that are removed."""
    weights = kept_weights(groups, kept)
    names = tree.names(params)
    leaves = [
        np.where(weights[name], leaf, np.zeros((), leaf.dtype))
        for name, leaf in zip(names, jax.tree.leaves(params), strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(params), leaves)


def random_scores(params, seed=0):
    """Scores that no weight is related to."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.random(leaf.shape, np.float32), params)


def check(fn, params, batch, keep, *, groups=None, tolerance=1e-5, seed=0):
    """Keeps a share of some groups and compares with zeroing; groups and result."""
    if groups is None:
        groups = jp.axis_groups(fn, params, batch)
    result = jp.shrink(fn, params, [batch], random_scores(params, seed), keep)
    kept = {name: np.array(units) for name, units in result.report["kept"].items()}
    expected = jax.jit(fn)(zeroed(params, groups, kept), batch)
    found = jax.jit(result.fn)(result.params, batch)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for ours, theirs in zip(
        jax.tree.leaves(found), jax.tree.leaves(expected), strict=True
    ):
        scale = max(1.0, float(np.max(np.abs(theirs))))
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * scale)
    return groups, result


def check_alone(fn, params, batch, keep=0.5):
    """`check` for each removable kind, but one that is all that goes by default."""
    groups = jp.axis_groups(fn, params, batch)
    kinds = {kind: own[0] for kind, own in groups.kinds().items()}
    default = [kind for kind, own in kinds.items() if own.default]
    for kind, own in kinds.items():
        if own.removable and default != [kind]:
            check(fn, params, batch, {kind: keep}, groups=groups)
    return groups


def check_each_kind(fn, params, batch, keep=0.5):
    """`check` for the default groups together, and for each removable kind alone."""
    groups = check_alone(fn, params, batch, keep)
    return check(fn, params, batch, keep, groups=groups)


def row(groups, kind):
    """(groups, units, removable, default) of a kind."""
    own = groups.kinds()[kind]
    return len(own), own[0].units, own[0].removable, own[0].default
