"""How many units each group of a trained torch model loses, by what that would cost.

Every group is solved at several sizes, and the relative errors of the outputs say where
units can best be spared.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path

import jaxprune as jp
from benchmarks import torch_shipped
from jaxprune.posttraining.unit_sizes import solve_sizes

STEPS_OF_GROUP = 8
"""In how many steps a group can lose its units where the damage shares them out."""


def shares_by_damage(
    shipped: torch_shipped.Shipped, removed: float
) -> dict[str, float]:
    """The share of its units that each group loses, by what the solver measures.

    Each group is solved at several sizes, with the groups before it at the share that
    is removed of all. Of the numbers that make up that share of all units, those are
    taken whose relative errors have the smallest sum.

    Args:
      shipped: the model.
      removed: share of the units of all groups.

    Returns:
      {name of a group: share}.
    """
    module, batches = shipped.module, shipped.calibration
    fn, params = jp.torch.function(module, batches[0])
    arrays = [jp.torch.as_arrays(batch) for batch in batches]
    groups = jp.axis_groups(fn, params, arrays[0])
    units = {group.name: group.units for group in groups if group.default}
    steps = range(1, STEPS_OF_GROUP + 1)
    sizes = {
        name: sorted({-(-n * step // STEPS_OF_GROUP) for step in steps})
        for name, n in units.items()
    }
    start = {
        name: min(sizes[name], key=lambda size: abs(size - (1 - removed) * n))
        for name, n in units.items()
    }
    with tempfile.TemporaryDirectory() as directory:
        solved = solve_sizes(
            fn, params, arrays, groups, sizes, start, directory=Path(directory)
        )
    damage = {
        name: {units[name] - s: e for s, e in zip(x.sizes, x.errors, strict=True)}
        for name, x in solved.items()
    }
    lost = counts_by_damage(damage, round(removed * sum(units.values())))
    return {name: count / units[name] for name, count in lost.items()}


def counts_by_damage(
    damage: Mapping[str, Mapping[int, float]], total: int
) -> dict[str, int]:
    """How many units each group loses, so that the sum of the damage is smallest.

    Args:
      damage: {group: {units lost: relative error}}.
      total: how many units go at least.

    Returns:
      {group: units lost}.
    """
    # Units lost by the groups so far, no more than the total: damage and the counts.
    best: dict[int, tuple[float, dict[str, int]]] = {0: (0.0, {})}
    for name, errors in damage.items():
        following: dict[int, tuple[float, dict[str, int]]] = {}
        for before, (error_before, counts) in best.items():
            for lost, error in errors.items():
                lost_so_far = min(before + lost, total)
                candidate = (error_before + error, {**counts, name: lost})
                if (
                    lost_so_far not in following
                    or candidate[0] < following[lost_so_far][0]
                ):
                    following[lost_so_far] = candidate
        best = following
    return best[total][1]
