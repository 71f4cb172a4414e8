"""What quality costs in seconds: a figure of the cells of several tables.

    python -m benchmarks.quality_and_seconds tokens own_gemma --pattern 0.6

Each point is a method with its options: the seconds of the pruning, and the geometric
mean of the perplexities, both as means over the draws. Compare points of one machine.
"""

import dataclasses
import itertools
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import tyro
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from benchmarks.draws import with_mean
from benchmarks.real_model import cells_in
from experiments.report import plots
from jaxprune.files import atomic
from jaxprune.lm.report.canvas import COLOURS, FAINT, STYLE, svg

METHODS = {
    "wanda": "Wanda",
    "sparsegpt": "SparseGPT",
    "torch-sparsegpt": "SparseGPT, torch",
    "alps": "ALPS",
}
CALIBRATIONS = {"self": "own text", "both": "half own text"}


@dataclasses.dataclass(frozen=True)
class Config:
    """Draws the figure.

    Attributes:
      directories: directories of `benchmarks.token_weights` and `benchmarks.own_text`.
      pattern: the sparsity or the n:m pattern whose cells are drawn.
      out: the SVG.
    """

    directories: Annotated[tuple[Path, ...], tyro.conf.Positional]
    pattern: str = "0.6"
    out: Path = Path("quality_and_seconds.svg")


class Point(NamedTuple):
    """A method with its options.

    Attributes:
      method: name in print.
      options: options in words, empty for none.
      seconds: seconds of the pruning.
      perplexity: the geometric mean over texts and draws.
      draws: how many.
    """

    method: str
    options: str
    seconds: float
    perplexity: float
    draws: int


def main(config: Config) -> None:
    """Writes the figure and prints its points.

    Raises:
      ValueError: there is no such cell.
    """
    drawn = points(config.directories, config.pattern)
    if not drawn:
        raise ValueError(
            f"no directory has a cell of {config.pattern}; run "
            "benchmarks.token_weights or benchmarks.own_text first"
        )
    for point in drawn:
        print(json.dumps(point._asdict()))
    text = svg(figure(drawn), ground="white")
    atomic.replace(config.out, text.encode())


def points(directories: Sequence[Path], pattern: str) -> list[Point]:
    """The points of all cells PATTERN_METHOD_OPTIONS_DRAW.json, by seconds.

    Args:
      directories: directories of tables.
      pattern: a sparsity or a pattern n:m.

    Returns:
      A point for each method with its options.
    """
    cells: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for path in itertools.chain.from_iterable(map(cells_in, directories)):
        cell_pattern, method, _, _ = path.stem.split("_")
        if cell_pattern == pattern.replace(":", "of"):
            cell = json.loads(path.read_text())
            mean = with_mean(cell["perplexities"]["after"])["mean"]
            key = METHODS.get(method, method), _options(cell["config"])
            spent = cell["seconds"]["prune"]  # with tracing and compilation
            if _is_distilled(cell["config"]):
                spent += cell["seconds"]["distill"]
            cells.setdefault(key, []).append((spent, mean))
    all_points = [
        Point(
            *key,
            statistics.fmean(seconds for seconds, _ in draws),
            math.exp(statistics.fmean(math.log(mean) for _, mean in draws)),
            len(draws),
        )
        for key, draws in cells.items()
    ]
    return sorted(all_points, key=lambda point: point.seconds)


@STYLE
def figure(drawn_points: Sequence[Point]) -> Figure:
    """Perplexity against seconds, a colour for each method."""
    colours = dict(
        zip(dict.fromkeys(p.method for p in drawn_points), COLOURS, strict=False)
    )
    canvas = Figure(figsize=(9.6, 4.8))
    axes = canvas.add_axes((0.07, 0.11, 0.47, 0.86))
    for point in drawn_points:
        axes.plot(point.seconds, point.perplexity, "o", color=colours[point.method])
    # Methods differ by factors in both.
    axes.set(xscale="log", yscale="log")
    for axis, ticks in ((axes.xaxis, (1, 2, 5)), (axes.yaxis, (1, 2, 3, 4, 5, 6, 8))):
        axis.set_major_locator(LogLocator(subs=ticks))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_locator(NullLocator())
    axes.set_xlabel("seconds of pruning")
    axes.set_ylabel("perplexity, geometric mean of three texts")
    axes.grid(color=FAINT)
    ends = [
        (
            ": ".join(filter(None, point[:2])),
            colours[point.method],
            point.seconds,
            point.perplexity,
        )
        for point in drawn_points
    ]
    plots.name_ends(axes, ends)
    return canvas


def _is_distilled(options: Mapping[str, str]) -> bool:
    """Whether the pruned model was distilled afterwards."""
    return options.get("distill", "0") not in ("0", "None", "")


def _options(options: Mapping[str, str]) -> str:
    """What a cell was asked for besides its method, in words."""
    numbers = {name: float(options.get(name) or 0) for name in ("correction", "refine")}
    words = [
        "one size" * (options.get("relative") == "True"),
        options.get("allocation", "layer").replace("uniform", "").replace("layer", ""),
        f"correction {numbers['correction']:g}" * bool(numbers["correction"]),
        # A draw's own text is in a file of its own, DRAW-both.npy say.
        CALIBRATIONS.get(Path(options["calibration"]).stem.partition("-")[2], ""),
        f"refined {numbers['refine']:g}" * bool(numbers["refine"]),
        f"distilled {options.get('distill')}" * _is_distilled(options),
    ]
    return ", ".join(filter(None, words))


if __name__ == "__main__":
    main(tyro.cli(Config))
