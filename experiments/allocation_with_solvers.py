"""How should a sparsity be allocated to the matrices when a solver prunes each of them?

    python -m experiments.allocation_with_solvers --out results/allocation_with_solvers

A dense GPT of the main experiment is pruned layer by layer from calibration sequences
of its own training text. The solver chooses inside each matrix and repairs what it
keeps; how many weights a matrix loses is fixed by the allocation: uniform, ERK, OWL, or
one global ranking of all matrices by a criterion, such as the preconditioned magnitude
of the training itself. Every cell is one small file, so a run that was stopped
continues, and one of other seeds, allocations or sparsities in the same directory adds
to it.
"""

import dataclasses
import itertools
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

import jaxprune as jp
from experiments import gpt
from experiments.datasets import Batches, Corpus, load, validation_batches
from experiments.harness import records, runner, training
from experiments.harness.criteria import CRITERIA, Watched
from experiments.harness.option_rules import check_lists, check_names
from experiments.harness.solvers import ALLOCATIONS, SOLVERS, Solver
from experiments.harness.stages import once
from experiments.report import allocation_figure, tables
from experiments.tasks.dense_models import RECIPES, trained
from experiments.tasks.language_model import LanguageModel
from jaxprune.arrays import rules
from jaxprune.arrays.console_progress import Progress
from jaxprune.arrays.rules import Rule
from jaxprune.typing import Scores

CALIBRATED = "preconditioned_calibrated"
"""The allocation by |w| E[g^2]^(1/4) with gradients of the dense model on the
calibration sequences, as for a checkpoint of which no optimizer state is left."""

ALONE = {"wanda": "uniform", "mask": "preconditioned_magnitude"}
"""What is there to compare with, each by one allocation only; "mask" prunes the lowest
scores and repairs nothing."""

SEQUENCES_AT_ONCE = 16
"""Calibration sequences of a batch: all batches have one shape, so one program."""

_KNOWN = {
    "allocations": (*ALLOCATIONS, *CRITERIA, CALIBRATED),
    "solvers": (*SOLVERS, "mask"),
}
_RULES = (
    Rule(
        lambda v: (
            v.sequences >= 1 and not v.sequences % min(v.sequences, SEQUENCES_AT_ONCE)
        ),
        f"sequences must be a multiple of {SEQUENCES_AT_ONCE}, or fewer, got "
        "{sequences}",
    ),
    Rule(
        lambda v: v.eval_tokens >= 0 and (v.steps is None or v.steps >= 1),
        "eval_tokens must be >= 0 and steps >= 1, got {eval_tokens} and {steps}",
    ),
)


@dataclasses.dataclass(frozen=True)
class Cell:
    """One pruned model.

    Attributes:
      seed: seed of the dense model.
      draw: which draw of the calibration sequences.
      solver: a name of `SOLVERS`, or "mask".
      allocation: a name of `ALLOCATIONS` or of `CRITERIA`.
      sparsity: the fraction of the decoder's matrices that is removed.
    """

    seed: int
    draw: int
    solver: str
    allocation: str
    sparsity: float

    def path(self, out: Path) -> Path:
        """Its file below the run's directory."""
        name = (
            f"{self.solver}-{self.allocation}-{self.sparsity:g}-draw-{self.draw}.json"
        )
        return out / f"seed-{self.seed}" / "cells" / name


