"""What is shown of the cells: tables, a row a cell, figures.

Losses are nats per token above the dense model of the same seed and steps, each method
at the learning rate that was the best for it at the tuning sparsity and seed; "±" is
the sample standard deviation over the seeds.
"""

import statistics
from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeAlias

from matplotlib.figure import Figure

from experiments.prune_while_training.methods import DENSE, METHODS
from experiments.report import figures, findings, plots
from experiments.report.tables import Drawing, Report, Table
from jaxprune.lm.report import canvas

COLUMNS = (
    *("method", "sparsity", "steps", "after_dense", "distill", "learning_rate"),
    *("seed", "zeros", "size", "loss", "dense_loss", "above", "chosen", "seconds"),
)

Key: TypeAlias = tuple[str, int, int, float]
"""Method, steps, steps of the dense model before, weight of the distillation."""
Cells: TypeAlias = Sequence[Mapping[str, Any]]


def _key(cell: Mapping[str, Any]) -> Key:
    return cell["method"], cell["steps"], cell["after_dense"], cell["distill"]


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
        if cell["method"] == DENSE and not cell["distill"] and chosen(cell)
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


def _control(cell: Mapping[str, Any]) -> tuple[int, int, int]:
    return cell["steps"], cell["after_dense"], cell["seed"]


def _order(cell: Mapping[str, Any]) -> tuple[Any, ...]:
    method, steps, after, distill = _key(cell)
    place = [*METHODS, method].index(method)  # names of another source come last
    tail = (cell["sparsity"], cell["learning_rate"], cell["seed"])
    return (after, steps, distill, place, method, *tail)


def tables(results: Mapping[str, Any]) -> list[Table]:
    """A table for each length: nats above dense by method and sparsity."""
    chosen = [row for row in rows(results) if row["chosen"]]
    lengths = dict.fromkeys((row["after_dense"], row["steps"]) for row in chosen)
    return [
        _table(
            [row for row in chosen if (row["after_dense"], row["steps"]) == length],
            *length,
        )
        for length in lengths
    ]


def _table(chosen: Sequence[Mapping[str, Any]], after: int, steps: int) -> Table:
    dense = [r["loss"] for r in chosen if r["method"] == DENSE and not r["distill"]]
    seeds = f"{len(dense)} seed{'s' if len(dense) > 1 else ''}"
    more = f" after {after} dense ones" if after else ""
    sparsities = sorted({r["sparsity"] for r in chosen if r["method"] != DENSE})
    lines = []
    for method, distill in dict.fromkeys((r["method"], r["distill"]) for r in chosen):
        cells = [r for r in chosen if (r["method"], r["distill"]) == (method, distill)]
        line = [f"{method}, distilled {distill:g}" if distill else method]
        line.append(f"{cells[0]['learning_rate']:g}")
        for sparsity in sparsities:
            target = 0.0 if method == DENSE else sparsity
            above = [r["above"] for r in cells if r["sparsity"] == target]  # one a seed
            values = [value for value in above if value is not None]
            # How many seeds stand behind a mean, for they may differ from cell to cell.
            count = f" ({len(values)})" if values else ""
            line.append(findings.mean(values, signed=True) + count)
        lines.append(line)
    header = ["method (number of seeds)", "rate", *map(findings.percent, sparsities)]
    title = f"{steps} steps{more}: nats above dense, {findings.mean(dense)}, {seeds}"
    return Table(header, lines, title)


def _drawn(cells: Cells) -> set[str]:
    """The methods with a line: of several sparsities, or all where none has several."""
    sparsities: dict[str, set[float]] = {}
    for cell in cells:
        sparsities.setdefault(cell["method"], set()).add(cell["sparsity"])
    several = {name for name, values in sparsities.items() if len(values) > 1}
    return several or {*sparsities}


def _lines(results: Mapping[str, Any]) -> dict[str, dict[int, list[dict[str, Any]]]]:
    """What `loss_figure` draws: by label and seed."""
    lines: dict[str, dict[int, list[dict[str, Any]]]] = {}
    drawn = _drawn(results["cells"]) - {DENSE}
    for row in rows(results):
        if not row["chosen"] or row["method"] not in drawn or row["above"] is None:
            continue
        suffix = f", distilled {row['distill']:g}" if row["distill"] else ""
        label = row["method"] + suffix
        more = f" after {row['after_dense']}" if row["after_dense"] else ""
        cell = {
            # `figures.runs` draws a panel a criterion and a line a label: here a panel
            # a length of training, and a line a method.
            "criterion": f"{row['steps']} steps{more}",
            "allocation": "global",
            "sparsity": row["sparsity"],
            "loss_pruned": row["above"],
        }
        lines.setdefault(label, {}).setdefault(row["seed"], []).append(cell)
    return lines


