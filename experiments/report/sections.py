"""The figures of one run, and what its page says: templates/run.html says it how.

A section that has nothing to show is left out, and so is a table's column that was not
measured. "±" is the sample standard deviation over the seeds.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.report import (
    accuracy,
    figures,
    findings,
    life_cycle,
    other_text,
    provenance,
)
from experiments.report import results as results_
from jaxprune.lm.report import page


def drawings(results: Mapping[str, Any]) -> dict[str, Figure]:
    """Every figure that these results can fill, by the name of its file.

    "loss_<allocation>" for each allocation, "foreign_loss_<allocation>" where another
    text was measured, then "weights", "layers", "training" and "life_cycle".
    """
    drawn = {
        f"loss_{allocation}": figures.loss(results, allocation=allocation)
        for allocation in results_.allocations(results)
    }
    if foreign := results_.foreign(results):
        for allocation in results_.allocations(results):
            drawing = figures.loss(foreign, allocation=allocation)
            drawn[f"foreign_loss_{allocation}"] = drawing
    if watched := findings.watched(results):
        drawn["weights"] = figures.weights(results, watched)
    if layer_sparsities := findings.layers(results):
        drawn["layers"] = figures.layers(*layer_sparsities)
    if any(seed.get("curve") for seed in results["seeds"]):
        drawn["training"] = figures.training(results)
    if cycle := life_cycle.from_results(results):
        drawn["life_cycle"] = life_cycle.figure(cycle)
    return drawn


def document(results: Mapping[str, Any]) -> str:
    """The whole of report.html, one page that loads nothing."""
    layers = findings.layers(results)
    foreign = results_.foreign(results)
    curve = any(seed.get("curve") for seed in results["seeds"])
    return provenance.TEMPLATES.get_template("run.html").render(
        title=f"{results['name']}: loss against sparsity",
        name=results["name"],
        headline=findings.headline(results),
        trained=not findings.untrained(results),
        facts=_facts(results),
        reach=_reaches(results),
        losses=_losses(results),
        references=other_text.references(results),
        foreign=_losses(foreign, "foreign-loss") if foreign else {},
        of_foreign=findings.headline(foreign) if foreign else [],
        reading=figures.READING,
        accuracy=accuracy.section(results),
        weights=_weights(results),
        layers={"layers": figures.layers(*layers)} if layers else {},
        samples=_samples(results),
        costs=results.get("costs"),
        phases=_phases(results["phases"]) if results.get("phases") else None,
        life_cycle=life_cycle.section(results),
        training={"training": figures.training(results)} if curve else {},
        provenance=provenance.describe(results),
    )


def _facts(results: Mapping[str, Any]) -> dict[str, str]:
    """The few numbers that everything else is held against."""
    seeds, model = results["seeds"], results["model"]
    steps = sorted({seed["dense"]["steps"] for seed in seeds})
    facts = {
        "steps of training": ", ".join(f"{count:,}" for count in steps),
        "dense loss": findings.mean([seed["dense"]["loss"] for seed in seeds]),
    }
    if guessed := model.get("nats_by_frequency"):
        facts["guessing by frequency"] = f"{guessed:.3f}"
    extra = results_.extra_steps(results)
    if extra is not None:
        control = [seed["control"]["loss"] for seed in seeds]
        facts[f"dense control, {extra} more steps"] = findings.mean(control)
    return facts | {
        "parameters": f"{model['parameters']:,}",
        "of them prunable": f"{model['prunable']:,}",
        "seeds": ", ".join(str(seed["seed"]) for seed in seeds),
        "device": results["device"],
    }


def _losses(results: Mapping[str, Any], name: str = "loss") -> dict[str, Any]:
    """Loss against sparsity, pictured and in numbers, for each allocation.

    `name` is what the figures' names begin with.
    """
    parts: dict[str, Any] = {}
    for number, allocation in enumerate(results_.allocations(results)):
        tables, drawn = [], {}
        for index, stage in enumerate(results_.STAGES, 2 * number):
            if curves := results_.curves(results, stage, allocation):
                tables.append(_loss_table(curves, figures.TITLES[stage]))
                drawn[f"{name}-{index}-{stage}"] = figures.loss(
                    results, allocation=allocation, stages=(stage,)
                )
        parts[allocation] = {"drawn": drawn, "tables": tables}
    return parts


def _loss_table(curves: Sequence[results_.Curve], title: str) -> dict[str, Any]:
    """Criteria by sparsities: the loss with its spread, and the difference."""
    sparsities = sorted({float(s) for curve in curves for s in curve.sparsities})
    cells: dict[str, dict[float, dict[str, Any]]] = {}
    means: dict[float, dict[str, float]] = {sparsity: {} for sparsity in sparsities}
    for curve in curves:
        for column, sparsity in enumerate(map(float, curve.sparsities)):
            measured = curve.losses[:, column].compressed()
            above = curve.above[:, column].compressed()
            # Rounded as it is shown: two criteria that read alike are both best.
            means[sparsity][curve.criterion] = round(float(measured.mean()), 3)
            cells.setdefault(curve.criterion, {})[sparsity] = {
                "loss": findings.mean(measured),
                "above": findings.mean(above, signed=True),
            }
    for criterion, cells_by_sparsity in cells.items():
        for sparsity, cell in cells_by_sparsity.items():
            stage_means = means[sparsity]
            cell["best"] = (
                stage_means[criterion]
                == min(stage_means.values())
                < max(stage_means.values())
            )
    empty = {"loss": "", "above": "", "best": False}
    return {
        "title": title,
        "sparsities": [findings.percent(sparsity) for sparsity in sparsities],
        "rows": {
            criterion: [
                cells_by_sparsity.get(sparsity, empty) for sparsity in sparsities
            ]
            for criterion, cells_by_sparsity in cells.items()
        },
    }


def _reaches(results: Mapping[str, Any]) -> dict[str, Any]:
    """Up to which sparsity each criterion stays close to its reference."""
    reach_rows: dict[tuple[str, str], dict[str, str]] = {}
    header = ["criterion", "allocation"]
    for stage in results_.STAGES:
        curves = results_.curves(results, stage)
        names = [
            f"{stage}, {results_.CLOSE} nats",
            f"{stage}, {findings.percent(findings.CLOSE_SHARE)}",
        ]
        # A stage that was not run has no columns.
        header += names if curves else []
        for curve in curves:
            row = reach_rows.setdefault((curve.criterion, curve.allocation), {})
            row[names[0]] = _reach(curve, results_.CLOSE, relative=False)
            row[names[1]] = _reach(curve, findings.CLOSE_SHARE, relative=True)
    rows = [
        [criterion, allocation, *(row.get(name, "") for name in header[2:])]
        for (criterion, allocation), row in reach_rows.items()
    ]
    return {"header": header, "rows": rows}


def _reach(curve: results_.Curve, limit: float, *, relative: bool) -> str:
    """The mean's reach, and the worst seed's where that is another."""
    mean = curve.reach(limit, relative=relative)
    worst = curve.reach(limit, relative=relative, worst=True)
    texts = [
        "none" if sparsity is None else findings.percent(sparsity)
        for sparsity in (mean, worst)
    ]
    return texts[0] if mean == worst else f"{texts[0]} ({texts[1]})"


def _weights(results: Mapping[str, Any]) -> dict[str, Any] | None:
    """How single weights moved, and what each criterion made of it."""
    watched = findings.watched(results)
    if not watched:
        return None
    first = results["seeds"][0]
    drawn = {
        f"weights-{index}": figures.weights(results, [criterion])
        for index, criterion in enumerate(watched)
    }
    count = len(first["weights"]["names"])
    return {"drawn": drawn, "count": count, "seed": first["seed"]}


def _samples(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the models say before and after, of each seed that has it."""
    return [
        {
            "seed": seed["seed"],
            "samples": [{"pictures": None, **sample} for sample in seed["samples"]],
        }
        for seed in results["seeds"]
        if seed.get("samples")
    ]


def _phases(phases: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One row for each kind of phase, over all seeds, and their total."""
    columns = (
        ("time", "seconds", sum, page.duration),
        ("tokens/s, mean", "tokens_per_second", np.mean, lambda rate: f"{rate:,.0f}"),
        ("peak memory", "peak_memory_bytes", max, page.size),
        ("energy", "energy_kwh", sum, lambda energy: f"{1000 * energy:,.3g} Wh"),
        ("CO₂", "co2_kg", sum, lambda mass: f"{1000 * mass:,.3g} g"),
    )
    measured = [
        column
        for column in columns
        if any(phase.get(column[1]) is not None for phase in phases)
    ]
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for phase in phases:
        groups.setdefault(phase["name"], []).append(phase)
    rows = []
    for name, group in [*groups.items(), ("total", list(phases))]:
        row = [name, str(len(group))]
        for _, key, reduce, write in measured:
            values = [phase[key] for phase in group if phase.get(key) is not None]
            # A mean rate over training and evaluation together is of nothing.
            skipped = not values or (name == "total" and reduce is np.mean)
            row.append("" if skipped else write(reduce(values)))
        rows.append(row)
    header = ["phase", "times", *(name for name, *_ in measured)]
    return {"header": header, "rows": rows}
