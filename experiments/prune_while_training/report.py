"""What is shown of the cells: tables, a row a cell, figures.

Losses are nats per token above the dense model of the same seed and steps, each method
at the learning rate that was the best for it at the tuning sparsity and seed; "±" is
the sample standard deviation over the seeds.
"""

import statistics
from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from experiments.prune_while_training.methods import DENSE, METHODS
from experiments.report import figures
from experiments.report.figures import Panel
from experiments.report.page import Report, Section, Table, mean, percent

COLUMNS = (
    *("method", "sparsity", "steps", "learning_rate"),
    *("seed", "zeros", "size", "loss", "dense_loss", "above", "chosen", "seconds"),
)

Key: TypeAlias = tuple[str, int]
"""Method and steps."""
Cells: TypeAlias = Sequence[Mapping[str, Any]]


def _key(cell: Mapping[str, Any]) -> Key:
    return cell["method"], cell["steps"]


def rates(cells: Cells, sparsity: float, seeds: Collection[int]) -> dict[Key, float]:
    """The learning rate of the lowest mean loss of the tuning sparsity and seeds.

    One that was not tried with all of these seeds is not compared.
    """
    losses: dict[Key, dict[float, list[float]]] = {}
    for cell in cells:
        # The dense model has no sparsity, so its rates are compared as they are.
        target = 0.0 if cell["method"] == DENSE else sparsity
        if cell["sparsity"] == target and cell["seed"] in seeds:
            by_rate = losses.setdefault(_key(cell), {})
            by_rate.setdefault(cell["learning_rate"], []).append(cell["loss"])
    best = {}
    for key, by_rate in losses.items():
        means = {
            rate: statistics.fmean(rate_losses)
            for rate, rate_losses in by_rate.items()
            if len(rate_losses) == len(seeds)
        }
        if means:
            best[key] = min(means, key=means.__getitem__)
    return best


def tried(cells: Cells, key: Key) -> set[float]:
    """The learning rates of a method and a number of steps."""
    return {cell["learning_rate"] for cell in cells if _key(cell) == key}


