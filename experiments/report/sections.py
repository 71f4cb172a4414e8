"""The figures and the page of one run, section by section.

A section that has nothing to show is left out, and so is a table's column that was not
measured. "±" is the sample standard deviation over the seeds.
"""

import html
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.report import accuracy, figures, findings
from experiments.report import results as results_
from jaxprune.formats import atomic
from jaxprune.report import page


def drawings(results: Mapping[str, Any]) -> dict[str, Figure]:
    """Every figure that these results can fill, by the name of its file.

    "loss_<scope>" for each scope, then "weights", "layers" and "training".
    """
    drawn = {
        f"loss_{scope}": figures.loss(results, scope=scope)
        for scope in results_.scopes(results)
    }
    if watched := findings.watched(results):
        drawn["weights"] = figures.weights(results, watched)
    if found := findings.layers(results):
        drawn["layers"] = figures.layers(*found)
    if any(seed.get("curve") for seed in results["seeds"]):
        drawn["training"] = figures.training(results)
    return drawn


def document(results: Mapping[str, Any]) -> str:
    """The whole of report.html, one page that loads nothing."""
    parts = [
        _opening(results),
        _losses(results),
        accuracy.section(results),
        _weights(results),
        _layers(results),
        _samples(results),
        _costs(results),
        _making(results),
    ]
    title = f"{results['name']}: loss against sparsity"
    return page.page(title, "\n".join(part for part in parts if part))


def _opening(results: Mapping[str, Any]) -> str:
    """The headline and the few numbers that everything else is held against."""
    first, *others = findings.headline(results)
    seeds = results["seeds"]
    model = results["model"]
    facts = {"dense loss": findings.mean([seed["dense"]["loss"] for seed in seeds])}
    extra = results_.extra_steps(results)
    if extra is not None:
        control = [seed["control"]["loss"] for seed in seeds]
        facts[f"dense control, {extra} more steps"] = findings.mean(control)
    facts |= {
        "parameters": f"{model['parameters']:,}",
        "of them prunable": f"{model['prunable']:,}",
        "seeds": ", ".join(str(seed["seed"]) for seed in seeds),
        "device": results["device"],
    }
    listed = "".join(
        f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd></div>"
        for name, value in facts.items()
    )
    return (
        f"<h1>{html.escape(results['name'])}</h1>\n"
        f'<p class="lead">{html.escape(first)}</p>\n'
        + "".join(f"<p>{html.escape(sentence)}</p>\n" for sentence in others)
        + f"<dl>{listed}</dl>"
    )


def _losses(results: Mapping[str, Any]) -> str:
    """Loss against sparsity, pictured and in numbers, for each scope."""
    parts = ["<h2>Loss against sparsity</h2>", _reach_table(results)]
    scopes = results_.scopes(results)
    for scope in scopes:
        if len(scopes) > 1:
            parts.append(f"<h3>{html.escape(scope.capitalize())} scope</h3>")
        curves = {
            stage: results_.curves(results, stage, scope) for stage in results_.STAGES
        }
        drawn = {
            f"loss-{index}-{stage}": figures.loss(results, scope=scope, stages=(stage,))
            for index, (stage, found) in enumerate(
                curves.items(), scopes.index(scope) * 2
            )
            if found
        }
        parts.append(page.picture(drawn, figures.READING))
        for stage, found in curves.items():
            if found:
                parts.append(_loss_table(found, figures.TITLES[stage]))
    return "\n".join(parts)


