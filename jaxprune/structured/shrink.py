"""What is left of a model without some of its units: how many go, and what runs it.

Units of the groups of `jp.axis_groups` are removed: heads, neurons, channels. The
result computes what the function computes with all weights of those units zero, in less
time and memory. It runs the traced program with smaller sizes, so no model class has to
know of it. `jp.shrink` chooses the units, and is `jaxprune.posttraining.shrink`.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, get_args

import numpy as np

from jaxprune.graph.axis_groups import AxisGroup, AxisGroups
from jaxprune.graph.axis_trace import LeafAxes
from jaxprune.structured import choice, cut, modules
from jaxprune.structured.budget import (
    Costs,
    Measure,
    OutOfReach,
    costs,
    share_within,
)
from jaxprune.structured.cut import LeafCut
from jaxprune.structured.resized import Resized
from jaxprune.structured.shrunk_function import ShrunkFunction, atom_masks
from jaxprune.typing import Params

Rules = Sequence[str] | Mapping[str, float]
"""Globs, kinds or names of groups that lose one share, or these to relative shares."""

ALL: Sequence[Rules] = (("*",), ["*"])
"""The groups that a budget is met with, where nothing is said."""

Budget = float | Mapping[Measure, float]
"""The share that may be left of the parameters, or {measure: share}."""

Sizes = Mapping[str, Iterable[int]]
"""Globs, kinds or names of groups to the numbers of units that each may keep."""

_TIMED = 32  # how many parts the search for a budget of time divides the units into


class ShrinkResult(NamedTuple):
    """A smaller model and the report of what was removed.

    Attributes:
      fn: the smaller function, of parameters and a batch.
      params: smaller parameters, in the containers of the original ones.
      report: JSON-able: "groups" (name to units before and after), "kept" (name to the
        units that are left), and "before" and "after" (parameters, bytes, FLOPs for
        the batch); with a budget of time also "milliseconds" (before and after).
    """

    fn: ShrunkFunction
    params: Params
    report: dict[str, Any]

    def cut(self, state: Any) -> Any:
        """A tree of arrays beside the parameters, cut as they were.

        Args:
          state: an optimizer state, masks, scores, averages: its leaves belong to the
            parameters whose names their own paths end in.

        Returns:
          The tree with smaller arrays; counters and the like as they are.

        Raises:
          ValueError: a leaf belongs to a parameter that became smaller, and had
            another shape than that.
        """
        return self.fn.cut(state)

    def module(
        self,
        model: Any,
        batch: Any,
        call: Callable[[Any, Any], Any] | None = None,
    ) -> Any:
        """A smaller module of the same classes, of Flax NNX, Linen or Equinox.

        Arrays are those of `params`, attributes that hold sizes are set, and the module
        is compared with `fn`. What `params` lacks, as random state, is the model's.

        Args:
          model: the module that `fn` was made of; it stays as it is.
          batch: one batch, to compare the two with.
          call: function of a module and a batch, such as `lambda m, x: jax.vmap(m)(x)`;
            the module called with the batch if left out. A module of Linen is handed
            over bound to its parameters.

        Returns:
          The smaller module; that of Linen is called with `params`, as before.

        Raises:
          TypeError: the model is no such module.
          ValueError: no sizes of its classes give what `fn` gives, as where a layer is
            made with a number in the code; `fn` remains.

        Example:
          >>> import jax.numpy as jnp
          >>> import jaxprune as jp
          >>> from flax import nnx
          >>> rngs = nnx.Rngs(0)
          >>> model = nnx.Sequential(
          ...     nnx.Linear(4, 8, rngs=rngs), nnx.Linear(8, 2, rngs=rngs))
          >>> graphdef, params = nnx.split(model, nnx.Param)
          >>> fn = lambda params, x: nnx.merge(graphdef, params)(x)
          >>> x = jnp.ones((3, 4))
          >>> small = jp.shrink(fn, params, x, jp.scores.magnitude(params), 0.5)
          >>> small.module(model, x).layers[0].out_features
          4
        """
        return modules.smaller_module(model, self, batch, call)


def lost_units(
    groups: AxisGroups,
    sparsity: float | Mapping[str, float] | None,
    budget: float | None,
    measure: Measure,
    rules: Rules,
    sizes: Sizes | None = None,
) -> dict[str, int]:
    """How many units each group loses, by a sparsity or a budget; see `shrink`.

    Args:
      groups: axis groups of the function.
      sparsity: a share, or {glob, kind or name of a group: share}; None with a budget.
      budget: the share of the whole that may be left, or None.
      measure: quantity that the budget is of.
      rules: the groups that the budget is met with; see `shrink`.
      sizes: the numbers of units that groups may keep; see `shrink`.

    Returns:
      Group name to count.

    Raises:
      ValueError: a share is out of range or cannot be met; see `shrink`.
    """
    if budget is None and rules not in ALL:
        raise ValueError(
            f"groups are those that a budget is met with, got {rules} and no budget; "
            "say it of the sparsity: sparsity={glob or name: share}"
        )
    allowed = choice.allowed_sizes(groups, sizes)
    if budget is not None:
        return _within_budget(groups, budget, measure, rules, allowed)
    shares = choice.shares_of_groups(groups, {} if sparsity is None else sparsity)
    return choice.nearest_counts(groups, choice.lost_counts(groups, shares), allowed)


def of_cuts(
    fn: Callable[[Params, Any], Any],
    params: Params,
    batch: Any,
    groups: AxisGroups,
    kept: Mapping[str, np.ndarray],
    cuts: dict[str, LeafCut],
) -> ShrinkResult:
    """The smaller model whose leaves are cut.

    Args:
      fn: the function.
      params: parameters of the function.
      batch: the batch that the groups were found with.
      groups: axis groups of the function.
      kept: group name to the units that are kept, of groups that lose any.
      cuts: leaf name to its cut.

    Returns:
      The result of `shrink`.
    """
    shrunk = ShrunkFunction(fn, params, batch, groups.trace, cuts)
    small = cut.params(params, cuts)
    return ShrinkResult(shrunk, small, _report(groups, kept, cuts, shrunk))


def as_budget(budget: Budget | None) -> tuple[float | None, Measure]:
    """The share that may be left, or None, and what it is a share of.

    Args:
      budget: a share of the parameters, {measure: share}, or None.

    Returns:
      The share and the measure.

    Raises:
      ValueError: the share is out of range, or the measure unknown.
    """
    if not isinstance(budget, Mapping):
        budget = {"parameters": budget} if budget is not None else {}
    shares = list(budget.values())
    measures = list(budget)
    if not all(measure in get_args(Measure) for measure in measures):
        raise ValueError(
            f"the measure of a budget must be one of {', '.join(get_args(Measure))}, "
            f"got {measures}"
        )
    if len(shares) > 1:
        raise ValueError(f"a budget has one measure, got {measures}")
    if not all(0 < share < 1 for share in shares):
        raise ValueError(
            f"a budget is a share in (0, 1), got {', '.join(map(str, budget.values()))}"
        )
    for measure, share in budget.items():
        return share, measure
    return None, "parameters"


def _within_budget(
    groups: AxisGroups,
    budget: float,
    measure: Measure,
    rules: Rules,
    allowed: Mapping[str, np.ndarray],
) -> dict[str, int]:
    """How many units each group loses, so that the model is within the budget."""
    weights = _relative_shares(groups, rules)  # share of a group / share of the most
    movable = [group for group in groups if group.name in weights]
    most = 1 / min(weights.values())  # at this share every group keeps one unit
    fixed: dict[str, int] = {}

    def lost(share: float) -> dict[str, int]:
        counts = {g.name: round(share * weights[g.name] * g.units) for g in movable}
        counts = {g.name: min(counts[g.name], g.units - 1) for g in movable}
        return {**choice.nearest_counts(groups, counts, allowed), **fixed}

    def cost(share: float) -> float:
        counts = lost(share)
        # Which units go does not matter to the cost: the last ones.
        kept = {g.name: np.arange(g.units - counts[g.name]) for g in movable}
        cuts = cut.of_groups(groups, kept)
        resized = Resized(groups.trace, atom_masks(groups.trace, cuts))
        return int(getattr(costs(groups.trace, cuts, resized), measure))

    # Every share at which a group loses one more unit.
    shares = {k / g.units / weights[g.name] for g in movable for k in range(g.units)}
    dense = cost(0.0)
    ascending = [*sorted(shares), most]
    share = share_within(cost, budget * dense, ascending)
    if share is None:
        least = cost(most)
        raise OutOfReach(
            f"a budget must be within reach, but {budget:g} of {dense:,} {measure} is "
            f"not: the smallest model that groups and sizes allow has {least:,}; raise "
            "the budget, or let more groups lose units"
        )
    if allowed:
        # What a coarse group lost beyond the share, the finest need not lose.
        fixed.update(_coarse_counts(movable, allowed, lost(share)))
        share = share_within(cost, budget * dense, ascending) or 0.0
    return lost(share)


def _coarse_counts(
    groups: Sequence[AxisGroup],
    allowed: Mapping[str, np.ndarray],
    lost: Mapping[str, int],
) -> dict[str, int]:
    """The counts of all groups but those with most numbers to choose from."""
    choices = {g.name: len(allowed.get(g.name, range(g.units))) for g in groups}
    most = max(choices.values())
    return {name: count for name, count in lost.items() if choices[name] < most}


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
    # Halved, since the shares of a sparsity are under 1.
    halves = {rule: share / most / 2 for rule, share in relative.items()}
    by_group = choice.shares_of_groups(groups, halves)
    return {name: 2 * share for name, share in by_group.items()}


def whole_costs(groups: AxisGroups) -> Costs:
    """What the model costs before anything is removed."""
    return costs(
        groups.trace, {leaf.name: _uncut(leaf) for leaf in groups.trace.leaves}
    )


def _report(
    groups: AxisGroups,
    kept: Mapping[str, np.ndarray],
    cuts: Mapping[str, LeafCut],
    shrunk: ShrunkFunction,
) -> dict[str, Any]:
    before = whole_costs(groups)
    after: Costs = costs(groups.trace, cuts, shrunk.resized)
    return {
        "groups": {
            group.name: {"before": group.units, "after": len(kept[group.name])}
            for group in groups
            if group.name in kept
        },
        "kept": {name: units.tolist() for name, units in kept.items()},
        "before": before._asdict(),
        "after": after._asdict(),
    }


def _uncut(leaf: LeafAxes) -> LeafCut:
    kept = tuple((None,) * len(leaf.shape) for _ in leaf.parts)
    return LeafCut(leaf.shape, leaf.shape, leaf.stacked, kept)
