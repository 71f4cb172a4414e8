"""The page of a pruned checkpoint, made from its jaxprune.json alone.

What was not measured has no section. Names of tensors are read as layers and kinds of
matrix: what stands behind the first number, "3.mlp.up_proj" being layer 3.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.colors import LinearSegmentedColormap, LogNorm, Normalize
from matplotlib.figure import Figure

from jaxprune.lm.report import canvas, page
from jaxprune.lm.report.stages import measured

_WORST = 12  # rows of the table of errors
_WIDEST = 40  # layers whose cells have numbers
_MAP = LinearSegmentedColormap.from_list(
    "share", [(0.84, 0.37, 0, 0), (0.84, 0.37, 0, 0.75)]
)


def document(record: Mapping[str, Any]) -> str:
    """The whole of report.html.

    Args:
      record: what jaxprune.json holds: "method", "pattern", "sparsity", "achieved",
        "tensors", "sizes", and where measured "perplexity", "weights",
        "retraining", "calibration", "phases".

    Returns:
      One HTML page that loads nothing.
    """
    rows = [row for row in record.get("weights") or () if row.get("error") is not None]
    return page.render(
        "pruned_model.html",
        title="A pruned model",
        record=record,
        headline=headline(record),
        facts=_facts(record),
        stages=measured(record),
        zeros=_zeros(record),
        errors=_errors({row["name"]: row["error"] for row in rows}),
        unreached=[row for row in rows if row.get("by_magnitude")],
        worst=sorted(rows, key=lambda row: -row["error"])[:_WORST],
    )


def headline(record: Mapping[str, Any]) -> str:
    """What happened, in a sentence of plain text."""
    sizes = record["sizes"]
    share = sizes["zeros"] / max(sizes["parameters"], 1)
    pruned = (
        f"{record['achieved']:.1%} of the weights of {len(record['tensors'])} "
        f"matrices, {share:.1%} of the model, were pruned by {record['method']}"
    )
    return f"{': '.join(filter(None, [pruned, page.perplexity_change(record)]))}."


def layers(tensors: Mapping[str, float], *, logarithmic: bool, title: str) -> Figure:
    """A number for each matrix: rows are kinds, columns layers."""
    # Names without a layer are left out. Colours follow the logarithm, for errors, or
    # are from 0 to 1.
    places = {name: place for name in tensors if (place := _place(name))}
    values = {place: tensors[name] for name, place in places.items()}
    if len(values) < len(places):  # an encoder and a decoder: the kind says whose
        values = {
            (layer, f"{re.split(r'[./][0-9]', name)[0]}.{role}"): tensors[name]
            for name, (layer, role) in places.items()
        }
    kinds = list(dict.fromkeys(role for _, role in values))
    numbers = sorted({layer for layer, _ in values})
    # (kinds, layers); a layer that lacks a matrix stays white
    grid = np.full((len(kinds), len(numbers)), np.nan)
    for (layer, role), value in values.items():
        grid[kinds.index(role), numbers.index(layer)] = value
    return _heat(grid, kinds, numbers, logarithmic=logarithmic, title=title)


@canvas.STYLE
def _heat(
    grid: np.ndarray,
    kinds: Sequence[str],
    numbers: Sequence[int],
    *,
    logarithmic: bool,
    title: str,
) -> Figure:
    narrow = len(numbers) > _WIDEST  # a cell then has no room for its number
    cell = 0.16 if narrow else 0.42
    margin, right, top, low = 0.09 * max(map(len, kinds)) + 0.2, 0.2, 0.55, 0.5
    width = max(margin + cell * len(numbers) + right, 0.085 * len(title) + 0.4)
    height = top + 0.3 * len(kinds) + low
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes(
        (
            margin / width,
            low / height,
            cell * len(numbers) / width,
            0.3 * len(kinds) / height,
        )
    )
    # Errors span orders of magnitude; without any above zero there is no logarithm.
    norm = Normalize(0, 1)
    if logarithmic:
        positive = grid[grid > 0]
        low_end = float(positive.min()) if positive.size else 1e-6
        norm = LogNorm(low_end, max(float(np.nanmax(grid)), 1.01 * low_end))
    axes.pcolormesh(np.ma.masked_invalid(grid), cmap=_MAP, norm=norm)
    axes.invert_yaxis()
    for (row, column), value in np.ndenumerate(grid):
        if not (narrow or np.isnan(value)):
            text = _small(value) if logarithmic else f"{100 * value:.0f}"
            center = (column + 0.5, row + 0.52)
            axes.text(*center, text, ha="center", va="center", size=7.5)
    step = 5 if narrow else 1  # labels would overlap
    axes.set_xticks(
        np.arange(0, len(numbers), step) + 0.5, list(map(str, numbers[::step]))
    )
    axes.set_yticks(np.arange(len(kinds)) + 0.5, kinds)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("layer")
    figure.text(0.1 / width, 1 - 0.12 / height, title, size=10.5, va="top")
    return figure


def _place(name: str) -> tuple[int, str] | None:
    """The layer and the kind of a tensor, or None where it has no layer."""
    match = re.search(r"(?:^|[./])(\d+)[./](.+?)(?:[./](?:weight|kernel))?$", name)
    return (int(match[1]), match[2]) if match else None


def _facts(record: Mapping[str, Any]) -> dict[str, str]:
    """The few numbers that count."""
    sizes = record["sizes"]
    asked = record["sparsity"]
    facts = {
        "method": record["method"],
        "its settings": record.get("settings"),
        "pattern": record["pattern"],
        "sparsity asked": f"{asked:.2%}" if isinstance(asked, float) else str(asked),
        "allocation": record.get("allocation"),
        "rounded": _levels(record.get("rounding")),
        "calibrated on": page.calibration(record),
        "achieved": f"{record['achieved']:.4%}",
        "zero": f"{sizes['zeros']:,} of {sizes['size']:,} weights that may be pruned",
        "of the model": f"{sizes['zeros'] / max(sizes['parameters'], 1):.2%} of "
        f"{sizes['parameters']:,} parameters",
        "compact file": page.size(sizes["compact_bytes"]),
        "time": page.duration(record["seconds"]),
        "device": record["device"],
    }
    if peak := record.get("peak_memory_bytes"):
        facts["peak memory"] = page.size(peak)
    return {name: str(fact) for name, fact in facts.items() if fact}


def _levels(rounding: Mapping[str, Any] | None) -> str:
    if not rounding:
        return ""
    return f"to int{rounding['bits']}, a scale for {rounding['group']} inputs"


def _zeros(record: Mapping[str, Any]) -> dict[str, Figure]:
    """How much of each matrix is zero; nothing where no matrix has a layer."""
    tensors = record["tensors"]
    # In the order of pruning, which is that of the layers; files may have another.
    order = [
        row["name"] for row in record.get("weights") or () if row["name"] in tensors
    ]
    shares = {
        name: tensors[name]["zeros"] / max(tensors[name]["size"], 1)
        for name in dict.fromkeys([*order, *tensors])
        if _place(name) is not None
    }
    if not shares:
        return {}
    title = "% of each matrix that is zero"
    return {"zeros": layers(shares, logarithmic=False, title=title)}


def _errors(errors: Mapping[str, float]) -> dict[str, Figure]:
    """What pruning did to each matrix's output; nothing where none has a layer."""
    if not any(_place(name) for name in errors):
        return {}
    title = "Relative squared error of each matrix's output, on the first batch"
    return {"errors": layers(errors, logarithmic=True, title=title)}


def _small(value: float) -> str:
    """An error in a cell: .012, 1.3, 8e-5."""
    if value == 0 or value >= 0.001:
        return f"{value:.2g}".removeprefix("0") or "0"
    return f"{value:.0e}".replace("e-0", "e-")