def loss_figure(results: Mapping[str, Any]) -> Figure:
    """Loss above dense against sparsity: a panel a length, a line a method.

    Lines are means over the seeds, bands their range.
    """
    lines = _lines(results)
    # The losses are above dense already, so every seed's reference is zero.
    labelled = {
        label: {
            "seeds": [
                {"seed": seed, "dense": {"loss": 0.0}, "cells": cells}
                for seed, cells in sorted(cells_by_seed.items())
            ]
        }
        for label, cells_by_seed in lines.items()
    }
    return figures.runs(labelled, stage="pruned", allocation="global")


_WATCHED = {
    "sparsity": "weights that are zero, share",
    "loss": "validation loss, nats per token",
    "overlap": "masks: in both / in either, to a tenth of the steps before",
}


def _curves(results: Mapping[str, Any]) -> dict[str, Any]:
    """What `steps_figure` draws: a curve for each method."""
    config, cells = results["config"], results["cells"]
    best = rates(cells, config["tune_sparsity"], results["tune_seeds"])
    drawn = _drawn(cells) | {DENSE}

    def length(cell: Mapping[str, Any]) -> tuple[bool, int, int]:
        # Trainings from nothing before those from a dense model, then the longest.
        return cell["after_dense"] == 0, cell["steps"], cell["after_dense"]

    longest = max(length(cell) for cell in cells if cell["method"] != DENSE)
    return {
        cell["method"]: cell["curve"]
        for cell in sorted(cells, key=_order)
        if length(cell) == longest
        and cell["method"] in drawn
        and not cell["distill"]
        and cell["seed"] == results["tune_seeds"][0]
        and cell["sparsity"] in (0.0, config["tune_sparsity"])
        and best.get(_key(cell)) == cell["learning_rate"]
        and cell.get("curve")
    }


@canvas.STYLE
def steps_figure(results: Mapping[str, Any]) -> Figure:
    """Sparsity, loss and overlap of the masks over the steps of the longest training.

    At the tuning sparsity and its first seed, each method at its own learning rate.
    """
    curves = _curves(results)
    style = plots.styles(list(curves))
    figure, panels = plots.panels(len(_WATCHED), list(curves))
    for axes, (name, title) in zip(panels, _WATCHED.items(), strict=True):
        ends = []
        for method, curve in curves.items():
            # At step 0 the loss is off the scale, and no mask has changed.
            points = curve if name == "sparsity" else curve[1:]
            known = [point for point in points if point[name] is not None]
            if not known:
                continue
            look: dict[str, Any] = {"color": style[method].colour, "lw": 1.2, "ms": 3}
            look |= {"marker": style[method].marker, "ls": style[method].dash}
            axes.plot(*zip(*((p["step"], p[name]) for p in known), strict=True), **look)
            last = known[-1]
            ends.append((method, style[method].colour, last["step"], last[name]))
        axes.set_title(title)
        axes.set_xlabel("training step")
        axes.grid()
        axes.set(xlim=axes.get_xlim(), ylim=axes.get_ylim())  # names need them fixed
        if ends:
            plots.name_ends(axes, ends)
    return figure


def report(results: Mapping[str, Any]) -> Report:
    """All that is shown of the results."""
    table, drawn = rows(results), {}
    if _lines(results):
        drawn["loss"] = Drawing(
            lambda: loss_figure(results), "Loss above dense against sparsity."
        )
    pruned = any(row["method"] != DENSE for row in table)
    if pruned and _curves(results):
        drawn["steps"] = Drawing(
            lambda: steps_figure(results),
            "Over the steps: weights that are zero, loss, overlap of the masks.",
        )
    return Report(
        lead="Pruned while it trains: validation loss in nats per token above the "
        "dense model of the same seed and steps, each method at the learning rate that "
        "was best for it",
        facts={"seeds": ", ".join(map(str, dict.fromkeys(r["seed"] for r in table)))},
        tables=tables(results),
        columns=COLUMNS,
        rows=table,
        figures=drawn,
    )
