"""Lines and panels of the experiments' figures, and a figure as PNG.

Each criterion has one colour, marker and dash everywhere, recognisable without colour
too.
"""

import io
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxprune.lm.report.canvas import COLOURS, STYLE

# In the order of COLOURS.
_KNOWN = (
    "preconditioned_magnitude",
    "averaged_weight",
    "magnitude",
    "obd",
    "averaged_magnitude",
    "taylor",
    "random",
)
_MARKERS = "osD^vPX<>*"
_DASHES = ("-", "-", "-", "-", "--", "-.", ":", "--", "-.", "-")


class Line(NamedTuple):
    """How one criterion (or run) is drawn: colour, marker and dash."""

    colour: str
    marker: str
    dash: str


def styles(names: Sequence[str]) -> dict[str, Line]:
    """One style for each name: the criteria of jaxprune always have the same.

    Beyond ten names, colours come again with other markers.
    """
    known_slots = {name: _KNOWN.index(name) for name in names if name in _KNOWN}
    free_slots = (
        slot for slot in itertools.count() if slot not in known_slots.values()
    )
    slots = {
        name: known_slots[name] if name in known_slots else next(free_slots)
        for name in names
    }
    colours = tuple(COLOURS)
    return {
        name: Line(
            colours[slot % len(colours)],
            _MARKERS[(slot + slot // len(colours)) % len(_MARKERS)],
            _DASHES[slot % len(_DASHES)],
        )
        for name, slot in slots.items()
    }


def panels(count: int, labels: Sequence[str]) -> tuple[Figure, list[Axes]]:
    """Panels of one size, with room for the longest label to the right of each."""
    # Four panels as two by two: three and one would leave two places empty.
    columns = min(count, 3) if count != 4 else 2
    rows = -(-count // columns)
    left_margin, inner, right_margin = 0.72, 3.1, 0.08 * max(map(len, labels)) + 0.2
    low, high, top = 0.55, 3.2, 0.5  # inches
    cell, tall = left_margin + inner + right_margin, low + high + top
    width, height = columns * cell, rows * tall
    figure = Figure(figsize=(width, height))
    boxes = [
        (
            (index % columns * cell + left_margin) / width,
            ((rows - 1 - index // columns) * tall + low) / height,
            inner / width,
            high / height,
        )
        for index in range(count)
    ]
    return figure, [figure.add_axes(box) for box in boxes]


def beside(axes: Axes, text: str, point: tuple[float, float], colour: str) -> None:
    """Writes a text just right of a point."""
    axes.annotate(
        text,
        point,
        (8, 0),
        textcoords="offset points",
        color=colour,
        va="center",
        annotation_clip=False,
    )


def name_ends(axes: Axes, ends: Sequence[tuple[str, str, float, float]]) -> None:
    """Writes each line's name right of its end, moved apart so that none overlap.

    `ends`: name, colour and last point, in data coordinates, of each line.
    """
    ends = sorted(ends, key=lambda end: end[3])
    # To the panel's own height, in which distances of names are the same on any axis.
    display = axes.transData.transform([end[2:] for end in ends])
    heights = axes.transAxes.inverted().transform(display)[:, 1]  # (lines,), 0 to 1
    points = axes.get_window_extent().height / axes.figure.dpi * 72
    for (name, colour, x, y), height in zip(
        ends, apart(heights, 12.5 / points), strict=True
    ):
        axes.annotate(
            name,
            (x, y),
            (1.06, height),
            textcoords="axes fraction",
            color=colour,
            va="center",
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "lw": 0.6,
                "shrinkA": 0,
                "relpos": (0, 0.5),
            },
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


@STYLE
def png(figure: Figure) -> bytes:
    """The figure as a PNG of 200 dots an inch on white."""
    stream = io.BytesIO()
    # No version of matplotlib in the file: the same figure is the same bytes.
    metadata = {"Software": None}
    figure.savefig(stream, format="png", dpi=200, facecolor="white", metadata=metadata)
    return stream.getvalue()
