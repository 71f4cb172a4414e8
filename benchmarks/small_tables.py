"""Tables of `benchmarks.small_tasks`: ranks and regrets of criteria and allocations.

A case is a network as it is trained, and a sparsity; losses are means over seeds. The
rank of a pair of criterion and allocation is its place among all pairs of a case, 1 for
the lowest loss. Its regret is its loss less the lowest of the case, in nats (of the
regression in variances): the worst regret says how ruinous a choice may be.
"""

import csv
import statistics
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from benchmarks import measure

MEASURED = "measured"
_CASE = ("network", "optimizer", "norm", "sparsity")


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a file, none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def with_measured(rows: Iterable[dict[str, str]]) -> list[dict[str, str]]:
    """The rows and, beside each criterion's, those of the allocation of lowest loss.

    It is chosen by the loss on a batch of the training data, once for each model.
    """
    rows = list(rows)
    models = defaultdict[tuple[str, ...], list[dict[str, str]]](list)
    for row in rows:
        models[tuple(row[name] for name in (*_CASE, "seed", "criterion"))].append(row)
    # A real choice would know no more: calibration is of the data that trained it.
    chosen = [
        min(cells, key=lambda row: float(row["calibration_loss"]))
        for cells in models.values()
    ]
    return rows + [row | {"allocation": MEASURED} for row in chosen]


def ranks_and_regrets(
    rows: Iterable[dict[str, str]], column: str
) -> dict[tuple[str, str], tuple[float, float, float]]:
    """Mean rank, mean regret and worst regret by criterion and allocation.

    Args:
      rows: rows of the file.
      column: loss that is compared, "loss" or "retrained_loss".

    Returns:
      {(criterion, allocation): (mean rank, mean regret, worst regret)}.
    """
    cases: dict[tuple[str, ...], dict[tuple[str, str], list[float]]] = {}
    for row in rows:
        case = cases.setdefault(tuple(row[name] for name in _CASE), defaultdict(list))
        case[row["criterion"], row["allocation"]].append(float(row[column]))
    places = defaultdict[tuple[str, str], list[tuple[int, float]]](list)
    for case in cases.values():
        losses = {pair: statistics.fmean(values) for pair, values in case.items()}
        # Of all pairs: the best that could have been chosen in hindsight.
        lowest = min(losses.values())
        for pair, loss in losses.items():
            # Pairs that choose the same masks share a place.
            rank = 1 + sum(other < loss for other in losses.values())
            places[pair].append((rank, loss - lowest))
    return {
        pair: (
            statistics.fmean(rank for rank, _ in values),
            statistics.fmean(regret for _, regret in values),
            max(regret for _, regret in values),
        )
        for pair, values in places.items()
    }


def tables(rows: list[dict[str, str]]) -> str:
    """Markdown: of all networks, as pruned and retrained; then by network."""
    rows = with_measured(rows)
    pruned, retrained = (
        ranks_and_regrets(rows, column) for column in ("loss", "retrained_loss")
    )
    head = ["criterion", "allocation"]
    head += [
        f"{state}{name}"
        for state in ("", "retrained: ")
        for name in ("mean rank", "mean regret", "worst regret")
    ]
    # What loses least on average comes first.
    ordered = sorted(pruned, key=lambda pair: pruned[pair][1])
    table = [head] + [
        [
            *pair,
            *(
                f"{number:{form}}"
                for result in (pruned[pair], retrained[pair])
                for number, form in zip(result, (".1f", ".3f", ".2f"), strict=True)
            ),
        ]
        for pair in ordered
    ]
    return f"{measure.markdown(table)}\n\n{_by_network(rows)}"


def _by_network(rows: list[dict[str, str]]) -> str:
    """Mean regret of each criterion and allocation in each network."""
    names = list(dict.fromkeys(row["network"] for row in rows))
    pairs = sorted({(row["criterion"], row["allocation"]) for row in rows})
    regrets = [
        ranks_and_regrets([row for row in rows if row["network"] == name], "loss")
        for name in names
    ]
    table = [["criterion", "allocation", *names]]
    for pair in pairs:
        table.append([*pair, *(f"{np.float64(r[pair][1]):.3f}" for r in regrets)])
    return measure.markdown(table)
