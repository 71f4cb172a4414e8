"""How do corrections, refinement, and calibration without a text change the result?

    python -m experiments.refined_solvers --out results/refined_solvers

A dense GPT of `allocation_with_solvers` is pruned, calibrated on sequences of its
training text, on text that it writes itself, or on half of each. Each of these is done
without and with a correction (each matrix makes up for what earlier matrices lost), and
without and with a refinement of the blocks. Every cell is one small file, so a run that
was stopped continues.
"""

import dataclasses
import itertools
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

import jaxprune as jp
from experiments import allocation_with_solvers
from experiments.datasets import load
from experiments.harness import records, runner
from experiments.harness.option_rules import check_lists, check_names
from experiments.harness.solvers import SOLVERS
from experiments.report import findings, tables
from experiments.report.tables import Report, Table
from experiments.tasks.dense_models import Watched
from jaxprune.arrays import rules
from jaxprune.arrays.console_progress import Progress
from jaxprune.arrays.rules import Rule
from jaxprune.lm.texts.self_calibration import self_calibration

CALIBRATIONS = ("text", "self", "both")
METHODS = [name for name in SOLVERS if "+" not in name]
_LISTS = (
    *("seeds", "draws", "calibrations", "methods", "sparsities", "corrections"),
    *("passes", "learning_rates", "temperatures"),
)
"""Corrections are a list of their own here."""
_LEAST = 2 * allocation_with_solvers.SEQUENCES_AT_ONCE
_REFINEMENT = Rule(
    lambda v: not any(v.passes) or v.sequences >= _LEAST,
    f"sequences must be >= {_LEAST} for a refinement, which measures itself on a batch "
    "of its own, got {sequences}",
)


@dataclasses.dataclass(frozen=True)
class Config:
    """Prunes dense GPTs by solvers, refined or not, calibrated in three ways.

    Attributes:
      out: directory of the results; what is found there is not done again.
      preset: size of the model.
      data: "shakespeare_plays" (offline) or "tiny_shakespeare_char".
      data_dir: where data sets are kept.
      seeds: one dense model each.
      draws: numbers of draws of the calibration sequences.
      calibrations: what is calibrated on: text, self, or both, half of each.
      methods: sparsegpt, alps or wanda.
      sparsities: fractions of the decoder's matrices to remove.
      corrections: how much of what earlier matrices lost one makes up for; 0 is none,
        and it alone is done with wanda.
      passes: numbers of passes of the refinement; 0 is none.
      learning_rates: learning rates of the refinement.
      temperatures: temperatures of what the model writes.
      sequences: calibration sequences, of the model's context each.
      steps: steps of training.
      eval_tokens: validation tokens of every loss; 0 takes all.
    """

    out: Path = Path("results/refined_solvers")
    preset: Literal["cpu", "medium"] = "cpu"
    data: str = "shakespeare_plays"
    data_dir: Path | None = None
    seeds: tuple[int, ...] = (0,)
    draws: tuple[int, ...] = (0, 1, 2)
    calibrations: tuple[str, ...] = CALIBRATIONS
    methods: tuple[str, ...] = ("sparsegpt", "alps")
    sparsities: tuple[float, ...] = (0.7,)
    corrections: tuple[float, ...] = (0.0, 0.5)
    passes: tuple[int, ...] = (0, 8)
    learning_rates: tuple[float, ...] = (1e-3,)
    temperatures: tuple[float, ...] = (1.0,)
    sequences: int = 128
    steps: int = 600
    eval_tokens: int = 32768

    def check(self) -> None:
        """Refuses what could only fail later.

        Raises:
          ValueError: a name is unknown, a number out of range, or a list empty.
        """
        check_names(self, {"calibrations": CALIBRATIONS, "methods": METHODS})
        check_lists(self, *_LISTS)
        rules.check([_REFINEMENT], **vars(self))

    def cells(self) -> list["Cell"]:
        """Every cell that is asked for; the rate is of no matter without passes."""
        combinations = itertools.product(
            self.seeds,
            self.draws,
            self.calibrations,
            self.methods,
            self.sparsities,
            self.corrections,
            self.passes,
            self.learning_rates,
            self.temperatures,
        )
        return list(dict.fromkeys(Cell(*values).plain() for values in combinations))


@dataclasses.dataclass(frozen=True)
class Cell:
    """One pruned model; the fields are those of `Config`, in the singular."""

    seed: int
    draw: int
    calibration: str
    method: str
    sparsity: float
    correction: float
    passes: int
    learning_rate: float
    temperature: float

    def plain(self) -> "Cell":
        """The cell with zeros for what is of no matter."""
        rate = self.learning_rate if self.passes else 0.0
        # A text is read, not written: cells that differ in this alone would be done
        # twice.
        temperature = 0.0 if self.calibration == "text" else self.temperature
        correction = 0.0 if self.method == "wanda" else self.correction
        return dataclasses.replace(
            self,
            learning_rate=rate,
            temperature=temperature,
            correction=correction,
        )

    def path(self, out: Path) -> Path:
        """Its file below the run's directory."""
        name = "-".join(f"{x}" for x in dataclasses.astuple(self))
        return out / "cells" / f"{name}.json"


