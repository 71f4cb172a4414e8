"""Several runs of one experiment side by side: what differed, and what came of it.

    python -m experiments.compare RESULTS RESULTS... --out DIR

RESULTS are results.json files or the directories that hold them. Prints a table, writes
compare.csv and compare.html. Losses are nats per token above each run's own reference:
the dense model right after pruning, the dense control with equal steps after
retraining; "±" is the sample standard deviation over the seeds. Of an experiment whose
report is tables the runs' tables stand one after the other.
"""

import dataclasses
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from matplotlib.figure import Figure

from experiments import recovery, refined_solvers
from experiments.prune_while_training import report as training_report
from experiments.report import (
    allocation_figure,
    figures,
    findings,
    mixture_table,
    provenance,
)
from experiments.report import results as results_
from experiments.report.tables import Report, Table, text
from jaxprune.files import atomic

Runs = Mapping[str, Mapping[str, Any]]
# The experiments whose reports are tables.
_REPORTS: Mapping[str, Callable[[Mapping[str, Any]], Report]] = {
    "allocation_with_solvers": allocation_figure.report,
    "prune_while_training": training_report.report,
    "recovery": recovery.report,
    "refined_solvers": refined_solvers.report,
    "trained_mixture": mixture_table.report,
}


@dataclasses.dataclass(frozen=True)
class Compare:
    """Puts several runs of one experiment side by side."""

    results: Annotated[
        tuple[Path, ...],
        tyro.conf.Positional,
        tyro.conf.arg(metavar="RESULTS...", help_behavior_hint=""),
    ]
    """Two or more results.json files, or the directories that hold them."""
    out: Path = Path("comparison")
    """Where compare.csv and compare.html go."""


