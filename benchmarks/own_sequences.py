"""Sequences that a model writes itself beside a text, as the command writes them.

    python -m benchmarks.own_sequences gemma texts/calibration-mixed50-128.npy own.npy

Each begins with a token of the text. Several jobs then calibrate and train on the same.
"""

import dataclasses
from pathlib import Path

import numpy as np
import tyro

from benchmarks.commands import own_sequences, save_rows
from jaxprune.arrays.console_progress import Progress


@dataclasses.dataclass(frozen=True)
class Config:
    """Writes the sequences.

    Attributes:
      model: a Hugging Face directory.
      text: the text, .npy of int32 token ids (sequences, length).
      out: .npy that is written, int32 (sequences, length).
      sequences: number of sequences.
    """

    model: tyro.conf.Positional[Path]
    text: tyro.conf.Positional[Path]
    out: tyro.conf.Positional[Path]
    sequences: int = 128


def main(config: Config) -> None:
    """Loads the model, in float32, and writes."""
    number = config.sequences
    with Progress(number, "writing", unit="sequence") as progress:
        rows = own_sequences(
            *(config.model, np.load(config.text), number),
            dtype="float32",
            batch=16,
            progress=progress.update,
        )
    save_rows(config.out, rows)


if __name__ == "__main__":
    main(tyro.cli(Config))
