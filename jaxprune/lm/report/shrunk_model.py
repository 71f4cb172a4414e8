"""The page of a model that became smaller, made from its jaxprune.json alone.

What was not measured has no section.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure

from jaxprune.lm.report import canvas, page
from jaxprune.lm.report.stages import measured

_KINDS = {"ffn": "neurons", "heads": "heads", "query heads": "query heads"}
_MOST = 64  # columns of a figure
_MAP = LinearSegmentedColormap.from_list(
    "kept", [(*to_rgb(canvas.KEPT), 0.0), (*to_rgb(canvas.KEPT), 0.85)]
)


def document(record: Mapping[str, Any]) -> str:
    """The whole of report.html.

    Args:
      record: what jaxprune.json holds: "method", "sizes", "layers", "achieved", and
        where there are any "perplexity", "search", "units", "speed", "distillation",
        "phases".

    Returns:
      One HTML page that loads nothing.
    """
    return page.render(
        "shrunk_model.html",
        title="A smaller model",
        record=record,
        headline=headline(record),
        facts=_facts(record),
        stages=measured(record),
        sizes=_sizes(record["sizes"]),
        left_out=_left_out(record["layers"]),
        kept=_kept(record),
    )


def headline(record: Mapping[str, Any]) -> str:
    """What happened, in a sentence of plain text."""
    parts = [f"{record['achieved']:.1%} of the parameters were removed"]
    if asked := _asked(record):  # half of the neurons is not half of the parameters
        parts[0] += f" ({asked})"
    if change := page.perplexity_change(record):
        parts.append(change)
    first, *rest = parts
    return f"{first}: {', '.join(rest)}." if rest else f"{first}."


def _facts(record: Mapping[str, Any]) -> dict[str, str]:
    """The few numbers that count."""
    before, after = (record["sizes"][when] for when in ("before", "after"))
    facts = {
        "method": record["method"],
        "vocabulary": _vocabulary(record.get("vocabulary")),
        "asked": _asked(record),
        "calibrated on": page.calibration(record),
        "parameters": f"{after['parameters']:,} of {before['parameters']:,}",
        "weights": page.size(after["bytes"]),
        "time": page.duration(record["seconds"]),
        "device": record["device"],
    }
    return {name: fact for name, fact in facts.items() if fact}


def _asked(record: Mapping[str, Any]) -> str:
    """The options that said what goes, as the command has them."""
    return ", ".join(f"{k} {_said(v)}" for k, v in record["sparsity"].items())


def _vocabulary(facts: Mapping[str, Any] | None) -> str:
    """Which tokens stayed, in a line; empty where all did."""
    if not facts:
        return ""
    return (
        f"{facts['after']:,} of {facts['before']:,} tokens, "
        f"{facts['covered']:.2%} of the calibration's"
    )


def _said(value: Any) -> str:
    if isinstance(value, str | bool):
        return "yes" if value is True else str(value)
    return " ".join(map(str, value)) if isinstance(value, Sequence) else f"{value:g}"


def _sizes(sizes: Mapping[str, Any]) -> list[list[str]]:
    rows = []
    names = {
        "parameters": "parameters",
        "bytes": "bytes of weights",
        "tokens": "tokens of the vocabulary",
        "width": "channels of the residual stream",
        "layers": "layers",
        "heads": "query heads a layer",
        "kv_heads": "key heads a layer",
        "mlp_width": "neurons a layer",
        "experts": "experts a layer",
    }
    # Of a model that went through torch the entries of its config.json.
    names |= {key: key for key in sizes["before"] if key not in names}
    for key, name in names.items():
        before, after = (sizes[when].get(key) for when in ("before", "after"))
        if not before:  # no experts
            continue
        rows.append([name, f"{before:,}", f"{after:,}", f"{after / before:.1%}"])
    return rows


def _left_out(layers: Mapping[str, Any]) -> list[list[str]]:
    """The layers that a search left out, and what it found of each."""
    pairs = zip(layers.get("dropped", []), layers.get("nats", []), strict=True)
    return [[str(layer), f"{nats:.4f}"] for layer, nats in pairs]


def _kept(record: Mapping[str, Any]) -> dict[str, Figure]:
    """A figure for each kind of unit of which some went."""
    units = record.get("units")
    if not units:
        return {}
    # Groups are named by the layers that stayed; the figure has all layers.
    layers: dict[str, dict[int, Sequence[int]]] = {}
    whole: dict[str, dict[int, int]] = {}
    stayed = record["layers"]["kept"]
    nothing: dict[int, Sequence[int]] = {layer: () for layer in stayed}
    for name, kept in units["kept"].items():
        match = re.match(r"layers/(\d+)/", name)
        role = units["roles"].get(name)
        if match is None or role is None:
            continue
        layer = stayed[int(match[1])]
        layers.setdefault(role, dict(nothing))[layer] = kept
        before = units["groups"][name]["before"]
        whole.setdefault(role, dict.fromkeys(stayed, 0))[layer] = before
    count = record["sizes"]["before"]["layers"]
    return {
        role.replace(" ", "-"): kept_units(rows, whole[role], count, _KINDS[role])
        for role, rows in layers.items()
    }


@canvas.STYLE
def kept_units(
    kept: Mapping[int, Sequence[int]],
    units: Mapping[int, int],
    layers: int,
    title: str,
) -> Figure:
    """Rows are layers, columns places of units; the darker, the more are kept.

    Args:
      kept: layer to its kept units; layers that are absent were removed.
      units: layer to how many it had.
      layers: how many there were.
      title: what the units are.

    Returns:
      The figure.
    """
    most = max(units.values())
    places = min(most, _MOST)  # a column may stand for several units
    edges = np.linspace(0, most, places + 1).round().astype(int)
    grid = np.full((layers, places), np.nan)  # a removed layer stays white
    for layer, kept_here in kept.items():
        is_kept = np.zeros(most)  # (most,)
        is_kept[list(kept_here)] = 1
        is_kept[units[layer] :] = np.nan  # which it never had
        # The share that is kept of the units of each column.
        grid[layer] = np.add.reduceat(is_kept, edges[:-1]) / np.diff(edges)
    height = 0.17 * layers if layers > 16 else 0.26 * layers
    figure = Figure(figsize=(5.4, height + 1.0))
    axes = figure.add_axes((0.1, 0.5 / (height + 1), 0.86, height / (height + 1)))
    axes.pcolormesh(edges, np.arange(layers + 1), grid, cmap=_MAP, vmin=0, vmax=1)
    for layer in sorted({*range(layers)} - {*kept}):
        axes.axhspan(layer, layer + 1, color=canvas.REMOVED, alpha=0.5, linewidth=0)
    axes.invert_yaxis()
    step = 5 if layers > 16 else 1
    axes.set_yticks(
        np.arange(0, layers, step) + 0.5, list(map(str, range(0, layers, step)))
    )
    axes.locator_params(axis="x", integer=True)
    axes.tick_params(length=0)
    axes.set_ylabel("layer")
    axes.set_xlabel("unit")
    most_of = "" if len({*units.values()}) == 1 else "at most "
    axes.set_title(f"{title} that are kept, of {most_of}{most} in each layer")
    return figure
