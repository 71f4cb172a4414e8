"""Which units of which groups are kept: by scores, or as masks say.

A unit's score is the sum of the scores of all its weights, whatever criterion made
them. Within a group the lowest go, of equals the last ones.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.arrays import tree
from jaxprune.arrays.messages import listed
from jaxprune.graph.axis_dims import Dim, sum_by_unit
from jaxprune.graph.axis_groups import AxisGroup, AxisGroups
from jaxprune.graph.axis_trace import LeafAxes
from jaxprune.structured import cut
from jaxprune.typing import Masks, Params, Scores


def by_scores(
    groups: AxisGroups, params: Params, scores: Scores, lost: Mapping[str, int]
) -> dict[str, np.ndarray]:
    """The units that are kept, the highest of each group.

    Args:
      groups: axis groups of the function.
      params: the parameters.
      scores: a tree like them, floating; `optax.MaskedNode()` where a leaf has no say.
      lost: group name to how many units it loses.

    Returns:
      Group name to the kept units, ascending, for groups that lose any.

    Raises:
      ValueError: scores do not fit the parameters, a group has no weight with a score,
        or a unit's score is NaN.
    """
    leaves = _leaves_beside(params, scores, "scores")
    cache: dict[Any, np.ndarray] = {}
    kept, not_numbers, silent = {}, [], []
    for group in groups:
        if not lost.get(group.name):
            continue
        total = _unit_sums(groups, group, leaves, cache)
        if total is None:
            silent.append(group.name)
        elif np.isnan(total).any():
            not_numbers.append(group.name)
        else:
            # Stable: of equal scores the first unit stays, as everywhere here.
            order = np.argsort(-total, kind="stable")
            kept[group.name] = np.sort(order[: group.units - lost[group.name]])
    if silent:
        raise ValueError(
            f"a group needs a weight with a score, but {listed(silent)} have none; "
            "score them with prunable=, or leave them out"
        )
    if not_numbers:
        raise ValueError(
            f"scores must not be NaN, but those of {listed(not_numbers)} are; look at "
            "the criterion, or leave them out"
        )
    return kept


def by_masks(groups: AxisGroups, params: Params, masks: Masks) -> dict[str, np.ndarray]:
    """The units that masks keep: a unit goes where all its weights are pruned.

    Args:
      groups: axis groups of the function.
      params: the parameters.
      masks: a tree like them, boolean; `optax.MaskedNode()` where a leaf has no say.

    Returns:
      Group name to the kept units, ascending, for groups that lose any.

    Raises:
      ValueError: masks do not fit the parameters, prune every unit of a group, or prune
        single weights of units that stay.
    """
    leaves = _leaves_beside(params, masks, "masks")
    cache: dict[Any, np.ndarray] = {}
    kept, empty = {}, []
    for group in groups:
        if not group.removable:
            continue
        total = _unit_sums(groups, group, leaves, cache)
        if total is None or (total > 0).all():
            continue
        # The sum of a mask counts the weights of a unit that stay; one keeps the unit.
        kept[group.name] = np.flatnonzero(total > 0)
        if not total.any():
            empty.append(group.name)
    if empty:
        raise ValueError(
            f"a group must keep a unit, but the masks prune all of {listed(empty)}; "
            "keep some"
        )
    cuts = cut.of_groups(groups, kept)
    ragged = [
        name
        for name, mask in leaves.items()
        if not np.asarray(cuts[name].take(np.asarray(mask))).all()
    ]
    if ragged:
        raise ValueError(
            "masks must prune whole units to make a model smaller, but those of "
            f"{listed(ragged)} also prune single weights of units that stay; give "
            "scores, or keep such zeros as zeros with jp.masks.apply"
        )
    return kept


def _leaves_beside(params: Params, like_params: Any, what: str) -> dict[str, Any]:
    """Leaf name to the leaf of a tree like the parameters, without those left out."""
    leaves = tree.align(params, like_params, what)
    return {
        name: leaf
        for name, leaf in zip(tree.names(params), leaves, strict=True)
        if not tree.is_excluded(leaf)
    }


def _unit_sums(
    groups: AxisGroups,
    group: AxisGroup,
    leaves: Mapping[str, Any],
    cache: dict[Any, np.ndarray],
) -> np.ndarray | None:
    """The sum over the weights of each unit, (units,); None where no leaf has a say."""
    axes_of_leaf = {leaf.name: leaf for leaf in groups.trace.leaves}
    total = None
    for member in group.members:
        if member.leaf not in leaves:
            continue
        leaf = axes_of_leaf[member.leaf]
        # Groups that share an axis of a leaf, as the parts of a fused matrix do, read
        # the same sums.
        key = (member.leaf, member.axis)
        if key not in cache:
            cache[key] = _axis_sums(leaf, leaves[member.leaf], member.axis)
        dim: Dim = leaf.parts[member.part][member.axis]
        unit_sums = sum_by_unit(dim, cache[key][member.part], group.dim)
        total = unit_sums if total is None else total + unit_sums
    return total


def _axis_sums(leaf: LeafAxes, values: Any, axis: int) -> np.ndarray:
    """Sums over all axes but one, (parts, size of the axis)."""
    spared = {axis, leaf.stacked}
    others = tuple(i for i in range(len(leaf.shape)) if i not in spared)
    counts = jnp.issubdtype(values.dtype, jnp.bool_)
    # Masks are counted in integers: float32 is exact up to 2^24 only.
    sums = jnp.sum(values, others, dtype=jnp.int32 if counts else jnp.float32)
    if leaf.stacked is None:
        sums = sums[None]
    elif leaf.stacked > axis:
        sums = sums.T  # (axis, stack) so far
    return np.asarray(sums, np.int64 if counts else np.float64)


def is_masks(scores_or_masks: Scores | Masks) -> bool:
    """Whether a tree holds booleans rather than scores."""
    leaves = tree.named_leaves(scores_or_masks).values()
    answers = {
        jnp.issubdtype(jax.typeof(leaf).dtype, jnp.bool_)
        for leaf in leaves
        if not tree.is_excluded(leaf)
    }
    if len(answers) > 1:
        raise ValueError(
            "shrink needs scores or masks, got a tree of both; give floating leaves "
            "or boolean ones"
        )
    return answers == {True}
