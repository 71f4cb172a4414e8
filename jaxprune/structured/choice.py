"""Which units of which groups are kept: by scores, or as masks say.

A unit's score is the sum of the scores of all its weights, whatever criterion made
them. Within a group the lowest go, of equals those at the end; groups of a kind (the
layers of a model) lose as many each, and each chooses its own.
"""

import fnmatch
import math
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.arrays import tree
from jaxprune.arrays.messages import listed
from jaxprune.graph.axis_dims import Dim, sum_by_unit
from jaxprune.graph.axis_groups import AxisGroup, AxisGroups
from jaxprune.graph.axis_trace import LeafAxes
from jaxprune.typing import Masks, Params, Scores

V = TypeVar("V")


def shares_of_groups(
    groups: AxisGroups, shares: float | Mapping[str, float]
) -> dict[str, float]:
    """The share of its units that each group is to lose, zero left out.

    Args:
      groups: axis groups of the function.
      shares: one share for all groups that are removable by default; or {glob, kind or
        name: share}, of which the first match counts. A glob matches only groups that
        are removable by default; an exact name or kind matches any removable group.

    Returns:
      Group name to share.

    Raises:
      ValueError: a share is not in [0, 1), or a rule matches no group that can lose
        units.
    """
    by_rule = {"*": shares} if not isinstance(shares, Mapping) else dict(shares)
    for share in by_rule.values():
        if not (math.isfinite(share) and 0 <= share < 1):
            raise ValueError(f"a share of units must be in [0, 1), got {share}")
    by_group = _first_matches(groups, by_rule)
    return {name: float(share) for name, share in by_group.items() if share}


def _first_matches(groups: AxisGroups, by_rule: Mapping[str, V]) -> dict[str, V]:
    """Group name to what the first rule that matches it says."""
    unused = dict.fromkeys(by_rule)
    by_group: dict[str, V] = {}
    for group in groups:
        # The first rule counts, so that exceptions are written before a glob.
        match = next((rule for rule in by_rule if _matches(rule, group)), None)
        if match is not None:
            unused.pop(match, None)
            by_group[group.name] = by_rule[match]
    if unused:
        free = dict.fromkeys(group.kind for group in groups if group.default)
        raise ValueError(
            "every rule must match a group whose units can be removed and that no "
            f"earlier rule matches, but {listed(unused)} match none of "
            f"{listed(free) or 'none'}{_reasons(groups, unused)}; print jp.axis_groups "
            "for all"
        )
    return by_group


def _matches(rule: str, group: AxisGroup) -> bool:
    if rule in (group.name, group.kind):
        return group.removable
    # A glob asks for whatever is safe to cut; only a full name or kind asks for more,
    # such as the width of the residual stream.
    return group.default and fnmatch.fnmatchcase(group.name, rule)


def _reasons(groups: AxisGroups, rules: Iterable[str]) -> str:
    """Why groups that are named in full can lose no units, in parentheses."""
    reasons = [
        f"{group.name}: {group.why}"
        for group in groups
        if not group.removable and not {group.name, group.kind}.isdisjoint(rules)
    ]
    return f" ({'; '.join(reasons[:3])})" if reasons else ""


def lost_counts(groups: AxisGroups, shares: Mapping[str, float]) -> dict[str, int]:
    """How many units each group loses: the integer nearest to share times units.

    Args:
      groups: axis groups of the function.
      shares: group name to the share that it loses.

    Returns:
      Group name to count.

    Raises:
      ValueError: a group would lose all.
    """
    units = {group.name: group.units for group in groups}
    counts = {name: round(share * units[name]) for name, share in shares.items()}
    empty = [name for name, count in counts.items() if count >= units[name]]
    emptied = ", ".join(f"{name!r} (of {units[name]})" for name in empty[:6])
    if emptied:
        raise ValueError(
            f"a group must keep a unit, but these would lose all: {emptied}; remove a "
            "smaller share"
        )
    return counts


def allowed_sizes(
    groups: AxisGroups, sizes: Mapping[str, Iterable[int]] | None
) -> dict[str, np.ndarray]:
    """The numbers of units that groups may keep, where something is said of them.

    Args:
      groups: axis groups of the function.
      sizes: {glob, kind or name of a group: numbers}, the first that matches counts.

    Returns:
      Group name to its numbers, descending.

    Raises:
      ValueError: a group may keep no number of units that it could, or a rule matches
        no group that can lose units.
      TypeError: what is said of a group is no numbers.
    """
    units = {group.name: group.units for group in groups}
    allowed: dict[str, np.ndarray] = {}
    for name, numbers in _first_matches(groups, _as_integers(sizes or {})).items():
        fit = sorted((n for n in numbers if 0 < n <= units[name]), reverse=True)
        if not fit:
            raise ValueError(
                f"sizes must have a number of units from 1 to {units[name]} that "
                f"{name} may keep, got none; give one"
            )
        allowed[name] = np.array(fit)
    return allowed


def _as_integers(sizes: Mapping[str, Iterable[int]]) -> dict[str, set[int]]:
    try:
        return {rule: {int(n) for n in numbers} for rule, numbers in sizes.items()}
    except (AttributeError, TypeError, ValueError):
        raise TypeError(
            "sizes must be {glob, kind or name of a group: numbers of units}, got "
            f"{sizes!r}"
        ) from None


def nearest_counts(
    groups: AxisGroups, lost: Mapping[str, int], allowed: Mapping[str, np.ndarray]
) -> dict[str, int]:
    """Counts that leave the nearest numbers of units that are allowed.

    Args:
      groups: axis groups of the function.
      lost: group name to how many units it would lose; one that loses none keeps all.
      allowed: group name to the numbers that it may keep, descending; others any.

    Returns:
      Group name to count; of two numbers as near the larger is kept.
    """
    counts = dict(lost)
    for group in groups:
        if lost.get(group.name) and group.name in allowed:
            numbers = allowed[group.name]
            distance = np.abs(numbers - (group.units - lost[group.name]))
            counts[group.name] = group.units - int(numbers[distance.argmin()])
    return counts


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
      ValueError: masks do not fit the parameters, or prune every unit of a group.
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


def check_whole(masks: Mapping[str, Any], cuts: Mapping[str, Any]) -> None:
    """Refuses masks that prune weights which a cut would keep.

    Args:
      masks: leaf name to its mask, of the leaf's shape.
      cuts: leaf name to its `LeafCut`.

    Raises:
      ValueError: what a cut keeps of a mask is not all True.
    """
    ragged = [
        name
        for name, mask in masks.items()
        if not np.asarray(cuts[name].take(np.asarray(mask))).all()
    ]
    if ragged:
        raise ValueError(
            "masks must prune whole units to make a model smaller, but those of "
            f"{listed(ragged)} also prune single weights of units that stay; give "
            "scores, or keep such zeros as zeros with jp.masks.apply"
        )


def masked_leaves(params: Params, masks: Masks) -> dict[str, Any]:
    """Leaf name to mask, without the leaves that have none."""
    return _leaves_beside(params, masks, "masks")


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
