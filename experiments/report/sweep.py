"""What is shown of a sweep: loss against sparsity first, then all else it measured.

A section that has nothing to show is left out. "±" is the standard deviation over the
seeds.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from experiments.report import figures
from experiments.report.curves import CLOSE, STAGES, Curve, Stage, curves, names
from experiments.report.figures import Panel
from experiments.report.page import Report, Section, Table, mean, percent
from jaxprune.lm.report.page import duration, size

_TITLES: dict[Stage, str] = {
    "pruned": "Right after pruning",
    "retrained": "After retraining",
}
_TYPICAL = 0.6  # the sparsity whose layers are shown
_RUNS = {"start": "before", "dense": "dense", "control": "dense control"}


def report(results: Mapping[str, Any]) -> Report:
    """All that is shown of a sweep's results."""
    sections = [
        _against_sparsity(results, "loss", "Loss against sparsity"),
        _against_sparsity(results, "foreign_loss", "Loss on the foreign text"),
        _against_sparsity(results, "accuracy", "Questions answered right"),
        _layers(results),
        *(
            Section(f"Samples of seed {seed['seed']}", samples=seed["samples"])
            for seed in results["seeds"]
        ),
        _costs(results),
        Section(
            "Training of the dense models",
            figures={"training": _training(results)},
            caption="Training batches, and looks at the validation set.",
        ),
    ]
    shown = [part for part in sections if part.tables or part.figures or part.samples]
    return Report(_headline(results), _facts(results), shown, rows(results))


def _against_sparsity(results: Mapping[str, Any], measure: str, title: str) -> Section:
    """A measure against sparsity, drawn and in numbers, for each allocation."""
    drawn, tables = {}, []
    scale: Literal["nats", "percent"] = "percent" if measure == "accuracy" else "nats"
    for allocation in names(results, "allocation"):
        panels = []
        for stage, reference in STAGES.items():
            measured = curves(results, stage, allocation, measure)
            if not measured:
                continue
            heading = f"{_TITLES[stage]}, {allocation}"
            factor = 100 if scale == "percent" else 1
            lines = {
                curve.criterion: (
                    100 * curve.sparsities,
                    factor * (curve.values if scale == "percent" else curve.above),
                )
                for curve in measured
            }
            middle = float(np.mean(measured[0].reference))
            levels = {reference: 100 * middle if scale == "percent" else 0.0}
            if scale == "percent":
                levels["no picture"] = 100 * results["text_only"]["accuracy"]
            panels.append(Panel(heading, lines, levels))
            tables.append(_table(measured, f"{heading}: {measure}, {reference} first"))
        if panels:
            key = f"{measure}-{allocation}".replace("_", "-")
            drawn[key] = figures.draw(panels, scale=scale)
    if measure != "accuracy" and tables:
        tables.insert(0, _reaches(results, measure))
    caption = "Percent right." if scale == "percent" else figures.READING
    return Section(title, tables, drawn, caption)


def _table(measured: Sequence[Curve], caption: str) -> Table:
    """Criteria by sparsities: the mean, and in brackets the difference."""
    sparsities = sorted({float(s) for curve in measured for s in curve.sparsities})
    lines = []
    for curve in measured:
        cells = {
            float(sparsity): f"{mean(curve.values[:, column])} "
            f"({mean(curve.above[:, column], signed=True)})"
            for column, sparsity in enumerate(curve.sparsities)
        }
        texts = [cells.get(sparsity, "") for sparsity in sparsities]
        lines.append([curve.criterion, mean(curve.reference), *texts])
    header = ["criterion", "reference", *map(percent, sparsities)]
    return Table(header, lines, caption)


def _reaches(results: Mapping[str, Any], measure: str) -> Table:
    """Up to which sparsity each criterion stays close to its reference."""
    by_stage = {stage: curves(results, stage, None, measure) for stage in STAGES}
    stages = [stage for stage, measured in by_stage.items() if measured]
    lines: dict[tuple[str, str], dict[str, str]] = {}
    for stage in stages:
        for curve in by_stage[stage]:
            reach = curve.reach(CLOSE)
            line = lines.setdefault((curve.criterion, curve.allocation), {})
            line[stage] = "none" if reach is None else percent(reach)
    return Table(
        ["criterion", "allocation", *stages],
        [[*key, *(line.get(s, "") for s in stages)] for key, line in lines.items()],
        f"The sparsity up to which the mean stays within {CLOSE} nats of its reference "
        "at every sparsity tested.",
    )


def _headline(results: Mapping[str, Any]) -> list[str]:
    """How far the best criteria go, in sentences that are computed."""
    seeds = results["seeds"]
    if results["config"]["smoke"]:
        return [
            f"Not trained: a smoke run of {seeds[0]['dense']['steps']} steps; the "
            "numbers show that the program runs, and nothing about pruning."
        ]
    over = f"mean of {len(seeds)} seeds" if len(seeds) > 1 else "one seed"
    sentences = []
    for stage in ("retrained", "pruned"):
        measured = curves(results, stage)
        reaches = {
            f"{curve.criterion} ({curve.allocation})": curve.reach(CLOSE) or 0.0
            for curve in measured
        }
        if not reaches:
            continue
        best = max(reaches.values())
        first = [name for name, reach in reaches.items() if reach == best]
        limit = f"within {CLOSE} nats of the {_RUNS[STAGES[stage]]}"
        sentences.append(
            f"{_TITLES[stage]}, {', '.join(first)} stayed {limit} up to "
            f"{percent(best)} sparsity ({over})."
            if best
            else f"{_TITLES[stage]}, no criterion stayed {limit} ({over})."
        )
    return sentences


