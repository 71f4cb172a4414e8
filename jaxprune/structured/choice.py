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
from jaxprune.graph.axis_dims import Dim, pooled
from jaxprune.graph.axis_groups import AxisGroup, AxisGroups
from jaxprune.graph.axis_trace import LeafAxes
from jaxprune.typing import Masks, Params, Scores

V = TypeVar("V")


def asked(groups: AxisGroups, shares: float | Mapping[str, float]) -> dict[str, float]:
    """The share of its units that each group is to lose, zero left out.

    Args:
      groups: of the function.
      shares: one share for all groups that are removable by default; or {glob, kind or
        name: share}, of which the first match counts. A glob matches only groups that
        are removable by default; an exact name or kind matches any removable group.

    Returns:
      Group name to share.

    Raises:
      ValueError: a share is not in [0, 1), or a rule matches no group that can lose
        units.
    """
    rules = {"*": shares} if not isinstance(shares, Mapping) else dict(shares)
    for share in rules.values():
        if not (math.isfinite(share) and 0 <= share < 1):
            raise ValueError(f"a share of units must be in [0, 1), got {share}")
    found = _by_rules(groups, rules)
    return {name: float(share) for name, share in found.items() if share}


def _by_rules(groups: AxisGroups, rules: Mapping[str, V]) -> dict[str, V]:
    """Group name to what the first rule that fits it says."""
    unused = dict.fromkeys(rules)
    found: dict[str, V] = {}
    for group in groups:
        rule = next((rule for rule in rules if _fits(rule, group)), None)
        if rule is not None:
            unused.pop(rule, None)
            found[group.name] = rules[rule]
    if unused:
        raise ValueError(_no_group(groups, list(unused)))
    return found


def _fits(rule: str, group: AxisGroup) -> bool:
    if rule in (group.name, group.kind):
        return group.removable
    # A glob asks for whatever is safe to cut; only a full name or kind asks for more,
    # such as the width of the residual stream.
    return group.default and fnmatch.fnmatchcase(group.name, rule)


def _no_group(groups: AxisGroups, rules: list[str]) -> str:
    free = dict.fromkeys(group.kind for group in groups if group.default)
    reasons = [
        f"{group.name}: {group.why}"
        for group in groups
        if any(r in (group.name, group.kind) for r in rules) and not group.removable
    ]
    why = f" ({'; '.join(reasons[:3])})" if reasons else ""
    return (
        "every rule must match a group whose units can be removed, and no earlier rule "
        f"all of its groups, but {listed(rules)} match none of "
        f"{listed(free) or 'none'}{why}; print jp.axis_groups for all"
    )


def counts(groups: AxisGroups, shares: Mapping[str, float]) -> dict[str, int]:
    """How many units each group loses: the integer nearest to share times units.

    Args:
      groups: of the function.
      shares: group name to the share that it loses.

    Returns:
      Group name to count.

    Raises:
      ValueError: a group would lose all.
    """
    units = {group.name: group.units for group in groups}
    found = {name: round(share * units[name]) for name, share in shares.items()}
    if empty := [name for name, count in found.items() if count >= units[name]]:
        each = ", ".join(f"{name!r} (of {units[name]})" for name in empty[:6])
        raise ValueError(
            f"a group must keep a unit, but these would lose all: {each}; remove a "
            "smaller share"
        )
    return found


def possible(
    groups: AxisGroups, sizes: Mapping[str, Iterable[int]] | None
) -> dict[str, np.ndarray]:
    """The numbers of units that groups may keep, where something is said of them.

    Args:
      groups: of the function.
      sizes: {glob, kind or name of a group: numbers}, the first that fits counts.

    Returns:
      Group name to its numbers, descending.

    Raises:
      ValueError: a group may keep no number of units that it could, or a rule matches
        no group that can lose units.
      TypeError: what is said of a group is no numbers.
    """
    units = {group.name: group.units for group in groups}
    found: dict[str, np.ndarray] = {}
    for name, numbers in _by_rules(groups, _numbers(sizes or {})).items():
        fit = sorted((n for n in numbers if 0 < n <= units[name]), reverse=True)
        if not fit:
            raise ValueError(
                f"sizes must have a number of units from 1 to {units[name]} that "
                f"{name} may keep; give one"
            )
        found[name] = np.array(fit)
    return found


def _numbers(sizes: Mapping[str, Iterable[int]]) -> dict[str, set[int]]:
    try:
        return {rule: {int(n) for n in given} for rule, given in sizes.items()}
    except (AttributeError, TypeError, ValueError):
        raise TypeError(
            "sizes must be {glob, kind or name of a group: numbers of units}, got "
            f"{sizes!r}"
        ) from None


def nearest(
    groups: AxisGroups, lost: Mapping[str, int], possible: Mapping[str, np.ndarray]
) -> dict[str, int]:
    """Counts that leave the nearest numbers of units that are possible.

    Args:
      groups: of the function.
      lost: group name to how many units it would lose; one that loses none keeps all.
      possible: group name to the numbers that it may keep, descending; others any.

    Returns:
      Group name to count; of two numbers as near the larger is kept.
    """
    new = dict(lost)
    for group in groups:
        if lost.get(group.name) and group.name in possible:
            fit = possible[group.name]
            distance = np.abs(fit - (group.units - lost[group.name]))
            new[group.name] = group.units - int(fit[distance.argmin()])
    return new