def rows(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The tidy table: one row a cell, of `COLUMNS`; "above" is nats above dense."""
    config, cells = results["config"], results["cells"]
    best = rates(cells, config["tune_sparsity"], results["tune_seeds"])

    def chosen(cell: Mapping[str, Any]) -> bool:
        rate = cell["learning_rate"]
        # Where nothing was compared, the one rate there is counts as the best.
        return bool(best.get(_key(cell), rate) == rate)

    dense = {
        _control(cell): cell["loss"]
        for cell in cells
        if cell["method"] == DENSE and chosen(cell)
    }
    table = []
    for cell in sorted(cells, key=_order):
        control = dense.get(_control(cell))  # None before the control is done
        derived = {
            "dense_loss": control,
            "above": None if control is None else cell["loss"] - control,
            "chosen": chosen(cell),
        }
        table.append({name: {**cell, **derived}[name] for name in COLUMNS})
    return table


def _control(cell: Mapping[str, Any]) -> tuple[int, int]:
    return cell["steps"], cell["seed"]


def _order(cell: Mapping[str, Any]) -> tuple[Any, ...]:
    method, steps = _key(cell)
    place = [*METHODS, method].index(method)  # names of another source come last
    tail = (cell["sparsity"], cell["learning_rate"], cell["seed"])
    return (steps, place, method, *tail)


def _table(chosen: Sequence[Mapping[str, Any]], steps: int) -> Table:
    """Nats above dense by method and sparsity, of one length of training."""
    dense = [row["loss"] for row in chosen if row["method"] == DENSE]
    sparsities = sorted({r["sparsity"] for r in chosen if r["method"] != DENSE})
    lines = []
    for method in dict.fromkeys(row["method"] for row in chosen):
        cells = [row for row in chosen if row["method"] == method]
        line = [method, f"{cells[0]['learning_rate']:g}"]
        for sparsity in sparsities:
            target = 0.0 if method == DENSE else sparsity
            above = [r["above"] for r in cells if r["sparsity"] == target]  # one a seed
            values = [value for value in above if value is not None]
            # How many seeds stand behind a mean, for they may differ from cell to cell.
            count = f" ({len(values)})" if values else ""
            line.append(mean(values, signed=True) + count)
        lines.append(line)
    header = ["method (number of seeds)", "rate", *map(percent, sparsities)]
    return Table(header, lines, f"{steps} steps: nats above dense, {mean(dense)}")


def _lines(chosen: Sequence[Mapping[str, Any]]) -> dict[str, tuple[Any, Any]]:
    """Method to sparsities and losses above dense of the seeds, NaN where none is."""
    lines: dict[str, tuple[Any, Any]] = {}
    for method in dict.fromkeys(row["method"] for row in chosen):
        cells = {
            (r["seed"], r["sparsity"]): r["above"]
            for r in chosen
            if r["method"] == method and r["above"] is not None
        }
        seeds, shares = (sorted({*values}) for values in zip(*cells, strict=True))
        above = [[cells.get((seed, x), np.nan) for x in shares] for seed in seeds]
        lines[method] = (100 * np.array(shares), np.ma.masked_invalid(above))
    return lines


_WATCHED = {
    "sparsity": "weights that are zero, share",
    "loss": "validation loss, nats per token",
    "overlap": "masks: in both / in either, to a tenth of the steps before",
}


def _over_steps(results: Mapping[str, Any]) -> list[Panel]:
    """Sparsity, loss and overlap of the masks over the steps of the longest training.

    At the tuning sparsity and its first seed, each method at its best learning rate.
    """
    config, cells = results["config"], results["cells"]
    best = rates(cells, config["tune_sparsity"], results["tune_seeds"])
    longest = max(cell["steps"] for cell in cells)
    curves = {
        cell["method"]: cell["curve"]
        for cell in sorted(cells, key=_order)
        if cell["steps"] == longest
        and cell["seed"] == results["tune_seeds"][0]
        and cell["sparsity"] in (0.0, config["tune_sparsity"])
        and best.get(_key(cell)) == cell["learning_rate"]
    }
    panels = []
    for name, title in _WATCHED.items():
        lines = {}
        for method, curve in curves.items():
            # At step 0 the loss is off the scale, and no mask has changed.
            points = curve if name == "sparsity" else curve[1:]
            if known := [p for p in points if p[name] is not None]:
                values = [[point[name] for point in known]]
                lines[method] = ([point["step"] for point in known], values)
        panels.append(Panel(title, lines))
    return [panel for panel in panels if panel.lines]


def report(results: Mapping[str, Any]) -> Report:
    """All that is shown of the results."""
    table = rows(results)
    chosen = [row for row in table if row["chosen"]]
    lengths = {
        steps: [row for row in chosen if row["steps"] == steps]
        for steps in dict.fromkeys(row["steps"] for row in chosen)
    }
    losses = {
        f"{steps} steps: nats above dense": [
            row for row in rows if row["method"] != DENSE and row["above"] is not None
        ]
        for steps, rows in lengths.items()
    }
    panels = [Panel(title, _lines(rows)) for title, rows in losses.items() if rows]
    over_steps = _over_steps(results)
    sections = [
        Section(
            "Loss above dense against sparsity",
            [_table(rows, steps) for steps, rows in lengths.items()],
            {"loss": figures.draw(panels, scale="nats")} if panels else {},
            figures.READING,
        )
    ]
    if over_steps:
        drawn = figures.draw(over_steps, across="training step")
        sections.append(Section("Over the steps", figures={"steps": drawn}))
    return Report(
        lead=[
            "Pruned while it trains: validation loss in nats per token above the dense "
            "model of the same seed and steps, each method at the learning rate that "
            "was best for it"
        ],
        facts={
            "seeds": ", ".join(map(str, dict.fromkeys(r["seed"] for r in table))),
            "device": results["device"],
        },
        sections=sections,
        rows=table,
    )