def load(paths: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """Reads the runs, given as results.json files or the directories that hold them.

    Returns:
      The checked results by label: the name of the run's directory, or where two are
      called the same, the path below what all have in common.

    Raises:
      ValueError: there are fewer than two, one is not a results.json, one is given
        twice, or they are of different experiments.
    """
    if len(paths) < 2:
        raise ValueError(f"compare needs two runs or more, got {len(paths)}")
    files = [path / "results.json" if path.is_dir() else path for path in paths]
    files = [file.resolve() for file in files]
    if doubled := sorted({str(file) for file in files if files.count(file) > 1}):
        raise ValueError(f"every run must be given once, got '{doubled[0]}' again")
    runs = [results_.read(file) for file in files]
    names = {run["name"]: file for run, file in zip(runs, files, strict=True)}
    if len(names) > 1:
        listing = ", ".join(f"{name!r} in '{file}'" for name, file in names.items())
        raise ValueError(
            f"the runs must be of one experiment, got {listing}; compare them apart"
        )
    unknown = [run["name"] for run in runs if "cells" in run]
    if unknown and unknown[0] not in _REPORTS:
        raise ValueError(
            f"the runs must be of {', '.join(_REPORTS)}, or sweeps with seeds, got "
            f"{unknown[0]!r}"
        )
    labels = [file.parent.name for file in files]
    if len({*labels}) < len(files):
        above = os.path.commonpath([file.parent for file in files])
        places = [
            file if file.name != "results.json" else file.parent for file in files
        ]
        # Directories of one name: what tells the runs apart is the path below what they
        # share.
        labels = [os.path.relpath(path, above) for path in places]
    return dict(zip(labels, runs, strict=True))


def differences(runs: Runs) -> list[list[str]]:
    """What of configuration, versions and device is not the same in all runs.

    A row for each entry: its name, then its value in each run, "-" where it has none.
    """
    all_results = list(runs.values())
    parts = (
        [atomic.flat(run["config"]) for run in all_results],
        [
            {f"version of {k}": version for k, version in run["versions"].items()}
            for run in all_results
        ],
        [{"device": run["device"]} for run in all_results],
    )
    rows = [
        [name, *(str(run.get(name, "-")) for run in part)]
        for part in parts
        for name in dict.fromkeys(name for run in part for name in run)
    ]
    return [row for row in rows if len({*row[1:]}) > 1]  # not alike in all


def summary(runs: Runs) -> list[list[str]]:
    """The dense models: a row for each number, a column for each run."""
    rows = {"seeds": [str(len(run["seeds"])) for run in runs.values()]}
    for name in ("dense", "control"):
        losses_by_run = [
            [seed[name]["loss"] for seed in run["seeds"] if seed.get(name)]
            for run in runs.values()
        ]
        rows[f"{name} loss"] = [findings.mean(losses) for losses in losses_by_run]
    return [[name, *row] for name, row in rows.items()]


def losses(runs: Runs, stage: results_.Stage) -> list[list[str]]:
    """Nats above the reference, a row for each criterion, allocation and sparsity.

    Rows of criterion, allocation, sparsity and then "mean ± spread" of each run, "-"
    where it has no such cell; none when no run has this stage.
    """
    cells: dict[tuple[str, str, float], dict[str, str]] = {}
    for label, run in runs.items():
        for curve in results_.curves(run, stage):
            for column, sparsity in enumerate(map(float, curve.sparsities)):
                by_label = cells.setdefault(
                    (curve.criterion, curve.allocation, sparsity), {}
                )
                above = np.asarray(curve.above[:, column].compressed())  # (seeds,)
                by_label[label] = findings.mean(above, signed=True)
    # Criteria in the order of the first run that has them, sparsities ascending.
    order = list(dict.fromkeys(key[:2] for key in cells))
    return [
        [
            *key[:2],
            findings.percent(key[2]),
            *(by_label.get(label, "-") for label in runs),
        ]
        for key, by_label in sorted(
            cells.items(), key=lambda cell: (order.index(cell[0][:2]), cell[0][2])
        )
    ]


def compare(runs: Runs, out: Path) -> str:
    """Writes compare.csv and compare.html; returns the same tables as plain text.

    Raises:
      OSError: a file cannot be written.
    """
    labels = list(runs)
    if report := _REPORTS.get(next(iter(runs.values()))["name"]):
        return _tables_of_each(runs, out, report)
    tables = [Table(["", *labels], summary(runs), "The dense models, nats per token")]
    if changed := differences(runs):
        tables.append(Table(["entry", *labels], changed, "What differs"))
    top = len(tables)
    for stage in results_.STAGES:
        if rows := losses(runs, stage):
            header = ["criterion", "allocation", "sparsity", *labels]
            title = f"{figures.TITLES[stage]}, nats above each run's reference"
            tables.append(Table(header, rows, title))
    files = {
        "compare.csv": results_.table_csv(
            # Runs that measured more have more columns; the others leave them empty.
            ("run", *max(map(results_.columns, runs.values()), key=len)),
            [
                {"run": label, **row}
                for label, run in runs.items()
                for row in results_.rows(run)
            ],
        ),
        "compare.html": _page(runs, tables, top, _figures(runs)),
    }
    atomic.replace_files(out, files)
    return text(tables)


def _tables_of_each(
    runs: Runs, out: Path, report: Callable[[Mapping[str, Any]], Report]
) -> str:
    """The same of runs whose reports are tables: those of each, after the others."""
    reports = {label: report(run) for label, run in runs.items()}
    names = dict.fromkeys(
        name for run_report in reports.values() for name in run_report.facts
    )
    facts = [
        [name, *(run_report.facts.get(name, "-") for run_report in reports.values())]
        for name in names
    ]
    tables = [Table(["", *reports], facts, "The runs")]
    if changed := differences(runs):
        tables.append(Table(["entry", *runs], changed, "What differs"))
    top = len(tables)
    for label, run_report in reports.items():
        tables += [
            table._replace(caption=f"{label}: {table.caption}")
            for table in run_report.tables
        ]
    # All runs are of one experiment, so their rows have the same columns.
    columns = next(iter(reports.values())).columns
    rows = [
        {"run": label, **row}
        for label, run_report in reports.items()
        for row in run_report.rows
    ]
    files = {
        "compare.csv": results_.table_csv(("run", *columns), rows),
        "compare.html": _page(runs, tables, top, {}),
    }
    atomic.replace_files(out, files)
    return text(tables)


def _page(
    runs: Runs,
    tables: Sequence[Table],
    top: int,
    drawings: Mapping[str, dict[str, Figure]],
) -> bytes:
    """The first so many tables, the figures by what they show, the other tables."""
    name = next(iter(runs.values()))["name"]
    page = provenance.TEMPLATES.get_template("runs.html").render(
        title=f"{name}: {len(runs)} runs side by side",
        name=name,
        count=len(runs),
        same=not differences(runs),
        first=tables[:top],
        figures=drawings,
        reading=figures.READING,
        then=tables[top:],
    )
    return page.encode()


def _figures(runs: Runs) -> dict[str, dict[str, Figure]]:
    """What each figure shows, and the figure by its name on the page."""
    allocations = list(
        dict.fromkeys(s for run in runs.values() for s in results_.allocations(run))
    )
    return {
        f"{figures.TITLES[stage]}, {allocation} allocation": {
            f"runs-{number}-{index}": figures.runs(
                runs, stage=stage, allocation=allocation
            )
        }
        for number, stage in enumerate(results_.STAGES)
        for index, allocation in enumerate(allocations)
        # A stage that no run has, such as retraining with no steps, gets no empty
        # figure.
        if any(results_.curves(run, stage, allocation) for run in runs.values())
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command; a refusal is one line on stderr and exit status 1."""
    options = tyro.cli(Compare, prog="python -m experiments.compare", args=arguments)
    try:
        print(compare(load(options.results), options.out))
    except (OSError, ValueError) as error:
        sys.exit(f"compare: {error}")
    print(f"\nwritten to '{options.out}': compare.csv, compare.html")


if __name__ == "__main__":
    main()