def by_scores(
    groups: AxisGroups, params: Params, scores: Scores, lost: Mapping[str, int]
) -> dict[str, np.ndarray]:
    """The units that are kept, the highest of each group.

    Args:
      groups: of the function.
      params: the parameters.
      scores: like them, floating; `optax.MaskedNode()` where a leaf has no say.
      lost: group name to how many units it loses.

    Returns:
      Group name to the kept units, ascending, for groups that lose any.

    Raises:
      ValueError: scores do not fit the parameters, a group has no weight with a score,
        or a unit's score is NaN.
    """
    leaves = _aligned(params, scores, "scores")
    cache: dict[Any, np.ndarray] = {}
    found, wrong, silent = {}, [], []
    for group in groups:
        if not lost.get(group.name):
            continue
        total = _pooled(groups, group, leaves, cache)
        if total is None:
            silent.append(group.name)
        elif np.isnan(total).any():
            wrong.append(group.name)
        else:
            # Stable: of equal scores the first unit stays, as everywhere here.
            order = np.argsort(-total, kind="stable")
            found[group.name] = np.sort(order[: group.units - lost[group.name]])
    if silent:
        raise ValueError(
            f"a group needs a weight with a score, but {listed(silent)} have none; "
            "score them with prunable=, or leave them out"
        )
    if wrong:
        raise ValueError(
            f"scores must not be NaN, but those of {listed(wrong)} are; look at the "
            "criterion, or leave them out"
        )
    return found


def by_masks(groups: AxisGroups, params: Params, masks: Masks) -> dict[str, np.ndarray]:
    """The units that masks keep: a unit goes where all its weights are pruned.

    Args:
      groups: of the function.
      params: the parameters.
      masks: like them, boolean; `optax.MaskedNode()` where a leaf has no say.

    Returns:
      Group name to the kept units, ascending, for groups that lose any.

    Raises:
      ValueError: masks do not fit the parameters, or prune every unit of a group.
    """
    leaves = _aligned(params, masks, "masks")
    cache: dict[Any, np.ndarray] = {}
    found, empty = {}, []
    for group in groups:
        if not group.removable:
            continue
        total = _pooled(groups, group, leaves, cache)
        if total is None or (total > 0).all():
            continue
        # The sum of a mask counts the weights of a unit that stay; one keeps the unit.
        found[group.name] = np.flatnonzero(total > 0)
        if not total.any():
            empty.append(group.name)
    if empty:
        raise ValueError(
            f"a group must keep a unit, but the masks prune all of {listed(empty)}; "
            "keep some"
        )
    return found


def _aligned(params: Params, given: Any, what: str) -> dict[str, Any]:
    leaves = tree.align(params, given, what)
    return {
        name: leaf
        for name, leaf in zip(tree.names(params), leaves, strict=True)
        if not tree.is_excluded(leaf)
    }


def _pooled(
    groups: AxisGroups,
    group: AxisGroup,
    leaves: Mapping[str, Any],
    cache: dict[Any, np.ndarray],
) -> np.ndarray | None:
    """The sum over the weights of each unit; None where no leaf has a say."""
    shapes = {leaf.name: leaf for leaf in groups.trace.leaves}
    total = None
    for member in group.members:
        if member.leaf not in leaves:
            continue
        leaf = shapes[member.leaf]
        # Groups that share an axis of a leaf, as the parts of a fused matrix do, read
        # the same sums.
        key = (member.leaf, member.axis)
        if key not in cache:
            cache[key] = _sums(leaf, leaves[member.leaf], member.axis)
        dim: Dim = leaf.parts[member.part][member.axis]
        own = pooled(dim, cache[key][member.part], group.dim)
        total = own if total is None else total + own
    return total


def _sums(leaf: LeafAxes, values: Any, axis: int) -> np.ndarray:
    """Sums over all axes but one, (parts, size of the axis)."""
    spared = {axis, leaf.stacked}
    others = tuple(i for i in range(len(leaf.shape)) if i not in spared)
    whole = jnp.issubdtype(values.dtype, jnp.bool_)
    # Masks are counted in integers: float32 is exact up to 2^24 only.
    sums = jnp.sum(values, others, dtype=jnp.int32 if whole else jnp.float32)
    if leaf.stacked is None:
        sums = sums[None]
    elif leaf.stacked > axis:
        sums = sums.T
    return np.asarray(sums, np.int64 if whole else np.float64)


def check_whole(masks: Mapping[str, Any], cut: Mapping[str, Any]) -> None:
    """Refuses masks that prune weights which a cut would keep."""
    left: list[str] = []
    for name, mask in masks.items():
        if not np.asarray(cut[name].take(np.asarray(mask))).all():
            left.append(name)
    if left:
        raise ValueError(
            "masks must prune whole units to make a model smaller, but those of "
            f"{listed(left)} also prune single weights of units that stay; give "
            "scores, or keep such zeros as zeros with jp.masks.apply"
        )


def masked_leaves(params: Params, masks: Masks) -> dict[str, Any]:
    """Leaf name to mask, those that are left out left out."""
    return _aligned(params, masks, "masks")


def is_masks(given: Any) -> bool:
    """Whether a tree holds booleans rather than scores."""
    kinds = {
        jnp.issubdtype(jax.typeof(leaf).dtype, jnp.bool_) for leaf in _leaves(given)
    }
    if len(kinds) > 1:
        raise ValueError(
            "shrink needs scores or masks, got a tree of both; give floating leaves or "
            "boolean ones"
        )
    return kinds == {True}


def _leaves(given: Any) -> Iterable[Any]:
    named = tree.named_leaves(given)
    return [leaf for leaf in named.values() if not tree.is_excluded(leaf)]
