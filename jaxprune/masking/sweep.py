"""How good a model is at several sparsities, criteria and allocations: one table."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxprune.arrays.axes import Axes
from jaxprune.arrays.messages import columns
from jaxprune.arrays.rules import Rule, check
from jaxprune.masking import masks as masks_
from jaxprune.masking.counts import Allocation
from jaxprune.masking.sparsity import sparsity as measure_sparsity
from jaxprune.typing import Masks, Params, Pattern, Scores

_RULES = (
    Rule(
        lambda v: len(v.allocations) > 0,
        "sweep needs at least one allocation, got none",
        'write allocation=("layer", "global", "erk")',
    ),
    Rule(
        # They are told apart by their text in tables and figures.
        lambda v: len(set(map(str, v.allocations))) == len(v.allocations),
        "sweep compares allocations of different text, got {allocations}",
        "sweep those one by one",
    ),
    Rule(
        lambda v: isinstance(v.scores, Mapping) and len(v.scores) > 0,
        "sweep takes scores by the name of their criterion, got {scores!r}",
        'write sweep(params, {{"magnitude": jp.scores.magnitude(params)}}, ...)',
        error=TypeError,
    ),
    Rule(
        lambda v: len(v.sparsities) > 0,
        "sweep needs at least one sparsity, got none",
        "write sparsities=(0.5, 0.8, 0.9)",
    ),
)


class Cell(NamedTuple):
    """One model of a sweep.

    Attributes:
      criterion: name of the scores.
      allocation: rule that shared the sparsity out.
      sparsity: share of the weights with scores that was to be removed.
      removed: share of them that is zero.
      value: what `evaluate` says right after pruning.
      retrained: what it says after `retrain`, or None without one.
    """

    criterion: str
    allocation: Allocation
    sparsity: float
    removed: float
    value: float
    retrained: float | None


class Sweep(NamedTuple):
    """All models of a sweep; printed they are a table.

    Attributes:
      dense: what `evaluate` says of the parameters as they are.
      cells: one model each, criterion by criterion.
    """

    dense: float
    cells: tuple[Cell, ...]

    @property
    def allocations(self) -> list[str]:
        """The allocations that were compared, as text."""
        return list(dict.fromkeys(str(cell.allocation) for cell in self.cells))

    @property
    def curves(self) -> dict[str, list[Cell]]:
        """The cells of each criterion, and allocation where there are several."""
        curves: dict[str, list[Cell]] = {}
        for cell in self.cells:
            several = len(self.allocations) > 1
            name = f"{cell.criterion}, {cell.allocation}" if several else cell.criterion
            curves.setdefault(name, []).append(cell)
        return curves

    def __str__(self) -> str:
        """A row a model, the dense one first."""
        head = ["criterion", "allocation", "sparsity", "pruned", "retrained"]
        rows = [head, ["dense", "", "0%", f"{self.dense:.4g}", ""]]
        for cell in self.cells:
            after = "" if cell.retrained is None else f"{cell.retrained:.4g}"
            names = [cell.criterion, str(cell.allocation)]
            rows.append([*names, f"{cell.removed:.1%}", f"{cell.value:.4g}", after])
        if len(self.allocations) == 1:
            # All rows would say the same.
            rows = [[row[0], *row[2:]] for row in rows]
        return columns(rows, right=True)


def sweep(
    params: Params,
    scores: Mapping[str, Scores],
    evaluate: Callable[[Params], Any],
    *,
    sparsities: Sequence[float] = (0.5, 0.8, 0.9, 0.95),
    allocation: Allocation | Sequence[Allocation] = "global",
    pattern: Pattern | str = "unstructured",
    axes: Axes | Mapping[str, Axes] | None = None,
    retrain: Callable[[Params, Masks], Params] | None = None,
) -> Sweep:
    """Prunes by each criterion to each sparsity, and evaluates each model.

    Which allocation is best differs between networks: `allocation=("layer", "global",
    "erk")` with the loss on a batch as `evaluate` tells, and the cell says what to give
    `masks.make`.

    Args:
      params: the parameters, a pytree of arrays.
      scores: scores of these parameters by the name of their criterion.
      evaluate: function of parameters to one number, such as a loss or an accuracy.
      sparsities: shares to remove, each in [0, 1).
      allocation: rule that shares a sparsity out between leaves, or several to
        compare; see `jp.prune`.
      pattern: which weights are pruned together; see `jp.prune`.
      axes: which axes are input and output, for patterns that care; see `jp.prune`.
      retrain: function of pruned parameters and their masks to trained parameters,
        which are evaluated as well; see `jp.keep_masks`.

    Returns:
      The dense value and a cell for each model; `print` it for a table, and
      `jp.plot.sparsity_curve` draws it.

    Raises:
      TypeError: scores are not by name.
      ValueError: there is no sparsity or allocation, one does not fit, or two
        allocations have one text.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxprune as jp
      >>> params = {"w": jnp.array([[1.0, -2.0], [3.0, 0.5]])}
      >>> scores = {"magnitude": jp.scores.magnitude(params)}
      >>> total = lambda params: jnp.abs(params["w"]).sum()
      >>> print(jp.sweep(params, scores, total, sparsities=[0.5]))
      criterion  sparsity  pruned  retrained
      dense            0%     6.5
      magnitude     50.0%       5
    """
    allocations = allocation if isinstance(allocation, list | tuple) else [allocation]
    check(_RULES, scores=scores, sparsities=sparsities, allocations=allocations)
    dense = float(evaluate(params))
    cells = []
    for criterion, rule, share in itertools.product(scores, allocations, sparsities):
        masks = masks_.make(
            scores[criterion], share, allocation=rule, pattern=pattern, axes=axes
        )
        pruned = masks_.apply(params, masks)
        value = float(evaluate(pruned))
        retrained = None
        if retrain is not None:
            retrained = float(evaluate(retrain(pruned, masks)))
        removed = measure_sparsity(masks).total
        cells.append(Cell(criterion, rule, float(share), removed, value, retrained))
    return Sweep(dense, tuple(cells))
