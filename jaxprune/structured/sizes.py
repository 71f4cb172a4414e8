"""How many units each group loses: by shares, by numbers, or to be within a budget.

Groups of a kind (the layers of a model) lose as many units each. Where only some
numbers of units suit, the nearest of these is kept.
"""

import bisect
import fnmatch
import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar, get_args

import numpy as np

from jaxprune.arrays.messages import listed
from jaxprune.graph.axis_groups import AxisGroup, AxisGroups
from jaxprune.structured import cut
from jaxprune.structured.budget import Measure, OutOfReach, costs
from jaxprune.structured.resized import Resized
from jaxprune.structured.shrunk_function import atom_masks

Keep = float | Mapping[str, float]
"""Share of the units that stays, {group rule: share or number}, or {measure: share}."""

Rules = Sequence[str] | Mapping[str, float]
"""Globs, kinds or names of groups that lose one share, or these to relative shares."""

ALL: Sequence[Rules] = (("*",), ["*"])
"""The default of the groups that a budget is met with."""

Sizes = Mapping[str, Iterable[int]]
"""Globs, kinds or names of groups to the numbers of units that each may keep."""

V = TypeVar("V")


def lost_units(
    groups: AxisGroups, keep: Keep, rules: Rules = ("*",), sizes: Sizes | None = None
) -> dict[str, int]:
    """How many units each group loses.

    Args:
      groups: axis groups of the function.
      keep: what stays; see `jp.shrink`.
      rules: the groups that a budget is met with; see `jp.shrink`.
      sizes: the numbers of units that groups may keep; see `jp.shrink`.

    Returns:
      Group name to count.

    Raises:
      ValueError: a share or number is out of range, a budget cannot be met, or a rule
        matches no group that can lose units.
    """
    allowed = {}  # group name to the numbers that it may keep, descending
    units = {group.name: group.units for group in groups}
    choices = {rule: {*entries} for rule, entries in (sizes or {}).items()}
    for name, entries in _by_group(groups, choices).items():
        fit = sorted((n for n in entries if 0 < n <= units[name]), reverse=True)
        if not fit:
            raise ValueError(
                f"sizes must have a number of units from 1 to {units[name]} that "
                f"{name} may keep, got none; give one"
            )
        allowed[name] = np.array(fit)
    by_rule = keep if isinstance(keep, Mapping) else {"*": keep}
    # No group has such a name: behind a leaf's name stands its axis, "up:0".
    if not by_rule.keys().isdisjoint(get_args(Measure)):
        return _within_budget(groups, by_rule, rules, allowed)
    if rules not in ALL:
        raise ValueError(
            f"groups are those that a budget is met with, got {rules} and no budget; "
            "name them in keep={glob or name: share}"
        )
    kept = _by_group(groups, by_rule)
    # A share of the units stays, or a whole number of them.
    stay = {
        name: x if isinstance(x, numbers.Integral) else x * units[name]
        for name, x in kept.items()
    }
    lost = {name: round(units[name] - x) for name, x in stay.items()}
    wrong = [
        f"{name!r} (of {units[name]}: {kept[name]})"
        for name, count in lost.items()
        if not 0 < stay[name] <= units[name] or count == units[name]
    ]
    if wrong:
        raise ValueError(
            "a group must keep at least one unit: a share in (0, 1] or a whole number "
            f"of its units, got {', '.join(wrong[:6])}"
        )
    return _nearest_counts(groups, lost, allowed)


def _by_group(groups: AxisGroups, by_rule: Mapping[str, V]) -> dict[str, V]:
    """Group name to the value of the first rule that matches it."""
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
        reasons = [
            f"{group.name}: {group.why}"
            for group in groups
            if not group.removable and not {group.name, group.kind}.isdisjoint(unused)
        ]
        why = f" ({'; '.join(reasons[:3])})" if reasons else ""
        raise ValueError(
            "every rule must match a group whose units can be removed and that no "
            f"earlier rule matches, but {listed(unused)} match none of "
            f"{listed(free) or 'none'}{why}; print jp.axis_groups for all"
        )
    return by_group


