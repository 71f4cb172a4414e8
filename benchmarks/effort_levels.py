"""What does each `--effort` of `jaxprune prune` give for its seconds?

`python -m benchmarks.effort_levels MODEL WORK` prunes a real model by each level, to
each sparsity and to two of four weights, calibrated on plays and technical prose. It
prints the perplexity of other plays, other prose and news, minutes, and the highest
memory. What is in WORK is not run again. It needs the packages of `benchmarks.texts`.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import tyro

from benchmarks import commands, measure, texts
from jaxprune.arrays.messages import columns
from jaxprune.lm.checkpoints import rewrite
from jaxprune.lm.jobs.settings import Dtype
from jaxprune.posttraining.passes.efforts import Effort

_PATTERNS = ("0.5", "0.6", "0.7", "0.8", "2:4")


@dataclasses.dataclass(frozen=True)
class Config:
    """Prunes and measures; prints a table.

    Attributes:
      model: a Hugging Face directory, the dense model.
      work: the folder of texts, models and records.
      levels: levels of effort.
      patterns: shares of the weights that go, and patterns such as 2:4.
      sequences: sequences of 512 tokens that are calibrated on, in equal shares.
      limit: windows of each text that are evaluated.
      dtype: dtype of parameters and products; a CPU without bfloat16 is faster in
        float32.
    """

    model: Annotated[Path, tyro.conf.Positional]
    work: Annotated[Path, tyro.conf.Positional]
    levels: tuple[Effort, ...] = ("quick", "good", "best")
    patterns: tuple[str, ...] = _PATTERNS
    sequences: int = 64
    limit: int = 8
    dtype: Dtype = "bfloat16"


def main(config: Config) -> None:
    """Runs what is missing, prints the table, then one JSON line."""
    measure.begin(config.work, config, "sequences", "limit", "dtype")
    rows = list(_rows(config))
    print(columns([list(rows[0]), *([*row.values()] for row in rows)], right=True))
    measure.report("effort_levels", model=config.model.name, rows=rows)


def _rows(config: Config) -> Iterator[dict[str, Any]]:
    """The dense model, then each cell, which is run if it is missing."""
    for index, pattern in enumerate(config.patterns):
        for place, level in enumerate(config.levels):
            out = _pruned(config, level, pattern)
            if not index and not place:
                # Every job measures the dense model: the first one's will do.
                yield _row("", "dense", out, "dense")
            trained = "distillation" in rewrite.read_provenance(out)
            yield _row(pattern, level, out, "distilled" if trained else "pruned")


def _pruned(config: Config, level: Effort, pattern: str) -> Path:
    """The directory of the model that a level leaves."""
    # Not every file system takes a colon.
    out = config.work / f"{level}-{pattern.replace(':', '-')}"
    if commands.is_done(out):
        return out
    names = (*commands.TRAINED, *commands.HELD_OUT)
    paths = texts.write_documents(config.work, names)
    commands.run_module(
        *("jaxprune", "prune", config.model, out, "--overwrite", "--effort", level),
        *(("--pattern",) if ":" in pattern else ("--sparsity",)),
        *(pattern, "--calibration", *(paths[name] for name in commands.TRAINED)),
        *("--sequences", config.sequences, "--length", commands.LENGTH),
        *("--dtype", config.dtype, "--prompt-steps", 0),
        *commands.evaluation(config.work, config.limit),
    )
    return out


def _row(pattern: str, level: str, out: Path, stage: str) -> dict[str, Any]:
    measured = commands.perplexity_columns(out, stage)
    cost = {
        "minutes": f"{commands.work_seconds(out) / 60:.0f}" if pattern else "",
        "peak, GB": commands.peak_gigabytes(out) if pattern else "",
    }
    return {"removed": pattern, "effort": level, **measured, **cost}


if __name__ == "__main__":
    main(tyro.cli(Config))
