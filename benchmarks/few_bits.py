"""Pruning and rounding in one sweep: how many bits a weight, at which perplexity.

    python -m benchmarks.few_bits gemma texts bits

Each cell prunes a real model by one solver and puts the kept weights on the levels of
int8 or int4, or leaves them; calibrated on one of several draws of the same text, in a
process of its own; what is there is not run again.
"""

import dataclasses
import functools
import itertools
import json
import statistics
from collections.abc import Iterator
from pathlib import Path

import tyro

from benchmarks.draws import Draws, over_draws, pruning, run_missing
from benchmarks.real_model import cells_in


@dataclasses.dataclass(frozen=True)
class Config(Draws):
    """Runs the cells that are missing, and prints the table.

    Attributes:
      methods: the solvers.
      patterns: sparsities, and n:m patterns.
      bits: bits of a kept weight; 16 leaves it as it is.
      group: inputs that share a scale.
    """

    methods: tuple[str, ...] = ("sparsegpt",)
    patterns: tuple[str, ...] = ("0.0", "0.5", "2:4")
    bits: tuple[int, ...] = (16, 8, 4)
    group: int = 128


def main(config: Config) -> None:
    """Runs what is missing and prints the table."""
    run_missing(config, functools.partial(_cells, config))
    print(bits_table(config.out))


def _cells(config: Config, folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Name and arguments of each process, in an order that serves a first look."""
    for draw, pattern, method, bits in itertools.product(
        config.draws, config.patterns, config.methods, config.bits
    ):
        # 16: the weights stay as the solver leaves them.
        flags = ["--bits", str(bits), "--group", str(config.group)] * (bits < 16)
        rounded = f"{bits} in {config.group}s" if bits < 16 else "16"
        name = f"{pattern.replace(':', 'of')}_{method}_{rounded}_{draw}"
        text = folder / f"{draw}.npy"
        yield name, pruning(config, text, pattern, method, "--relative", *flags)


def bits_table(folder: Path) -> str:
    """The results as Markdown: a row for each solver, sparsity and number of bits."""
    cells: dict[tuple[str, ...], list[dict[str, float]]] = {}
    stored: dict[tuple[str, ...], list[float]] = {}
    for path in cells_in(folder):
        pattern, method, rounded, _ = path.stem.split("_")
        result = json.loads(path.read_text())
        key = (pattern.replace("of", ":"), method, rounded)
        cells.setdefault(key, []).append(result["perplexities"]["after"])
        stored.setdefault(key, []).append(_stored(result["zeros"], rounded))
    rows = [
        ((*key, f"{statistics.fmean(stored[key]):.2f}"), perplexities)
        for key, perplexities in sorted(cells.items())
    ]
    return over_draws(["removed", "method", "bits", "stored, bits a weight"], rows)


def _stored(zeros: float, rounded: str) -> float:
    """Bits of a weight in a compact file: its mask's, its level's, of its scale."""
    bits, _, group = rounded.partition(" in ")
    if not group:
        # A bit of mask and 16 of each kept weight, or all of them without a mask.
        return min(16.0, 1 + 16 * (1 - zeros))
    # The mask, the kept weights' levels, and a scale of two bytes for each group.
    return 1 + int(bits) * (1 - zeros) + 16 / int(group.rstrip("s"))


if __name__ == "__main__":
    main(tyro.cli(Config))
