"""What does each `--effort` of `jaxprune prune` give for its seconds?

`python -m benchmarks.effort_levels MODEL WORK` prunes a real model by each level, to
each sparsity and to two of four weights, calibrated on plays, technical prose and, for
the best level, on what the model writes; then it trains what the best level leaves
after the dense model. It prints the perplexity of other plays, other prose and news,
minutes, and the highest memory. What is in WORK is not run again. It needs the packages
of `benchmarks.texts`.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import tyro

from benchmarks import commands, measure
from benchmarks.commands import Calibration
from jaxprune.arrays.messages import columns
from jaxprune.lm.jobs.settings import Dtype
from jaxprune.posttraining.passes.efforts import LEVELS, Effort

_PATTERNS = ("0.5", "0.6", "0.7", "0.8", "2:4")


@dataclasses.dataclass(frozen=True)
class Config:
    """Prunes, recovers and measures; prints a table.

    Attributes:
      model: a Hugging Face directory, the dense model.
      work: the folder of texts, models and records.
      levels: levels of effort.
      patterns: shares of the weights that go, and patterns such as 2:4.
      sequences: sequences of 512 tokens that are calibrated on, in equal shares.
      steps: steps of the recovery after the best level; 0 for none.
      batch: sequences of a step.
      learning_rate: highest learning rate of the recovery.
      limit: windows of each text that are evaluated.
      dtype: dtype of parameters and products; a CPU without bfloat16 is faster in
        float32.
    """

    model: Annotated[Path, tyro.conf.Positional]
    work: Annotated[Path, tyro.conf.Positional]
    levels: tuple[Effort, ...] = ("quick", "good", "best")
    patterns: tuple[str, ...] = _PATTERNS
    sequences: int = 64
    steps: int = 0
    batch: int = 2
    learning_rate: float = 1e-4
    limit: int = 8
    dtype: Dtype = "bfloat16"


def main(config: Config) -> None:
    """Runs what is missing, prints the table, then one JSON line."""
    config.work.mkdir(parents=True, exist_ok=True)
    files = commands.write_calibration(config.model, config.work, config.sequences)
    rows = list(_rows(config, files))
    print(columns([list(rows[0]), *([*row.values()] for row in rows)], right=True))
    measure.report("effort_levels", model=config.model.name, rows=rows)


def _rows(config: Config, files: Calibration) -> Iterator[dict[str, Any]]:
    """The dense model, then each cell, which is run if it is missing."""
    for index, pattern in enumerate(config.patterns):
        for place, level in enumerate(config.levels):
            out = _pruned(config, files, level, pattern)
            if not index and not place:
                # Every job measures the dense model: the first one's will do.
                yield _row("", "dense", out, "dense", 0)
            seconds = commands.work_seconds(out)
            yield _row(pattern, level, out, "pruned", seconds)
            if config.steps and level == "best":
                trained = _recovered(config, files, out)
                seconds += commands.work_seconds(trained)
                title = f"{level}, {config.steps} steps"
                yield _row(pattern, title, trained, "distilled", seconds)


def _pruned(config: Config, files: Calibration, level: Effort, pattern: str) -> Path:
    """The directory of the model that a level leaves."""
    # Not every file system takes a colon.
    out = config.work / f"{level}-{pattern.replace(':', '-')}"
    if commands.is_done(out):
        return out
    chosen = LEVELS[level]
    calibration = (*files.texts, *([files.own] if chosen.own_text else []))
    # What --effort says, but that its own text is written once for all cells.
    commands.run_module(
        *("jaxprune", "prune", config.model, out, "--overwrite"),
        *("--method", chosen.method, "--correction", chosen.correction),
        *("--refine", chosen.refine, "--dtype", config.dtype),
        *(("--pattern",) if ":" in pattern else ("--sparsity",)),
        *(pattern, "--calibration", *calibration, "--sequences", config.sequences),
        *("--length", commands.LENGTH, "--prompt-steps", 0),
        *commands.evaluation(config.work, config.limit),
    )
    return out


def _recovered(config: Config, files: Calibration, pruned: Path) -> Path:
    """The directory of a pruned model that was trained, zeros held."""
    out = config.work / f"{pruned.name}-{config.steps}"
    if not commands.is_done(out):
        # Matrices alone: what has zeros is trained, and the embedding stays.
        commands.recover(
            *(pruned, out, config.model, files, "--recover-steps", config.steps),
            *("--recover-learning-rate", config.learning_rate),
            *("--recover-train", "matrices", "--batch", config.batch),
            *commands.evaluation(config.work, config.limit),
            dtype=config.dtype,
        )
    return out


def _row(
    pattern: str, level: str, out: Path, stage: str, seconds: float
) -> dict[str, Any]:
    measured = commands.perplexity_columns(out, stage)
    cost = {
        "minutes": f"{seconds / 60:.0f}",
        # A job that also prunes measures the dense model: its memory is not known. That
        # of a model that was trained is the recovery's.
        "peak, GB": commands.peak_gigabytes(out) if pattern else "",
    }
    return {"removed": pattern, "effort": level, **measured, **cost}


if __name__ == "__main__":
    main(tyro.cli(Config))
