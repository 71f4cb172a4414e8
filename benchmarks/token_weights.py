"""Tokens of one size, corrections, allocations: do they make pruned models better?

    python -m benchmarks.token_weights gemma texts tokens

Each cell prunes a real model by one solver, with or without `relative` and a
`correction`, by an allocation, calibrated on one of several draws of the same text, in
a process of its own; what is there is not run again.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from pathlib import Path

import tyro

from benchmarks.draws import Draws, of_files, pruning, run_missing


@dataclasses.dataclass(frozen=True)
class Config(Draws):
    """Runs the cells that are missing, and prints the table.

    Attributes:
      methods: the solvers; torch-sparsegpt is the competitor's, which has no options.
      patterns: sparsities, and n:m patterns.
      relative: whether tokens are scaled to one size; both if left out.
      corrections: how much of what earlier layers lost a matrix makes up for.
      allocations: layer, erk, owl or gradients, as of `benchmarks.jax_pruning`.
      passes: numbers of passes of a refinement after it; 0 for none.
      distilled: steps of a distillation after that; 0 for none.
      distill_learning_rate: learning rate of its first step.
    """

    methods: tuple[str, ...] = ("sparsegpt", "alps")
    patterns: tuple[str, ...] = ("0.5", "0.6", "2:4")
    relative: tuple[bool, ...] = (False, True)
    corrections: tuple[float, ...] = (0.0,)
    allocations: tuple[str, ...] = ("layer",)
    passes: tuple[int, ...] = (0,)
    distilled: tuple[int, ...] = (0,)
    distill_learning_rate: float = 3e-5


def main(config: Config) -> None:
    """Runs what is missing and prints the table."""
    run_missing(config, functools.partial(_cells, config))
    print(of_files(config.out, ["removed", "method", "tokens"]))


def _cells(config: Config, folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Name and arguments of each process, in an order that serves a first look."""
    ways = itertools.product(
        config.relative,
        config.corrections,
        config.allocations,
        config.passes,
        config.distilled,
        [config.distill_learning_rate],
    )
    for draw, pattern, method, way in itertools.product(
        config.draws, config.patterns, config.methods, [*ways]
    ):
        # The competitor has none of these options: one cell of it for all of ours.
        words, options = ("plain", []) if "torch" in method else _way(*way)
        name = f"{pattern.replace(':', 'of')}_{method}_{words}_{draw}"
        yield name, pruning(config, folder / f"{draw}.npy", pattern, method, *options)


def _way(
    relative: bool,
    correction: float,
    allocation: str,
    passes: int,
    distilled: int,
    rate: float,
) -> tuple[str, list[str]]:
    """A word for all that is not the method's default, and the options for it."""
    options = ["--relative"] * relative
    options += ["--correction", f"{correction:g}", "--allocation", allocation]
    options += ["--refine", str(passes)]
    if distilled:
        options += ["--distill", str(distilled)]
        options += ["--distill-learning-rate", f"{rate:g}"]
    words = ["relative" if relative else "plain"]
    words += [f"{correction:g}"] if correction else []
    words += [allocation] if allocation != "layer" else []
    # In the file's name: cells of other options lie side by side.
    words += [f"refine{passes}"] if passes else []
    words += [f"distill{distilled}at{rate:g}"] if distilled else []
    return "+".join(words), options


if __name__ == "__main__":
    main(tyro.cli(Config))