class Run(allocation_with_solvers.Run):
    """What the cells of one configuration have in common."""

    def __init__(self, config: Config) -> None:
        """Prepares the model and the validation set; trains nothing."""
        base = allocation_with_solvers.Config(
            out=config.out,
            preset=config.preset,
            data=config.data,
            data_dir=config.data_dir,
            sequences=config.sequences,
            steps=config.steps,
            eval_tokens=config.eval_tokens,
        )
        base.check()
        super().__init__(base, load(config.data, data_dir=config.data_dir))

    def sequences(self, cell: Cell, watched: Watched) -> list[np.ndarray]:
        """The batches that a cell is calibrated on."""
        text = self.calibration(cell.seed, cell.draw)
        if cell.calibration == "text":
            return text
        shape = (-1, *text[0].shape)
        # (sequences, context), cut into batches (batches, batch, context) like the
        # text's.
        samples = self_calibration(
            self.model.bind(watched.params),
            sequences=self.config.sequences,
            length=self.model.config.context,
            seed=cell.draw,
            temperature=cell.temperature,
            # The vocabulary is padded with entries that no character has.
            never_first=range(
                len(self.corpus.vocabulary), self.model.config.vocab_size
            ),
            batch=text[0].shape[0],
        ).reshape(shape)
        if cell.calibration == "self":
            return list(samples)
        # Half of each batch, so that every batch has both and all keep one shape.
        half = text[0].shape[0] // 2
        return [
            np.concatenate([a[:half], b[half:]])
            for a, b in zip(text, samples, strict=True)
        ]

    def done(self, cell: Cell, watched: Watched) -> dict[str, Any]:
        """What the file of a cell holds."""
        batches = self.sequences(cell, watched)
        passes = [SOLVERS[cell.method]()]
        if cell.correction:
            passes.append(jp.passes.correct(cell.correction))
        if cell.passes:
            passes.append(
                jp.passes.refine(passes=cell.passes, learning_rate=cell.learning_rate)
            )
        start = time.perf_counter()
        result = jp.prune_trained(
            lambda params, tokens: self.model.bind(params)(tokens),
            watched.params,
            batches,
            method=jp.passes.chain(*passes),
            sparsity=cell.sparsity,
            progress=False,
        )
        # Else the clock would stop at the dispatch of the last segment.
        jax.block_until_ready(result.params)
        seconds = time.perf_counter() - start
        return {
            **dataclasses.asdict(cell),
            "loss": self.loss(result.params),
            "seconds": seconds,
            "refined": result.report["refined"],
        }


KIND = {
    "calibration": "calibrated on",
    "method": "method",
    "sparsity": "sparsity",
    "correction": "correction",
    "passes": "passes",
    "learning_rate": "rate",
    "temperature": "temperature",
}
"""What cells of one row of the table have in common, and how it is called there."""
COLUMNS = ("seed", "draw", *KIND, "loss", "dense_loss", "above", "seconds")


def rows(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The tidy table: one row a cell, of `COLUMNS`; "above" is nats above dense."""
    table = []
    for cell in results["cells"]:
        # JSON has the seeds as strings, for they are keys there.
        dense = results["dense"][str(cell["seed"])]["loss"]
        record = {
            # Cells of an earlier run have no such entry; they were made without.
            "correction": 0.0,
            **cell,
            "dense_loss": dense,
            "above": cell["loss"] - dense,
        }
        table.append({name: record[name] for name in COLUMNS})
    return table


def report(results: Mapping[str, Any]) -> Report:
    """All that is shown of the results: means over seeds and draws."""
    table = rows(results)
    by_setting: dict[tuple[Any, ...], list[float]] = {}
    for row in table:
        setting = tuple(row[name] for name in KIND)
        # Seeds and draws of one setting are its repetitions.
        by_setting.setdefault(setting, []).append(row["above"])
    lines = [
        [*map(str, setting), findings.mean(above, signed=True), str(len(above))]
        for setting, above in sorted(by_setting.items())
    ]
    header = [*KIND.values(), "above dense", "cells"]
    caption = "Nats above dense, mean and spread over seeds and draws"
    dense = [model["loss"] for model in results["dense"].values()]
    return Report(
        lead="Solvers calibrated on text or on what the model writes, each without and "
        "with corrections and refinement: validation loss in nats per token",
        facts={"dense": findings.mean(dense), "seeds": ", ".join(results["dense"])},
        tables=[Table(header, lines, caption)],
        columns=COLUMNS,
        rows=table,
        figures={},
    )


def main(config: Config) -> Path:
    """Runs the experiment, or what is left of it; returns the path of results.json.

    Raises:
      ValueError: a name is unknown, there are too few sequences, or the directory holds
        another run.
      OSError: the directory cannot be written to, or another process runs there.
    """
    config.check()
    run = Run(config)

    def show(results: dict[str, Any], out: Path) -> str:
        return tables.write(results, out, report(results))

    return runner.run(
        "refined_solvers",
        config,
        run.identity(),
        lambda: cells(run, config.out, config.cells()),
        show,
        grows=True,
    )


def cells(run: Run, out: Path, requested: Sequence[Cell]) -> dict[str, Any]:
    """Does those cells that are not in the directory; returns all that are."""
    missing = [cell for cell in requested if not cell.path(out).exists()]
    with Progress(len(missing), "run", unit="cell") as progress:
        for cell in missing:
            content = run.done(cell, run.dense(cell.seed))
            records.write_json(cell.path(out), content)
            progress.note(f"{cell.path(out).stem}: {content['loss']:.4f}")
            progress.update()
    return allocation_with_solvers.written(out, "cells/*.json")


if __name__ == "__main__":
    runner.from_command_line(main, Config)
