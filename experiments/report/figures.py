"""The report's figures, as matplotlib `Figure` objects that nothing global knows of.

Lines carry their names where they end. Sparsities are drawn in percent and losses
in nats per token above a reference, on an axis linear within `LINEAR` of it and
logarithmic beyond, so that a thousandth and a whole nat are both legible.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from experiments.report import plots
from experiments.report import results as results_
from jaxprune.lm.report import canvas

LINEAR = 0.01  # nats
TITLES = {"pruned": "Right after pruning", "retrained": "After retraining"}
_REFERENCES = {"pruned": "dense model", "retrained": "dense control"}
READING = (
    "Validation loss above the same seed's reference. Lines are means over the seeds, "
    f"bands their range. The axis is linear within {LINEAR} nats of the reference and "
    f"logarithmic beyond; the grey strip is ±{results_.CLOSE} nats."
)
_TICKS = np.array([0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100])


@canvas.STYLE
def loss(
    results: Mapping[str, Any],
    *,
    allocation: str,
    stages: Sequence[results_.Stage] = results_.STAGES,
) -> Figure:
    """Loss against sparsity for each criterion: one panel for each stage.

    Mean over the seeds as a line, their range as a band, the reference at zero, the
    other dense model dashed. All panels of one `results` have the same vertical axis.
    Stages without a loss are left out.
    """
    style = plots.styles(results_.criteria(results))
    shown = {stage: results_.curves(results, stage, allocation) for stage in stages}
    shown = {stage: curves for stage, curves in shown.items() if curves}
    # The longest label that can stand at a line's end decides the room beside a panel.
    figure, panels = plots.panels(len(shown), [*style, "control  0.000"])
    for axes, (stage, curves) in zip(panels, shown.items(), strict=True):
        lines = [(curve.criterion, style[curve.criterion], curve) for curve in curves]
        _against_sparsity(axes, lines, _limits([results]))
        dense = _dense(results, stage)
        for name, nats in dense.items():
            dash: Any = "-" if nats == 0 else (0, (4, 3))
            axes.axhline(nats, color=canvas.INK, lw=1, ls=dash, label=name, zorder=1)
        ends = [
            (name, canvas.INK, axes.get_xlim()[1], nats_above)
            for name, nats_above in dense.items()
        ]
        plots.name_ends(axes, _ends(lines) + ends)
        axes.set_title(f"{TITLES[stage]}: nats above the {_REFERENCES[stage]}")
    return figure


@canvas.STYLE
def runs(
    labelled: Mapping[str, Mapping[str, Any]], *, stage: results_.Stage, allocation: str
) -> Figure:
    """Several runs, by label: a panel for each criterion, a line for each run."""
    style = plots.styles(list(labelled))
    panels: dict[str, list[tuple[str, plots.Line, results_.Curve]]] = {}
    for label, results in labelled.items():
        for curve in results_.curves(results, stage, allocation):
            line = (label, style[label], curve)
            panels.setdefault(curve.criterion, []).append(line)
    figure, axes = plots.panels(len(panels), list(style))
    limits = _limits(list(labelled.values()))
    for panel, (criterion, lines) in zip(axes, panels.items(), strict=True):
        _against_sparsity(panel, lines, limits)
        panel.axhline(0, color=canvas.INK, lw=1, zorder=1)
        plots.name_ends(panel, _ends(lines))
        panel.set_title(criterion)
        panel.set_ylabel(f"nats above the {_REFERENCES[stage]}")
    return figure


@canvas.STYLE
def weights(results: Mapping[str, Any], criteria: Sequence[str]) -> Figure:
    """How single weights moved and which were kept: one panel for each criterion.

    The first seed's sampled weights over the steps; a diamond at the right is the
    weighted average, joined to the final value. Thick lines are those that magnitude
    decides otherwise.
    """
    sampled = results["seeds"][0]["weights"]
    figure, panels = plots.panels(len(criteria), ["average  "])
    steps, values = np.asarray(sampled["steps"]), np.asarray(sampled["values"])
    end = steps[-1] + 0.07 * (steps[-1] - steps[0])
    base = sampled["kept"].get("magnitude")  # None where magnitude was not asked for
    for axes, criterion in zip(panels, criteria, strict=True):
        kept = sampled["kept"][criterion]
        unlike_magnitude = [a != b for a, b in zip(kept, base or kept, strict=True)]
        for row, average, keep, bold in zip(
            values, sampled["averages"], kept, unlike_magnitude, strict=True
        ):
            colour, alpha = (canvas.KEPT, 0.75) if keep else (canvas.REMOVED, 0.6)
            look: dict[str, Any] = {"color": colour, "alpha": 1 if bold else alpha}
            width = 2.2 if bold else 0.9
            axes.plot(steps, row, lw=width, **look)
            axes.plot([steps[-1], end], [row[-1], average], lw=0.6, ls=":", **look)
            size = 4.5 if bold else 3.2
            axes.plot(end, average, "D", ms=size, mew=0, clip_on=False, **look)
        axes.axhline(0, color=canvas.FAINT, lw=0.8, zorder=0)
        axes.set_xlim(steps[0], end)
        axes.set_xlabel("training step")
        axes.set_ylabel("weight")
        axes.set_title(
            f"{criterion} at {100 * sampled['sparsity']:g} % sparsity", pad=24
        )
        place: dict[str, Any] = {"transform": axes.transAxes, "va": "bottom"}
        axes.text(0, 1.02, f"{sum(kept)} kept", color=canvas.KEPT, **place)
        removed = f"{len(kept) - sum(kept)} removed"
        axes.text(0.2, 1.02, removed, color=canvas.REMOVED, **place)
        if any(unlike_magnitude):
            note = f"thick: {sum(unlike_magnitude)} unlike magnitude"
            axes.text(1, 1.02, note, size=8.5, ha="right", **place)
        plots.beside(axes, "average", (end, max(sampled["averages"])), canvas.INK)
    return figure


@canvas.STYLE
def layers(
    sparsities: Mapping[str, Mapping[str, float]], sparsity: float, allocation: str
) -> Figure:
    """Sparsity by layer: rows are leaves, columns criteria, colour the deviation.

    `sparsities` has those of each leaf, for each criterion. There is no colour at the
    sparsity asked for, orange above it and blue below.
    """
    names = list(
        dict.fromkeys(leaf for by_leaf in sparsities.values() for leaf in by_leaf)
    )
    # (leaves, criteria); NaN where a criterion did not prune a leaf.
    table = np.array(
        [
            [by_leaf.get(name, np.nan) for by_leaf in sparsities.values()]
            for name in names
        ]
    )
    # Inches: room for the names of the leaves, and for those of the criteria above.
    left_margin = 0.075 * max(map(len, names)) + 0.15
    right_margin, low_margin, top_margin = 0.9, 0.1, 1.35
    inner_width, inner_height = 0.62 * len(sparsities), 0.27 * len(names)
    width = left_margin + inner_width + right_margin
    height = inner_height + top_margin + low_margin
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes(
        (
            left_margin / width,
            low_margin / height,
            1 - (left_margin + right_margin) / width,
            1 - (top_margin + low_margin) / height,
        )
    )
    # Symmetric about the sparsity asked for; at least a little, or all would be one
    # colour by a division by zero.
    reach = max(float(np.nanmax(np.abs(table - sparsity))), 1e-6)
    # RGBA: blue, through transparent at no deviation, to orange.
    ends = [(0, 0.45, 0.7, 0.6), (0.5, 0.5, 0.5, 0), (0.9, 0.45, 0, 0.65)]
    colours = LinearSegmentedColormap.from_list("deviation", ends)
    axes.pcolormesh(table - sparsity, cmap=colours, vmin=-reach, vmax=reach)
    axes.invert_yaxis()  # the first leaf on top
    for (row, column), share in np.ndenumerate(table):
        text = "" if np.isnan(share) else f"{100 * share:.0f}"
        axes.text(column + 0.5, row + 0.52, text, ha="center", va="center")
    _label_cells(axes, names, list(sparsities))
    title = f"% removed of each matrix at {100 * sparsity:g} %, {allocation} allocation"
    figure.text(0.1 / width, 1 - 0.12 / height, title, size=10.5, va="top")
    return figure


def _label_cells(axes: Axes, leaves: Sequence[str], criteria: Sequence[str]) -> None:
    """Names the rows and, above them, the columns, these in their colours."""
    axes.tick_params(length=0, labeltop=True, labelbottom=False)
    axes.set_yticks(np.arange(len(leaves)) + 0.5, leaves)
    axes.set_xticks(np.arange(len(criteria)) + 0.5, criteria, rotation=35, ha="left")
    style = plots.styles(criteria)
    for label, name in zip(axes.get_xticklabels(), criteria, strict=True):
        label.set_color(style[name].colour)
    axes.spines[:].set_visible(False)


@canvas.STYLE
def training(results: Mapping[str, Any]) -> Figure:
    """The dense models' loss over the steps: training faint, validation strong."""
    figure, (axes,) = plots.panels(1, ["validation  "])
    colour = next(iter(canvas.COLOURS))
    last: tuple[float, float] | None = None
    for seed in results["seeds"]:
        curve = seed.get("curve") or ()
        axes.plot(*_points(curve, "loss"), color=canvas.FAINT, lw=0.6, alpha=0.8)
        steps, measured = _points(curve, "validation_loss")
        axes.plot(steps, measured, "o-", color=colour, ms=3, lw=1.4)
        if steps:
            last = (steps[-1], measured[-1])
    if last:
        plots.beside(axes, "validation", last, colour)
    axes.set_title("Training the dense models: nats per token")
    place: dict[str, Any] = {"transform": axes.transAxes, "ha": "right", "va": "top"}
    axes.text(0.98, 0.96, "training batches", color=canvas.FAINT, **place)
    axes.set_xlabel("training step")
    axes.grid()
    return figure


