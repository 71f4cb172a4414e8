"""How many questions are answered right, where a run measured that.

Cells may have "accuracy_pruned" and "accuracy_retrained", fractions in [0, 1], and with
few questions "by_question_pruned" and "by_question_retrained", question to fraction; a
run may say in "text_only" what can be had without looking.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.report import figures, findings, plots
from experiments.report import results as results_
from jaxprune.lm.report import canvas

Points = dict[str, dict[float, list[float]]]
_RUNS = {"pruned": "dense", "retrained": "control"}


def points(results: Mapping[str, Any], stage: str, allocation: str) -> Points:
    """Criterion to sparsity to one accuracy a seed; empty where none was measured."""
    by_criterion: Points = {}
    for seed in results["seeds"]:
        for cell in seed["cells"]:
            value = cell.get(f"accuracy_{stage}")
            if value is not None and cell["allocation"] == allocation:
                by_sparsity = by_criterion.setdefault(cell["criterion"], {})
                by_sparsity.setdefault(cell["sparsity"], []).append(value)
    return by_criterion


def section(results: Mapping[str, Any]) -> dict[str, Any]:
    """Accuracy against sparsity, pictured and in numbers, and question by question."""
    stages: list[dict[str, Any]] = []
    for number, allocation in enumerate(results_.allocations(results)):
        for stage in results_.STAGES:
            if measured := points(results, stage, allocation):
                picture = drawing(results, stage, allocation)
                stages.append(
                    {
                        "title": f"{figures.TITLES[stage]}, {allocation}",
                        "drawn": {f"accuracy-{number}-{stage}": picture},
                        "references": _references(results, stage),
                        **_table(measured),
                    }
                )
    return {"stages": stages, "by_question": _by_question(results)}


def _by_question(results: Mapping[str, Any]) -> dict[str, Any] | None:
    """Each question's share, dense and by the first allocation's first criterion."""
    allocation, criterion = (
        results_.allocations(results)[0],
        results_.criteria(results)[0],
    )
    columns = {"dense": [seed["dense"].get("by_question") for seed in results["seeds"]]}
    for stage in results_.STAGES:
        for seed in results["seeds"]:
            for cell in seed["cells"]:
                if (cell["allocation"], cell["criterion"]) == (allocation, criterion):
                    name = f"{findings.percent(cell['sparsity'])} {stage}"
                    shares = cell.get(f"by_question_{stage}")
                    columns.setdefault(name, []).append(shares)
    measured = {
        name: shares_by_seed
        for name, shares_by_seed in columns.items()
        if all(shares_by_seed)
    }
    if "dense" not in measured:
        return None
    rows = [
        [
            question,
            *(
                f"{100 * _mean(shares_by_seed, question):.1f}"
                for shares_by_seed in measured.values()
            ),
        ]
        for question in measured["dense"][0]
    ]
    caption = f"Percent right of each question: {criterion}, {allocation}."
    return {"header": ["question", *measured], "rows": rows, "caption": caption}


def _mean(shares_by_seed: Sequence[Mapping[str, float]], question: str) -> float:
    return float(np.mean([shares[question] for shares in shares_by_seed]))


def _references(results: Mapping[str, Any], stage: str) -> str:
    """What the lines are held against, in words."""
    parts = [
        f"{name}: {text}"
        for name, text in (
            ("dense", _share(_dense(results, stage))),
            ("without the picture", _share(_text_only(results))),
        )
        if text
    ]
    return "Lines are means over the seeds. " + "; ".join(parts) + "."


def _dense(results: Mapping[str, Any], stage: str) -> float | None:
    """The dense run's, of this stage, mean of the seeds."""
    runs = [seed.get(_RUNS[stage]) or {} for seed in results["seeds"]]
    values = [run["accuracy"] for run in runs if run.get("accuracy") is not None]
    return float(np.mean(values)) if values else None


def _text_only(results: Mapping[str, Any]) -> float | None:
    return (results.get("text_only") or {}).get("accuracy")


def _share(value: float | None) -> str:
    return "" if value is None else findings.percent(round(value, 3))


def _table(by_criterion: Points) -> dict[str, Any]:
    """Criteria by sparsities: mean and spread of the seeds, in percent."""
    sparsities = sorted(
        {sparsity for by_sparsity in by_criterion.values() for sparsity in by_sparsity}
    )
    rows = []
    for criterion, by_sparsity in by_criterion.items():
        row = [criterion]
        for sparsity in sparsities:
            values = 100 * np.array(by_sparsity.get(sparsity, []))
            # Percentage points; the sample deviation needs two seeds.
            spread = f" ± {values.std(ddof=1):.1f}" if len(values) > 1 else ""
            row.append(f"{values.mean():.1f}{spread}" if len(values) else "")
        rows.append(row)
    header = ["criterion", *map(findings.percent, sparsities)]
    return {"header": header, "rows": rows}


@canvas.STYLE
def drawing(results: Mapping[str, Any], stage: str, allocation: str) -> Figure:
    """Accuracy against sparsity, a line for each criterion."""
    by_criterion = points(results, stage, allocation)
    style = plots.styles(results_.criteria(results))
    references = {"dense": _dense(results, stage), "no picture": _text_only(results)}
    levels = {name: level for name, level in references.items() if level is not None}
    figure, (axes,) = plots.panels(1, [*by_criterion, *levels])
    ends: list[tuple[str, str, float, float]] = []
    for criterion, by_sparsity in by_criterion.items():
        percent = [100 * sparsity for sparsity in sorted(by_sparsity)]
        means = [
            100 * float(np.mean(by_sparsity[sparsity]))
            for sparsity in sorted(by_sparsity)
        ]
        look = style[criterion]
        axes.plot(percent, means, color=look.colour, marker=look.marker, ls=look.dash)
        ends.append((criterion, look.colour, percent[-1], means[-1]))
    # Levels of the models without pruning are named at the right, as the lines are.
    last = max(end[2] for end in ends)
    for name, level in levels.items():
        axes.axhline(100 * level, color=canvas.INK, lw=1, zorder=1)
        ends.append((name, canvas.INK, last, 100 * level))
    # The whole range: an axis that fits the lines would make small differences large.
    axes.set_ylim(0, 100)
    axes.set_xlabel("sparsity: % of the weights removed")
    axes.set_title(f"{figures.TITLES[stage]}, {allocation}: % answered right")
    axes.grid()
    plots.name_ends(axes, ends)
    return figure