def _matches(rule: str, group: AxisGroup) -> bool:
    if rule in (group.name, group.kind):
        return group.removable
    # A glob asks for whatever is safe to cut; only a full name or kind asks for more,
    # such as the width of the residual stream.
    return group.default and fnmatch.fnmatchcase(group.name, rule)


def _nearest_counts(
    groups: AxisGroups, lost: Mapping[str, int], allowed: Mapping[str, np.ndarray]
) -> dict[str, int]:
    """Counts that leave the nearest numbers of units that are allowed.

    A group that loses none keeps all; of two numbers as near the larger is kept.
    """
    counts = dict(lost)
    for group in groups:
        if lost.get(group.name) and group.name in allowed:
            sizes = allowed[group.name]
            distance = np.abs(sizes - (group.units - lost[group.name]))
            counts[group.name] = group.units - int(sizes[distance.argmin()])
    return counts


def _within_budget(
    groups: AxisGroups,
    budget: Mapping[str, float],
    rules: Rules,
    allowed: Mapping[str, np.ndarray],
) -> dict[str, int]:
    """How many units each group loses, so that the model is within the budget."""
    (measure, most), *others = budget.items()
    if others or not 0 < most < 1:
        raise ValueError(
            f"a budget is one measure of {', '.join(get_args(Measure))} and a share in "
            f"(0, 1), got {dict(budget)}"
        )
    weights = _relative_shares(groups, rules)  # share of a group / share of the most
    movable = [group for group in groups if group.name in weights]
    fixed: dict[str, int] = {}

    def lost(share: float) -> dict[str, int]:
        counts = {g.name: round(share * weights[g.name] * g.units) for g in movable}
        counts = {g.name: min(counts[g.name], g.units - 1) for g in movable}
        return {**_nearest_counts(groups, counts, allowed), **fixed}

    def cost(share: float) -> int:
        counts = lost(share)
        # Which units go does not matter to the cost: the last ones.
        kept = {g.name: np.arange(g.units - counts[g.name]) for g in movable}
        cuts = cut.of_groups(groups, kept)
        resized = Resized(groups.trace, atom_masks(groups.trace, cuts))
        return int(getattr(costs(groups.trace, cuts, resized), measure))

    dense = cost(0.0)
    # Every share at which a group loses one more unit, and where each keeps one.
    shares = {k / g.units / weights[g.name] for g in movable for k in range(g.units)}
    ascending = [*sorted(shares), 1 / min(weights.values())]

    def smallest() -> int:
        """Position of the smallest share that is within the budget."""
        return bisect.bisect_left(
            ascending, True, key=lambda share: cost(share) <= most * dense
        )

    number = smallest()
    if number == len(ascending):
        raise OutOfReach(
            f"a budget must be within reach, but {most:g} of {dense:,} {measure} is "
            f"not: the smallest model that groups and sizes allow has "
            f"{cost(ascending[-1]):,}; raise the budget, or let more groups lose units"
        )
    if allowed:
        # What a coarse group lost beyond the share, the finest need not lose.
        choices = {g.name: len(allowed.get(g.name, range(g.units))) for g in movable}
        finest = max(choices.values())
        counts = lost(ascending[number])
        fixed |= {name: n for name, n in counts.items() if choices[name] < finest}
        number = smallest()
    return lost(ascending[number])


def _relative_shares(groups: AxisGroups, rules: Rules) -> dict[str, float]:
    """Group name to the share that it loses beside the group that loses most."""
    rules = [rules] if isinstance(rules, str) else rules
    relative = dict(rules) if isinstance(rules, Mapping) else dict.fromkeys(rules, 1.0)
    most = max(relative.values(), default=0.0)
    if not (0 < most < math.inf and min(relative.values()) >= 0):
        raise ValueError(
            "groups must map each group to its share relative to the others, none "
            f"negative and at least one positive, got {relative}"
        )
    by_group = _by_group(groups, relative)
    return {name: share / most for name, share in by_group.items() if share}