def _facts(results: Mapping[str, Any]) -> dict[str, str]:
    """The few numbers that everything else is compared with."""
    seeds, model = results["seeds"], results["model"]
    facts = {}
    for run, name in _RUNS.items():
        runs = [seed[run] for seed in seeds if seed[run]]
        for measure in ("loss", "foreign_loss", "accuracy"):
            if runs and measure in runs[0]:
                text = mean([measures[measure] for measures in runs])
                facts[f"{name}: {measure.replace('_', ' ')}"] = text
    if guessed := model.get("nats_by_frequency"):
        facts["guessing by frequency"] = f"{guessed:.3f}"
    return facts | {
        "steps of training": f"{seeds[0]['dense']['steps']:,}",
        "parameters": f"{model['parameters']:,}",
        "prunable": f"{model['prunable']:,}",
        "seeds": ", ".join(str(seed["seed"]) for seed in seeds),
        "device": results["device"],
    }


def _layers(results: Mapping[str, Any]) -> Section:
    """Percent of each matrix that goes at the sparsity nearest to `_TYPICAL`."""
    cells = [cell for seed in results["seeds"] for cell in seed["cells"]]
    sparsity = min({c["sparsity"] for c in cells}, key=lambda s: abs(s - _TYPICAL))
    shares: dict[str, dict[str, list[float]]] = {}  # criterion to leaf to seeds
    for cell in cells:
        if cell["sparsity"] == sparsity:
            label = f"{cell['criterion']} ({cell['allocation']})"
            by_leaf = shares.setdefault(label, {})
            for leaf, share in cell["sparsity_by_leaf"].items():
                by_leaf.setdefault(leaf, []).append(share)
    leaves = dict.fromkeys(leaf for by_leaf in shares.values() for leaf in by_leaf)
    lines = [
        [
            leaf,
            *(
                f"{100 * np.mean(by_leaf[leaf]):.0f}" if leaf in by_leaf else ""
                for by_leaf in shares.values()
            ),
        ]
        for leaf in leaves
    ]
    caption = f"Percent of each matrix removed at {percent(sparsity)}."
    return Section("Sparsity by layer", [Table(["matrix", *shares], lines, caption)])


def _costs(results: Mapping[str, Any]) -> Section:
    """Time, memory and energy of each phase; bytes and operations where counted."""
    columns = {
        "seconds": ("time", duration),
        "tokens_per_second": ("tokens/s", "{:,.0f}".format),
        "peak_memory_bytes": ("peak memory", size),
        "energy_kwh": ("energy, Wh", lambda energy: f"{1000 * energy:.3g}"),
        "co2_kg": ("CO₂, g", lambda mass: f"{1000 * mass:.3g}"),
    }
    phases = results["phases"]
    measured = [name for name in columns if any(p[name] is not None for p in phases)]
    lines = [
        [
            phase["name"],
            *(
                "" if phase[name] is None else columns[name][1](phase[name])
                for name in measured
            ),
        ]
        for phase in phases
    ]
    header = ["phase", *(columns[name][0] for name in measured)]
    tables = [Table(header, lines, "Seeds one after the other.")]
    if results.get("costs"):
        lines = [
            [
                percent(cost["sparsity"]),
                *(size(cost[f"bytes_{name}"]) for name in ("dense", "packed")),
                *(f"{cost[f'flops_{name}']:,.0f}" for name in ("dense", "kept")),
            ]
            for cost in results["costs"]
        ]
        header = ["sparsity", "bytes", "packed", "FLOPs", "FLOPs kept"]
        caption = (
            "Packed: kept values and one bit a weight. Dense hardware still does the "
            "operations of zeros."
        )
        tables.append(Table(header, lines, caption))
    return Section("Bytes, FLOPs, time and energy", tables)


def _training(results: Mapping[str, Any]) -> Any:
    """The dense models' loss over the steps: training and validation."""
    lines = {}
    for seed in results["seeds"]:
        for name, label in (("loss", "training"), ("validation_loss", "validation")):
            points = [p for p in seed["curve"] if p[name] is not None]
            steps = [point["step"] for point in points]
            losses = [[point[name] for point in points]]
            lines[f"{label} {seed['seed']}"] = (steps, losses)
    panel = Panel("Training the dense models: nats per token", lines)
    return figures.draw([panel], across="training step")


def rows(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The tidy table: one row a seed, criterion, allocation and sparsity."""
    table = []
    for seed in results["seeds"]:
        references = {
            f"{run}_{name}": value
            for run in STAGES.values()
            for name, value in (seed[run] or {}).items()
        }
        for cell in seed["cells"]:
            row = {"seed": seed["seed"], **cell, **references}
            numbers = {k: v for k, v in row.items() if not isinstance(v, dict)}
            table.append(numbers)
    return table