def _points(curve: Sequence[Mapping[str, Any]], name: str) -> tuple[list, list]:
    """Steps and values where the value was measured."""
    measured = [point for point in curve if point.get(name) is not None]
    return [point["step"] for point in measured], [point[name] for point in measured]


def _limits(all_results: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """One vertical range for every panel of these runs, in nats above a reference."""
    values = [
        value
        for results in all_results
        for stage in results_.STAGES
        for curve in results_.curves(results, stage)
        for value in (curve.above.min(), curve.above.max())
    ]
    for results in all_results:
        for stage in results_.STAGES:
            values += _dense(results, stage).values()
    # Room for markers at the ends, and never so near that the strip of ±`CLOSE` fills
    # the panel.
    low, high = 1.3 * min(values), 1.3 * max(values)
    return min(-1.5 * results_.CLOSE, low), max(5 * results_.CLOSE, high)


def _dense(results: Mapping[str, Any], stage: results_.Stage) -> dict[str, float]:
    """Both dense models by name and mean loss: how far above the stage's reference."""
    dense = float(np.mean([seed["dense"]["loss"] for seed in results["seeds"]]))
    losses_by_run = {"dense": dense}
    if results_.extra_steps(results) is not None:
        losses = [seed["control"]["loss"] for seed in results["seeds"]]
        losses_by_run["control"] = float(np.mean(losses))
    # Retrained models are held against the control, which had as many steps.
    reference = dense if stage == "pruned" else list(losses_by_run.values())[-1]
    return {
        f"{name}  {loss:.3f}": loss - reference for name, loss in losses_by_run.items()
    }


def _against_sparsity(
    axes: Axes,
    lines: Sequence[tuple[str, plots.Line, results_.Curve]],
    limits: tuple[float, float],
) -> None:
    """Draws curves of nats above a reference, on axes that fit them all."""
    sparsities = np.unique(np.concatenate([curve.sparsities for *_, curve in lines]))
    percent = 100 * sparsities
    end = max(percent[-1], percent[0] + 1)  # one sparsity has no width of its own
    axes.set_xlim(percent[0], end)
    # Losses below the reference occur, which a logarithm cannot show.
    axes.set_yscale("symlog", linthresh=LINEAR, linscale=0.8)
    axes.set_ylim(*limits)
    axes.axhspan(-results_.CLOSE, results_.CLOSE, color=canvas.FAINT, alpha=0.15, lw=0)
    for name, style, curve in lines:
        x, above = 100 * curve.sparsities, curve.above
        if above.shape[0] > 1:
            band: dict[str, Any] = {"color": style.colour, "alpha": 0.16, "lw": 0}
            axes.fill_between(x, above.min(0), above.max(0), **band)
        look: dict[str, Any] = {"marker": style.marker, "ls": style.dash}
        look |= {"color": style.colour, "label": name, "clip_on": False}
        axes.plot(x, above.mean(0), **look)
    ticks = np.concatenate([-_TICKS, [0], _TICKS])
    ticks = ticks[(ticks >= limits[0]) & (ticks <= limits[1])]
    axes.set_yticks(
        ticks, [f"{tick:+g}".replace("-", "−") if tick else "0" for tick in ticks]
    )
    axes.set_yticks([], minor=True)
    shown: list[float] = []  # ticks that do not run into each other
    for tick in percent:
        if not shown or tick - shown[-1] >= 0.08 * (end - percent[0]):
            shown.append(float(tick))
    axes.set_xticks(shown, [f"{tick:g}" for tick in shown])
    axes.set_xlabel("sparsity: % of the weights removed")
    axes.grid()
    axes.set_axisbelow(True)


def _ends(
    lines: Sequence[tuple[str, plots.Line, results_.Curve]],
) -> list[tuple[str, str, float, float]]:
    """Name, colour and last point of each line."""
    ends = []
    for name, style, curve in lines:
        percent, nats = 100 * float(curve.sparsities[-1]), curve.above[:, -1].mean()
        ends.append((name, style.colour, percent, float(nats)))
    return ends
