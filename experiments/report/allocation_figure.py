"""What is shown of `allocation_with_solvers`: tables, a row a cell, a figure.

    python -m experiments.report.allocation_figure RESULTS... --out DIR

RESULTS are results.json files of `experiments.allocation_with_solvers`, or directories
that hold them; one figure shows all. Losses are nats per token above the dense model of
the same seed, on the validation set; "±" is the sample standard deviation over seeds.
"""

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro
from matplotlib.figure import Figure

from experiments.report import figures, findings
from experiments.report.tables import Drawing, Report, Table
from jaxprune.files import atomic
from jaxprune.lm.report import canvas

COLUMNS = (
    *("seed", "draw", "solver", "allocation", "sparsity", "achieved", "zeros", "size"),
    *("loss", "dense_loss", "above", "seconds"),
)
_ALLOCATIONS = (
    "uniform",
    "owl",
    "erk",
    "magnitude",
    "preconditioned_magnitude",
    "preconditioned_adam",
)
_SOLVERS = ("sparsegpt", "sparsegpt+correction", "alps", "alps+correction")
_LAST = ("wanda", "mask")  # no lines of their own: one allocation each

Results = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Draw:
    """Draws several runs of `allocation_with_solvers` in one figure."""

    results: Annotated[
        tuple[Path, ...],
        tyro.conf.Positional,
        tyro.conf.arg(metavar="RESULTS...", help_behavior_hint=""),
    ]
    """results.json files, or the directories that hold them."""
    out: Path = Path("allocation")
    """Where allocation.svg is written."""


def rows(results: Results) -> list[dict[str, Any]]:
    """The tidy table: one row a cell, of `COLUMNS`; "above" is nats above dense."""
    table = []
    for cell in results["cells"]:
        dense = results["dense"][str(cell["seed"])]["loss"]
        derived = {
            "achieved": cell["zeros"] / cell["size"],
            "dense_loss": dense,
            "above": cell["loss"] - dense,
        }
        record = {**cell, **derived}
        table.append({name: record[name] for name in COLUMNS})
    return table


def tables(results: Results) -> list[Table]:
    """Nats above dense by solver and allocation, then above uniform allocation.

    A draw of the calibration sequences has tables of its own.
    """
    table = rows(results)
    parts = []
    for draw in sorted({row["draw"] for row in table}):
        draw_rows = [row for row in table if row["draw"] == draw]
        suffix = f", calibration draw {draw + 1}" if draw else ""
        parts.append(_table(draw_rows, f"Nats above dense{suffix}", relative=False))
        if any(row["allocation"] == "uniform" for row in draw_rows):
            title = f"Nats above the same solver with uniform allocation{suffix}"
            parts.append(_table(draw_rows, title, relative=True))
    return parts


def _table(table: Sequence[Mapping[str, Any]], title: str, *, relative: bool) -> Table:
    """Rows are solver and allocation, columns sparsities; means over the seeds."""
    losses = {
        (row["solver"], row["allocation"], row["sparsity"], row["seed"]): row["above"]
        for row in table
    }
    pairs = sorted({key[:2] for key in losses}, key=_order)
    sparsities = sorted({key[2] for key in losses})
    lines = []
    for solver, allocation in pairs:
        if relative and (allocation == "uniform" or solver in _LAST):
            continue
        line = [solver, allocation]
        for sparsity in sparsities:
            values = []
            for (*key, seed), above in losses.items():
                if key != [solver, allocation, sparsity]:
                    continue
                # The same seed's: what an allocation changes is far less than what a
                # seed does.
                base = losses.get((solver, "uniform", sparsity, seed))
                if not relative:
                    values.append(above)
                elif base is not None:
                    values.append(above - base)
            line.append(findings.mean(values, signed=True))
        lines.append(line)
    header = ["solver", "allocation", *map(findings.percent, sparsities)]
    return Table(header, lines, title)


def _order(pair: tuple[str, str]) -> tuple[int, str, int, str]:
    """Solvers that repair first; in each, the allocations by their kinds."""
    solver, allocation = pair
    # Names that the lists do not have come behind all others.
    first = [*_SOLVERS, *_LAST, solver].index(solver)
    place = [*_ALLOCATIONS, allocation].index(allocation)
    return (first, solver, place, allocation)


def figure(all_results: Sequence[Results]) -> Figure:
    """Loss above dense against sparsity: a panel a run and solver, lines by allocation.

    Lines are means over the seeds, bands their range. Variants of the preconditioned
    magnitude are left to the tables, unless there is nothing else.
    """
    lines: dict[str, dict[int, list[dict[str, Any]]]] = {}
    rows_by_run = [(results, rows(results)) for results in all_results]
    panel_rows = [
        (row, f"{results['config']['preset']}: {row['solver']}")
        for results, run_rows in rows_by_run
        for row in run_rows
        if row["draw"] == min(r["draw"] for r in run_rows)
        and row["solver"] not in _LAST
    ]
    main = [item for item in panel_rows if item[0]["allocation"] in _ALLOCATIONS]
    for row, panel in sorted(
        main or panel_rows,
        key=lambda item: _order((item[0]["solver"], item[0]["allocation"])),
    ):
        cells = lines.setdefault(row["allocation"], {}).setdefault(row["seed"], [])
        cell = {"sparsity": row["sparsity"], "loss_pruned": row["above"]}
        cells.append({"criterion": panel, "allocation": "global", **cell})
    # The losses are above dense already, so every seed's reference is zero.
    labelled = {
        allocation: {
            "seeds": [
                {"seed": seed, "dense": {"loss": 0.0}, "cells": cells}
                for seed, cells in sorted(cells_by_seed.items())
            ]
        }
        for allocation, cells_by_seed in lines.items()
    }
    return figures.runs(labelled, stage="pruned", allocation="global")


def report(results: Results) -> Report:
    """All that is shown of the results."""
    losses, drawn = [dense["loss"] for dense in results["dense"].values()], {}
    if any(cell["solver"] not in _LAST for cell in results["cells"]):
        caption = "Loss above dense against sparsity; bands are the range of the seeds."
        drawn["loss"] = Drawing(lambda: figure([results]), caption)
    return Report(
        lead="A sparsity allocated to the matrices in several ways, pruned by solvers: "
        "validation loss in nats per token",
        facts={"dense": findings.mean(losses), "seeds": ", ".join(results["dense"])},
        tables=tables(results),
        columns=COLUMNS,
        rows=rows(results),
        figures=drawn,
    )


def _read(path: Path) -> Results:
    """The results of a file, refused where they are another experiment's."""
    results: Results = json.loads(path.read_text())
    if (name := results.get("name")) != "allocation_with_solvers":
        raise ValueError(
            f"'{path}' must be of allocation_with_solvers, but is of {name}"
        )
    return results


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command; a refusal is one line on stderr and exit status 1."""
    prog = "python -m experiments.report.allocation_figure"
    options = tyro.cli(Draw, prog=prog, args=arguments)
    try:
        paths = [p / "results.json" if p.is_dir() else p for p in options.results]
        all_results = [_read(path) for path in paths]
        presets = [results["config"]["preset"] for results in all_results]
        if len({*presets}) < len(presets):
            raise ValueError(f"give one run of each preset, got {', '.join(presets)}")
        picture = figure(all_results)
        svg = canvas.svg(picture, ground="white").encode()
        atomic.replace_files(options.out, {"allocation.svg": svg})
    except (OSError, ValueError) as error:
        sys.exit(f"allocation_figure: {error}")
    print(f"written to '{options.out}': allocation.svg")


if __name__ == "__main__":
    main()
