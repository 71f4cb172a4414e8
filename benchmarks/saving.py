"""Saving ten megabytes takes a tenth of a second, most of it not the writing.

`python -m benchmarks.saving` saves parameters of many leaves again and again, each time
as the next step of one folder, and beside it writes the same bytes into one file.
"""

import dataclasses
import itertools
import os
import tempfile
from pathlib import Path

import jax.numpy as jnp
import tyro

from benchmarks import measure
from experiments.harness import checkpoint


@dataclasses.dataclass(frozen=True)
class Config:
    """Measures the time of saving.

    Attributes:
      size: weights in all, float32.
      leaves: how many leaves they lie in.
      repeats: timings of each candidate.
    """

    size: int = 2_500_000
    leaves: int = 60
    repeats: int = 9


def main(config: Config) -> None:
    """Prints one JSON line, in seconds."""
    length = config.size // config.leaves
    state = {str(i): jnp.full((length,), float(i)) for i in range(config.leaves)}
    # Each save is of the next step: the older ones are removed, as in a run.
    steps = itertools.count()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)

        def save() -> None:
            checkpoint.save(place / "saved", state, step=next(steps), configuration={})

        def write() -> None:
            with open(place / "bytes", "wb") as file:
                for leaf in state.values():
                    file.write(memoryview(leaf))
                # A checkpoint is on disk when `save` returns, so this must be too.
                os.fsync(file.fileno())

        candidates = {"save": save, "write": write}
        times = measure.interleaved(candidates, config.repeats)
    results = {
        name: measure.median_and_spread(seconds) for name, seconds in times.items()
    }
    measure.report("saving", config=dataclasses.asdict(config), **results)


if __name__ == "__main__":
    main(tyro.cli(Config))