@dataclasses.dataclass(frozen=True)
class Config:
    """Prunes dense GPTs by solvers, the sparsity allocated in several ways.

    Attributes:
      out: directory of the results; what is found there is not done again.
      preset: size of the model.
      data: "shakespeare_plays" (offline) or "tiny_shakespeare_char".
      text: a text file, or a directory of them, in place of a data set.
      data_dir: where data sets are kept.
      seeds: one dense model each.
      allocations: how the sparsity is allocated: uniform, owl, erk, a criterion, or
        preconditioned_calibrated.
      solvers: what prunes each matrix: sparsegpt, alps, either with "+correction"; and
        for comparison wanda and mask, which have one allocation each.
      sparsities: fractions of the decoder's matrices to remove.
      draws: numbers of draws of the calibration sequences.
      sequences: calibration sequences in a draw, of the model's context each.
      steps: steps of training; the published tables' if left out.
      eval_tokens: validation tokens of every loss; 0 takes all.
      smoke: every part at a size that ends within half a minute.
    """

    out: Path = Path("results/allocation_with_solvers")
    preset: Literal["cpu", "medium"] = "cpu"
    data: str = "shakespeare_plays"
    text: Path | None = None
    data_dir: Path | None = None
    seeds: tuple[int, ...] = (0, 1, 2)
    allocations: tuple[str, ...] = (
        *("uniform", "owl", "erk"),
        *("magnitude", "preconditioned_magnitude", "preconditioned_adam"),
    )
    solvers: tuple[str, ...] = ("sparsegpt", "alps", "wanda", "mask")
    sparsities: tuple[float, ...] = (0.5, 0.6, 0.7, 0.8, 0.9)
    draws: tuple[int, ...] = (0,)
    sequences: int = 128
    steps: int | None = None
    eval_tokens: int = 0
    smoke: bool = False

    def smaller(self) -> "Config":
        """The same at the size of `--smoke`."""
        return dataclasses.replace(
            self,
            seeds=self.seeds[:1],
            # The last one too: the default's last is the one that needs Adam's state.
            allocations=tuple(
                dict.fromkeys((*self.allocations[:2], self.allocations[-1]))
            ),
            sparsities=(0.7,),
            sequences=SEQUENCES_AT_ONCE,
            steps=40,
            eval_tokens=4096,
        )

    def check(self) -> None:
        """Refuses what could only fail later.

        Raises:
          ValueError: a name is unknown, a number out of range, or a list empty.
        """
        check_names(self, _KNOWN)
        check_lists(self, "seeds", "allocations", "solvers", "sparsities", "draws")
        rules.check(_RULES, **vars(self))

    def cells(self) -> list[Cell]:
        """Every cell that is asked for, in the order in which they are done."""
        return [
            Cell(seed, draw, solver, allocation, sparsity)
            for seed, draw, solver in itertools.product(
                self.seeds, self.draws, self.solvers
            )
            for allocation in ([ALONE[solver]] if solver in ALONE else self.allocations)
            for sparsity in self.sparsities
        ]


