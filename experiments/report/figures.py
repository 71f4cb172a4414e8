"""Panels of lines, as matplotlib `Figure` objects.

Each line has a colour, a marker and a dash, and its name where it ends, so that it is
recognised without colour too.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.report.curves import CLOSE
from jaxprune.lm.report.canvas import COLOURS, FAINT, INK, STYLE

SPARSITY = "sparsity: % of the weights removed"
LINEAR = 0.01  # nats
READING = (
    "Validation loss above the same seed's reference. Lines are means over the seeds, "
    f"bands their range. The axis is linear within {LINEAR} nats of the reference and "
    f"logarithmic beyond; the grey strip is ±{CLOSE} nats."
)
_TICKS = np.array([0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100])
_MARKERS, _DASHES = "osD^vPX<>*", ("-", "-", "-", "-", "--", "-.", ":")


class Panel(NamedTuple):
    """One panel of a figure.

    Attributes:
      title: what is drawn.
      lines: name to x, of shape (points,), and y, of shape (seeds, points).
      levels: name to a height that a horizontal line marks.
    """

    title: str
    lines: Mapping[str, tuple[Any, Any]]
    levels: Mapping[str, float] = {}


@STYLE
def draw(
    panels: Sequence[Panel],
    *,
    across: str = SPARSITY,
    scale: Literal["nats", "percent", "linear"] = "linear",
) -> Figure:
    """Panels side by side; a name has the same colour in all of them.

    Args:
      panels: what is drawn; at least one.
      across: what the horizontal axis is.
      scale: vertical axis: "nats" above a reference, one range for all panels;
        "percent", the whole range; or "linear", as the lines need it.

    Returns:
      The figure.
    """
    names = list(dict.fromkeys(name for panel in panels for name in panel.lines))
    labels = [*names, *(name for panel in panels for name in panel.levels)]
    # Inches, with room for the longest name right of each panel.
    left, inner, right = 0.72, 3.1, 0.08 * max(map(len, labels)) + 0.2
    low, high, top = 0.55, 3.2, 0.5
    cell, tall = left + inner + right, low + high + top
    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    width, height = columns * cell, rows * tall
    figure = Figure(figsize=(width, height))
    heights = [y for panel in panels for _, y in panel.lines.values()]
    for index, panel in enumerate(panels):
        row, column = divmod(index, columns)
        box = (column * cell + left, (rows - 1 - row) * tall + low, inner, high)
        axes = figure.add_axes(tuple(np.divide(box, (width, height) * 2)))
        if scale == "nats":
            _scale_nats(axes, [*heights, *([y] for y in panel.levels.values())])
        ends = []
        for name, (x, y) in panel.lines.items():
            slot = names.index(name)
            colour = list(COLOURS)[slot % len(COLOURS)]
            x, y = np.asarray(x), np.ma.asarray(y)
            if len(y) > 1:
                band: dict[str, Any] = {"color": colour, "alpha": 0.16, "lw": 0}
                axes.fill_between(x, y.min(0), y.max(0), **band)
            look: dict[str, Any] = {"marker": _MARKERS[slot % len(_MARKERS)]}
            look |= {"color": colour, "ls": _DASHES[slot % len(_DASHES)]}
            axes.plot(x, y.mean(0), label=name, **look)
            ends.append((name, colour, float(x[-1]), float(y.mean(0)[-1])))
        for name, level in panel.levels.items():
            axes.axhline(level, color=INK, lw=1, zorder=1)
            ends.append((name, INK, axes.get_xlim()[1], level))
        if scale == "percent":
            # An axis that fits the lines would make small differences large.
            axes.set_ylim(0, 100)
        axes.set(xlabel=across, title=panel.title)
        axes.grid()
        axes.set_axisbelow(True)
        axes.set(xlim=axes.get_xlim(), ylim=axes.get_ylim())  # names need them fixed
        _name_ends(axes, ends)
    return figure


def _scale_nats(axes: Axes, heights: Sequence[Any]) -> None:
    """An axis that is linear near zero: losses under the reference occur."""
    low = min(-1.5 * CLOSE, *(1.3 * float(np.min(y)) for y in heights))
    high = max(5 * CLOSE, *(1.3 * float(np.max(y)) for y in heights))
    axes.set_yscale("symlog", linthresh=LINEAR, linscale=0.8)
    axes.set_ylim(low, high)
    axes.axhspan(-CLOSE, CLOSE, color=FAINT, alpha=0.15, lw=0)
    ticks = [tick for tick in (*-_TICKS, 0, *_TICKS) if low <= tick <= high]
    axes.set_yticks(ticks, [f"{tick:+g}" if tick else "0" for tick in ticks])
    axes.set_yticks([], minor=True)


def _name_ends(axes: Axes, ends: Sequence[tuple[str, str, float, float]]) -> None:
    """Writes each line's name right of its end, moved apart so that none overlap."""
    ends = sorted(ends, key=lambda end: end[3])
    # In shares of the panel's height, where names are equally high on any axis.
    display = axes.transData.transform([end[2:] for end in ends])
    heights = axes.transAxes.inverted().transform(display)[:, 1]  # (lines,), 0 to 1
    figure: Any = axes.figure
    gap = 12.5 / (axes.get_window_extent().height / figure.dpi * 72)
    arrow: dict[str, Any] = {"arrowstyle": "-", "lw": 0.6, "shrinkA": 0}
    for (name, colour, x, y), height in zip(ends, apart(heights, gap), strict=True):
        axes.annotate(
            name,
            (x, y),
            (1.06, height),
            textcoords="axes fraction",
            color=colour,
            va="center",
            annotation_clip=False,
            arrowprops={**arrow, "color": colour, "relpos": (0, 0.5)},
        )


def apart(heights: np.ndarray, gap: float) -> np.ndarray:
    """Moves ascending heights in [0, 1] apart by at least `gap`, as little as need be.

    From the top down when there are too many.
    """
    offsets = gap * np.arange(len(heights))
    # Less the gaps, heights need only ascend: an isotonic regression, which the mean
    # of the two running extremes solves in the maximum norm.
    slack = heights - offsets
    up, down = np.maximum.accumulate(slack), np.minimum.accumulate(slack[::-1])[::-1]
    return np.clip((up + down) / 2, 0, 1 - offsets[-1]) + offsets
