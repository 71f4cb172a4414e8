"""Numbers of a sweep against sparsity, every seed beside its reference.

What is measured right after pruning (stage "pruned") is compared with the dense model
of the same seed, and what is measured after retraining (stage "retrained") with the
dense control of the same seed, which had as many steps in all.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

Stage = Literal["pruned", "retrained"]

CLOSE = 0.015  # nats: what the report calls "within" a reference
STAGES: dict[Stage, str] = {"pruned": "dense", "retrained": "control"}
"""Stage to the run that is its reference."""


@dataclasses.dataclass(frozen=True)
class Curve:
    """A measure of one criterion against sparsity.

    Attributes:
      criterion: name of the criterion.
      allocation: name of the allocation.
      sparsities: requested sparsities, ascending, of shape (points,).
      values: the measure, of shape (seeds, points), masked where not measured.
      reference: the measure of each seed's reference, of shape (seeds, 1).
    """

    criterion: str
    allocation: str
    sparsities: np.ndarray
    values: np.ma.MaskedArray
    reference: np.ndarray

    @functools.cached_property
    def above(self) -> np.ma.MaskedArray:
        """Difference to the reference of the same seed, of shape (seeds, points)."""
        return self.values - self.reference

    def reach(self, limit: float) -> float | None:
        """The sparsity up to which the mean at every sparsity is at most `limit` above.

        None where it is more at the first sparsity.
        """
        within = np.ma.filled(self.above.mean(0) <= limit, False)
        # Not beyond the first sparsity that is too far off: a later one may be near
        # again by chance.
        count = int(np.logical_and.accumulate(within).sum())
        return float(self.sparsities[count - 1]) if count else None


def curves(
    results: Mapping[str, Any],
    stage: Stage,
    allocation: str | None = None,
    measure: str = "loss",
) -> list[Curve]:
    """The curves of a stage, by criterion and allocation in order of appearance.

    Args:
      results: content of results.json.
      stage: "pruned" or "retrained".
      allocation: the only allocation to take; None for all.
      measure: what was measured: "loss", "foreign_loss" or "accuracy".

    Returns:
      A curve for each criterion and allocation that was measured at this stage.
    """
    seeds = results["seeds"]
    points: dict[tuple[str, str], dict[float, dict[int, float]]] = {}
    for index, seed in enumerate(seeds):
        for cell in seed["cells"]:
            value = cell.get(f"{measure}_{stage}")
            if value is not None and allocation in (None, cell["allocation"]):
                by_sparsity = points.setdefault(
                    (cell["criterion"], cell["allocation"]), {}
                )
                by_sparsity.setdefault(cell["sparsity"], {})[index] = value
    reference = [[(s[STAGES[stage]] or {}).get(measure, math.nan)] for s in seeds]
    found = []
    for names, by_sparsity in points.items():
        sparsities = sorted(by_sparsity)
        values = [
            [by_sparsity[sparsity].get(index, math.nan) for sparsity in sparsities]
            for index in range(len(seeds))
        ]
        masked = np.ma.masked_invalid(np.asarray(values))
        found.append(
            Curve(*names, np.asarray(sparsities), masked, np.asarray(reference))
        )
    return found


def names(results: Mapping[str, Any], field: str) -> list[str]:
    """The criteria or allocations of the cells, in order of appearance."""
    cells = (cell for seed in results["seeds"] for cell in seed["cells"])
    return list(dict.fromkeys(cell[field] for cell in cells))