def _loss_table(curves: Sequence[results_.Curve], title: str) -> str:
    """Criteria by sparsities: the loss with its spread, and below it the difference."""
    sparsities = sorted({float(s) for curve in curves for s in curve.sparsities})
    cells: dict[str, dict[float, tuple[str, str]]] = {}
    means: dict[float, dict[str, float]] = {sparsity: {} for sparsity in sparsities}
    for curve in curves:
        for column, sparsity in enumerate(map(float, curve.sparsities)):
            measured = curve.losses[:, column].compressed()
            above = curve.above[:, column].compressed()
            means[sparsity][curve.criterion] = round(float(measured.mean()), 3)
            texts = (findings.mean(measured), findings.mean(above, signed=True))
            cells.setdefault(curve.criterion, {})[sparsity] = texts
    table = []
    for criterion, known in cells.items():
        row: list[str] = [criterion]
        for sparsity in sparsities:
            texts = known.get(sparsity, ("", ""))
            of = means[sparsity]
            best = of.get(criterion) == min(of.values()) < max(of.values())
            mark = ' class="best"' if best else ""
            row.append(f"<td{mark}>{texts[0]}<small>{texts[1]}</small></td>")
        table.append(row)
    return page.table(
        ["criterion", *(findings.percent(sparsity) for sparsity in sparsities)],
        table,
        f"{title}: loss in nats per token, mean ± spread of the seeds, and below it "
        "the same above the reference of each seed. The lowest of each column is "
        "marked; differences under the spread decide nothing.",
    )


def _reach_table(results: Mapping[str, Any]) -> str:
    """Up to which sparsity each criterion stays close to its reference."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    header = ["criterion", "scope"]
    for stage in results_.STAGES:
        curves = results_.curves(results, stage)
        names = [
            f"{stage}, {results_.CLOSE} nats",
            f"{stage}, {findings.percent(findings.CLOSE_SHARE)}",
        ]
        header += names if curves else []
        for curve in curves:
            row = found.setdefault((curve.criterion, curve.scope), {})
            row[names[0]] = _reach(curve, results_.CLOSE, relative=False)
            row[names[1]] = _reach(curve, findings.CLOSE_SHARE, relative=True)
    rows = [
        [criterion, scope, *(row.get(name, "") for name in header[2:])]
        for (criterion, scope), row in found.items()
    ]
    return page.table(
        header,
        rows,
        "The sparsity up to which the mean loss stays within 0.015 nats, or 1 %, of "
        "its reference at every sparsity tested; in brackets where every seed does.",
    )


def _reach(curve: results_.Curve, limit: float, *, relative: bool) -> str:
    """The mean's reach, and the worst seed's where that is another."""
    mean = curve.reach(limit, relative=relative)
    worst = curve.reach(limit, relative=relative, worst=True)
    texts = ["none" if at is None else findings.percent(at) for at in (mean, worst)]
    return texts[0] if mean == worst else f"{texts[0]} ({texts[1]})"


def _weights(results: Mapping[str, Any]) -> str:
    """How single weights moved, and what each criterion made of it."""
    watched = findings.watched(results)
    if not watched:
        return ""
    drawn = {
        f"weights-{index}": figures.weights(results, [criterion])
        for index, criterion in enumerate(watched)
    }
    seed = results["seeds"][0]
    count = len(seed["weights"]["names"])
    return "<h2>How single weights moved, and which were kept</h2>\n" + page.picture(
        drawn,
        f"{count} weights of seed {seed['seed']} through training, the same in every "
        "panel. Diamonds at the right are their weighted averages, joined to the final "
        "values; thick lines are weights that magnitude decides otherwise.",
    )


def _layers(results: Mapping[str, Any]) -> str:
    """Which matrices give the most."""
    found = findings.layers(results)
    if not found:
        return ""
    caption = (
        "Percent of each matrix removed, mean of the seeds: blue where a criterion "
        "spares a matrix, orange where it takes more than its share."
    )
    drawn = {"layers": figures.layers(*found)}
    heading = "<h2>Sparsity by layer</h2>\n"
    return heading + page.picture(drawn, caption, wide=True)


def _samples(results: Mapping[str, Any]) -> str:
    """What the models say before and after; the first seed's open, others folded."""
    parts: list[str] = []
    first = (results["seeds"][0].get("samples") or [{}])[0]
    title = "Answers" if first.get("pictures") else "Text sampled"
    for seed in results["seeds"]:
        texts = "".join(
            f"<div><h3>{html.escape(sample['label'])}</h3>{_shown(sample)}</div>"
            for sample in seed.get("samples") or ()
        )
        if texts:
            grid = f'<div class="texts">{texts}</div>'
            fold = f"<details><summary>Seed {seed['seed']}</summary>{grid}</details>"
            parts.append(fold if parts else grid)
    return "\n".join([f"<h2>{title} before and after</h2>", *parts]) if parts else ""


