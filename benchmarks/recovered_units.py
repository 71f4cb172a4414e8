"""Which way to remove neurons lasts through a recovery, and what does it take?

`python -m benchmarks.recovered_units MODEL WORK` removes as many neurons of each layer
of a Llama by each of `METHODS`, then trains each smaller model by one recovery, after
the dense model, for several numbers of steps. All are calibrated on the same token
files, of texts and of what the dense model writes itself. What is in WORK is not run
again. It needs torch and the packages of `benchmarks.texts`.
"""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import tyro

from benchmarks import commands, measure
from benchmarks.commands import Calibration
from jaxprune.arrays.messages import columns
from jaxprune.lm.checkpoints.checkpoint_dir import CONFIG

METHODS = ("ours", "ours, in rounds", "wanda-sp", "flap", "from-scratch")


@dataclasses.dataclass(frozen=True)
class Config:
    """Makes, recovers and measures the smaller models; prints a table.

    Attributes:
      model: a Hugging Face directory of a Llama, the dense model.
      work: the folder of texts, models and records.
      methods: names of `METHODS`.
      ffn: the share of the neurons that goes.
      steps: numbers of steps of a recovery.
      sequences: sequences of texts that are calibrated on, and half as many of what the
        dense model writes.
      batch: sequences of a step.
      learning_rate: highest learning rate of what was there before.
      scratch_rate: that of what is trained from scratch, all parameters of it.
      limit: windows of each text that are evaluated.
    """

    model: Annotated[Path, tyro.conf.Positional]
    work: Annotated[Path, tyro.conf.Positional]
    methods: tuple[str, ...] = METHODS
    ffn: float = 0.25
    steps: tuple[int, ...] = (32, 256)
    sequences: int = 64
    batch: int = 2
    learning_rate: float = 2e-4
    scratch_rate: float = 1e-3
    limit: int = 8


def main(config: Config) -> None:
    """Runs what is missing, prints the table, then one JSON line."""
    rates = ("learning_rate", "scratch_rate")
    measure.begin(config.work, config, "ffn", "sequences", "batch", *rates, "limit")
    files = commands.write_calibration(config.model, config.work, config.sequences)
    for method in config.methods:
        for steps in config.steps:
            _recovered(config, files, method, steps)
    rows = list(_rows(config))
    print(columns([list(rows[0]), *([*row.values()] for row in rows)], right=True))
    measure.report("recovered_units", model=config.model.name, rows=rows)


def _small(config: Config, files: Calibration, method: str) -> Path:
    """The directory of a smaller model, right after the removal."""
    out = config.work / method
    if (out / CONFIG).is_file():
        return out
    if method == "ours":
        _shrink(config, files, config.model, out, config.ffn)
        return out
    # A process of its own: torch's threads would stay beside those of XLA.
    commands.run_module(
        *("benchmarks.torch_shrinking", config.model, "--method", method),
        *("--ffn", config.ffn, "--calibration", files.tokens, "--out", out),
        *("--sequences", files.sequences, "--threads", 1),
    )
    return out


def _shrink(
    config: Config, files: Calibration, model: Path, out: Path, share: float
) -> None:
    commands.run_module(
        *("jaxprune", "shrink", model, out, "--ffn", share, "--dtype", "bfloat16"),
        *("--calibration", files.tokens, "--sequences", files.sequences),
        *("--length", commands.LENGTH, "--speed-rounds", 0, "--overwrite"),
        *commands.evaluation(config.work, config.limit),
    )


def _recovered(config: Config, files: Calibration, method: str, steps: int) -> Path:
    """The directory of a smaller model after so many steps."""
    out = config.work / f"{method}, {steps}"
    if commands.is_done(out):
        return out
    if method == "ours, in rounds":
        # Half of what goes, half of the steps, and both again.
        first, half, narrow = (out.with_name(f"{out.name}, {i}") for i in range(3))
        count = json.loads((config.model / CONFIG).read_text())["intermediate_size"]
        gone = round(config.ffn * count)
        if not commands.is_done(half):
            _shrink(config, files, config.model, first, gone // 2 / count)
            _recover(config, files, first, half, steps // 2)
        left = count - gone // 2
        _shrink(config, files, half, narrow, (gone - gone // 2) / left)
        _recover(config, files, narrow, out, steps - steps // 2)
    else:
        small = _small(config, files, method)
        _recover(config, files, small, out, steps, scratch=method == "from-scratch")
    return out


def _recover(
    config: Config,
    files: Calibration,
    model: Path,
    out: Path,
    steps: int,
    *,
    scratch: bool = False,
) -> None:
    rate = config.scratch_rate if scratch else config.learning_rate
    commands.recover(
        *(model, out, config.model, files, "--recover-steps", steps),
        *("--recover-train", "all" if scratch else "matrices"),
        *("--recover-learning-rate", rate, "--batch", config.batch),
        *commands.evaluation(config.work, config.limit),
    )


def _rows(config: Config) -> Iterator[dict[str, Any]]:
    """A row for each method and number of steps, none of them first."""
    seconds = commands.work_seconds
    for method in config.methods:
        for index, steps in enumerate(config.steps):
            out = config.work / f"{method}, {steps}"
            # In rounds there is no model right after all of the removal.
            if not index and method != "ours, in rounds":
                yield _row(method, 0, out, "dense", seconds(config.work / method))
            paths = [config.work / method, out, *config.work.glob(f"{out.name}, ?")]
            yield _row(method, steps, out, "distilled", sum(map(seconds, paths)))


def _row(
    method: str, steps: int, out: Path, stage: str, seconds: float
) -> dict[str, Any]:
    measured = commands.perplexity_columns(out, stage)
    minutes = f"{seconds / 60:.0f}"
    return {"method": method, "steps": str(steps), **measured, "minutes": minutes}


if __name__ == "__main__":
    main(tyro.cli(Config))