class Run:
    """What the cells of one configuration have in common."""

    def __init__(self, config: Config, corpus: Corpus) -> None:
        """Prepares the model and the validation set; trains nothing."""
        self.config, self.corpus = config, corpus
        recipe = RECIPES[config.preset]
        self.recipe = dataclasses.replace(recipe, steps=config.steps or recipe.steps)
        shape = gpt.preset(config.preset, vocab_size=len(corpus.vocabulary))
        if config.smoke:
            # A model that trains in seconds; the data and the vocabulary are the real
            # ones.
            shape = dataclasses.replace(shape, layers=1, width=32, heads=2)
        self.model = LanguageModel(shape)
        self.evaluate = training.make_eval(self.model.token_losses)
        # Windows of 16: each batch of (16, context) tokens is one call of a compiled
        # program.
        self.windows = validation_batches(
            corpus.validation, 16, shape.context, config.eval_tokens or None
        )

    def identity(self) -> dict[str, Any]:
        """What must be the same for cells to lie in one directory; JSON-able."""
        return {
            "preset": self.config.preset,
            "data": self.corpus.name,
            "fingerprint": self.corpus.fingerprint,
            "sequences": self.config.sequences,
            "eval_tokens": self.config.eval_tokens,
            "smoke": self.config.smoke,
            **dataclasses.asdict(self.recipe),
        }

    def dense(self, seed: int) -> Watched:
        """The dense model of a seed; its loss is written the first time."""
        place = self.config.out / f"seed-{seed}"
        watched = trained(self.model, self.corpus, self.recipe, seed, place / "train")
        once(place / "dense.json", lambda: {"loss": self.loss(watched.params)})
        return watched

    def calibration(self, seed: int, draw: int) -> list[np.ndarray]:
        """Sequences of the training text, int32, in batches of one shape.

        Another draw, or another model's seed, gives others; none are those of training.
        """
        size = min(self.config.sequences, SEQUENCES_AT_ONCE)
        context = self.model.config.context
        # Training's seeds lie under 2^32, so no calibration draw repeats a training
        # batch.
        batches = Batches(self.corpus.train, size, context, 2**32 * (draw + 1) + seed)
        return [batches(step)[0] for step in range(self.config.sequences // size)]

    def loss(self, params: Any) -> float:
        """Nats per token on the validation set."""
        loss = self.evaluate(params, self.windows)
        if not math.isfinite(loss):
            raise FloatingPointError(f"the validation loss must be finite, got {loss}")
        return loss

    def calibrated(self, params: Any, batches: list[np.ndarray]) -> Scores:
        """Scores by gradients on the calibration sequences, each by itself."""

        def loss(params: Any, tokens: jax.Array) -> jax.Array:
            # tokens (1, context): each predicts the next, so context - 1 targets.
            return self.model.token_losses(params, tokens[:, :-1], tokens[:, 1:]).mean()

        # One sequence a gradient: E[g^2] of single sequences, as an optimizer with
        # batches of one would have seen it; the mean of a batch would hide their
        # variance.
        single = (tokens[None] for batch in batches for tokens in batch)
        return jp.scores.preconditioned_magnitude(
            params, jp.contrib.calibrate_gradients(loss, params, single)
        )

    def pruned(self, cell: Cell, watched: Watched, batches: list[np.ndarray]) -> Any:
        """The parameters of a cell."""
        if cell.solver == "mask":
            scores = CRITERIA[cell.allocation](watched)
            # Nothing is solved: the baseline that every solver has to beat.
            return jp.prune(watched.params, scores, cell.sparsity, allocation="global")

        def scored(name: str) -> Scores:
            if name == CALIBRATED:
                return self.calibrated(watched.params, batches)
            return CRITERIA[name](watched)

        # Scores are made where a rule asks for them: uniform, ERK and OWL ask for none.
        allocation = Solver(cell.solver, cell.allocation).shared_out(scored)
        return jp.prune_trained(
            lambda params, tokens: self.model.bind(params)(tokens),
            watched.params,
            batches,
            method=SOLVERS[cell.solver](),
            sparsity=cell.sparsity,
            allocation=allocation,
            progress=False,
        ).params

    def measured(
        self, cell: Cell, watched: Watched, batches: list[np.ndarray]
    ) -> dict[str, Any]:
        """What the file of a cell holds."""
        # The seconds are of ranking and solving, without evaluation; compilation is in
        # them for the first cell of a shape.
        start = time.perf_counter()
        params = self.pruned(cell, watched, batches)
        sparsity = jp.sparsity(jp.scores.magnitude(params))
        seconds = time.perf_counter() - start
        return {
            **dataclasses.asdict(cell),
            "zeros": sparsity.zeros,
            "size": sparsity.size,
            "loss": self.loss(params),
            "seconds": seconds,
            "sparsity_by_leaf": {k: z / n for k, (z, n) in sparsity.by_leaf.items()},
        }


def main(config: Config) -> Path:
    """Runs the experiment, or what is left of it; returns the path of results.json.

    Raises:
      ValueError: the configuration is out of range, or the directory holds another run.
      OSError: the directory cannot be written to, or another process runs there.
      FloatingPointError: a loss is not finite.
    """
    smaller = config.smaller() if config.smoke else config
    smaller.check()
    corpus = load(config.data, text=config.text, data_dir=config.data_dir)
    run = Run(smaller, corpus)

    def show(results: dict[str, Any], out: Path) -> str:
        return tables.write(results, out, allocation_figure.report(results))

    return runner.run(
        "allocation_with_solvers",
        config,
        run.identity(),
        lambda: cells(run, smaller.cells()),
        show,
        grows=True,
    )


def cells(run: Run, requested: Sequence[Cell]) -> dict[str, Any]:
    """Does those cells that are not in the directory; returns all that are."""
    out = run.config.out
    missing = [cell for cell in requested if not cell.path(out).exists()]
    with Progress(len(missing), "run", unit="cell") as progress:
        # Cells come sorted by seed and draw, so a dense model is read and a draw made
        # once.
        for seed, of_seed in itertools.groupby(missing, lambda cell: cell.seed):
            watched = run.dense(seed)
            for draw, of_draw in itertools.groupby(of_seed, lambda cell: cell.draw):
                batches = run.calibration(seed, draw)
                for cell in of_draw:
                    content = run.measured(cell, watched, batches)
                    records.write_json(cell.path(out), content)
                    progress.update()
    return written(out, "seed-*/cells/*.json")


def written(out: Path, files: str) -> dict[str, Any]:
    """The dense models' losses by seed, and the cells, whose `files` is a pattern."""
    return {
        "dense": {
            path.parent.name.removeprefix("seed-"): json.loads(path.read_text())
            for path in sorted(out.glob("seed-*/dense.json"))
        },
        "cells": [json.loads(path.read_text()) for path in sorted(out.glob(files))],
    }


if __name__ == "__main__":
    runner.from_command_line(main, Config)