def _shown(sample: Mapping[str, Any]) -> str:
    """Pictures with their questions where a sample has them, else its text."""
    if sample.get("pictures"):
        return accuracy.pictured(sample)
    return f"<pre>{html.escape(sample['text'].strip())}</pre>"


def _costs(results: Mapping[str, Any]) -> str:
    """Bytes and FLOPs by sparsity; time, memory and energy by phase."""
    parts: list[str] = []
    if costs := results.get("costs"):
        rows = [
            [
                findings.percent(cost["sparsity"]),
                page.size(cost["bytes_dense"]),
                page.size(cost["bytes_packed"]),
                f"{cost['bytes_packed'] / max(cost['bytes_dense'], 1):.0%}",
                f"{cost['flops_dense']:,.0f}",
                f"{cost['flops_kept']:,.0f}",
            ]
            for cost in costs
        ]
        names = ("sparsity", "bytes", "packed", "of dense", "FLOPs", "FLOPs kept")
        caption = (
            "Packed: kept values and one bit a weight. FLOPs kept are what remains "
            "between the zeros; dense hardware still does them all."
        )
        parts.append(page.table(names, rows, caption))
    if results.get("phases"):
        parts.append(_phase_table(results["phases"]))
    return (
        "\n".join(["<h2>Bytes, FLOPs, time and energy</h2>", *parts]) if parts else ""
    )


def _phase_table(phases: Sequence[Mapping[str, Any]]) -> str:
    """One row for each kind of phase, over all seeds, and their total."""
    columns = (
        ("time", "seconds", sum, page.duration),
        ("tokens/s, mean", "tokens_per_second", np.mean, lambda rate: f"{rate:,.0f}"),
        ("peak memory", "peak_memory_bytes", max, page.size),
        ("energy", "energy_kwh", sum, lambda energy: f"{1000 * energy:,.3g} Wh"),
        ("CO₂", "co2_kg", sum, lambda mass: f"{1000 * mass:,.3g} g"),
    )
    known = [
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
        for _, key, reduce, write in known:
            values = [phase[key] for phase in group if phase.get(key) is not None]
            skipped = not values or (name == "total" and reduce is np.mean)
            row.append("" if skipped else write(reduce(values)))
        rows.append(row)
    header = ["phase", "times", *(name for name, *_ in known)]
    return page.table(header, rows, "All seeds together.")


def _making(results: Mapping[str, Any]) -> str:
    """How the dense models trained, the command, configuration and versions."""
    parts = ["<h2>How this was made</h2>"]
    parts.append(f"<pre>{html.escape(command(results))}</pre>")
    if any(seed.get("curve") for seed in results["seeds"]):
        caption = "Each seed's dense model: training batches and validation set."
        drawn = {"training": figures.training(results)}
        parts.append(page.picture(drawn, caption))
    pairs = {"configuration": results["config"], "versions": results["versions"]}
    for title, of in pairs.items():
        rows = [[name, str(value)] for name, value in atomic.flat(of).items()]
        parts.append(f'<div class="pairs">{page.table([title, ""], rows)}</div>')
    if results.get("finished"):
        made = html.escape(f"Finished {results['finished']} on {results['device']}.")
        parts.append(f'<p class="note">{made}</p>')
    return "\n".join(parts)


def command(results: Mapping[str, Any]) -> str:
    """The command that makes these results again.

    Where none is recorded, it has a flag for each entry of the configuration.
    """
    if results.get("command"):
        return str(results["command"])
    words = ["python", "-m", f"experiments.{results['name']}"]
    for name, value in atomic.flat(results["config"]).items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, list | tuple):
            words += [f"--{flag}", *map(str, value)]
        elif value is not None:
            words += [f"--{flag}", str(value)]
    return shlex.join(words)
