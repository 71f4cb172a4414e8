"""Calibrated on what the model writes itself, beside texts, and on half of each.

    python -m benchmarks.own_text gemma texts own_gemma

What a model writes is kept in the directory of the results, a folder a draw. Each cell
prunes by one solver, tokens of one size, in a process of its own; what is there is not
run again.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tyro

from benchmarks.draws import Draws, of_files, pruning, run_missing
from jaxprune.arrays.console_progress import Progress
from jaxprune.lm.models import hf
from jaxprune.lm.texts.self_calibration import self_calibration

CALIBRATIONS = ("text", "self", "both")


@dataclasses.dataclass(frozen=True)
class Config(Draws):
    """Runs the cells that are missing, and prints the table.

    Attributes:
      methods: the solvers.
      patterns: sparsities, and n:m patterns.
      calibrations: what is calibrated on: text, self, or both, half of each.
      correction: how much of what earlier layers lost a matrix makes up for.
      refine: passes of a refinement after the solver; 0 for none.
      temperature: temperature of what the model writes.
    """

    methods: tuple[str, ...] = ("sparsegpt",)
    patterns: tuple[str, ...] = ("0.5",)
    calibrations: tuple[str, ...] = CALIBRATIONS
    correction: float = 0.5
    refine: int = 0
    temperature: float = 1.0


def main(config: Config) -> None:
    """Runs what is missing and prints the table.

    Raises:
      ValueError: what is calibrated on is none of `CALIBRATIONS`, or a method has no
        correction.
    """
    if unknown := [c for c in config.calibrations if c not in CALIBRATIONS]:
        raise ValueError(
            f"calibrations must be of {', '.join(CALIBRATIONS)}, got "
            f"{', '.join(unknown)}"
        )
    for method in config.methods:
        if config.correction and method not in ("sparsegpt", "alps"):
            raise ValueError(f"{method} has no correction; give --correction 0")
    facts = {"correction": config.correction, "temperature": config.temperature}
    run_missing(config, functools.partial(_cells, config), **facts)
    print(of_files(config.out, ["removed", "method", "calibrated on"]))


def _cells(config: Config, folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Name and arguments of each process."""
    options = ["--relative", "--correction", f"{config.correction:g}"]
    options += ["--refine", str(config.refine)]
    refined = f"+refine{config.refine}" * bool(config.refine)
    for draw, calibration in itertools.product(config.draws, config.calibrations):
        sequences = folder / f"{draw}.npy"  # of the text
        if calibration != "text":
            text, generated = np.load(sequences), _written(config, draw)
            half = len(generated) // 2 if calibration == "both" else 0
            sequences = folder / f"{draw}-{calibration}.npy"
            # (calibrated, length): as many sequences whatever they are made of.
            np.save(sequences, np.concatenate([text[:half], generated[half:]]))
        for pattern, method in itertools.product(config.patterns, config.methods):
            words = calibration + refined
            name = f"{pattern.replace(':', 'of')}_{method}_{words}_{draw}"
            yield name, pruning(config, sequences, pattern, method, *options)


def _written(config: Config, draw: int) -> np.ndarray:
    """What the dense model writes, as many sequences as long as those of the texts."""
    loaded, tokenizer = hf.load(config.model), hf.load_tokenizer(config.model)
    length = np.load(config.texts / f"{config.calibration}.npy").shape[1]
    # Rows of the embedding that no token has: their logits are never trained.
    padding = range(tokenizer.vocab_size, loaded.config.vocab_size)
    with Progress(config.calibrated, "writing", unit="sequence") as progress:
        return self_calibration(
            loaded.model,
            sequences=config.calibrated,
            length=length,
            seed=draw,
            temperature=config.temperature,
            bos=tokenizer.bos if tokenizer.begins else None,
            never_first={*tokenizer.special, *padding},
            batch=min(config.calibrated, 32),
            # Kept: writing takes longer than pruning, and every cell of a draw needs
            # it.
            directory=config.out / f"written-{draw}",
            progress=progress.update,
        )


if __name__ == "__main__":
    main(tyro.cli(Config))
