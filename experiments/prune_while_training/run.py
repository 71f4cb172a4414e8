"""Trains the cells that are asked for and are not in the directory."""

import dataclasses
import functools
import itertools
import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax

import jaxprune as jp
from experiments import gpt
from experiments.datasets import Batches, Corpus, load, prefetch, validation_batches
from experiments.harness import device_mesh, runner, training
from experiments.harness.optimizer import schedule
from experiments.harness.records import once
from experiments.prune_while_training import report
from experiments.prune_while_training.config import Cell, Config
from experiments.prune_while_training.methods import DENSE, DENSE_SMALL, METHODS, Span
from experiments.tasks.language_model import LanguageModel
from jaxprune.arrays.messages import listed

POINTS = 10
"""How often a run is looked at."""
_WATCHED_TOKENS = 16_384  # of the validation set, while it trains


class Begun(NamedTuple):
    """A state, the step that goes on from it, and the batches."""

    state: training.TrainState
    step_fn: training.StepFunction
    batches: training.Batches


class Run:
    """What the cells of one directory have in common."""

    def __init__(self, config: Config, corpus: Corpus) -> None:
        """Prepares the model and the validation set; trains nothing."""
        self.config, self.corpus = config, corpus
        self.mesh = device_mesh.make_mesh(config.mesh, config.batch)
        self.shape = gpt.preset(config.preset, vocab_size=len(corpus.vocabulary))
        size = device_mesh.batch_size(64, self.mesh)
        cut = functools.partial(
            validation_batches, corpus.validation, size, self.shape.context
        )
        self.windows = cut(config.eval_tokens or None)
        self.watched = cut(min(config.eval_tokens or _WATCHED_TOKENS, _WATCHED_TOKENS))
        # By width: the dense model of a pruned run's average size is another program.
        self.model = functools.cache(self._model)

    def identity(self) -> dict[str, Any]:
        """What must be the same for cells to lie in one directory; JSON-able."""
        config = self.config
        return {
            "preset": config.preset,
            "data": self.corpus.name,
            "fingerprint": self.corpus.fingerprint,
            "batch_size": config.batch,
            "eval_tokens": config.eval_tokens,
            "tune_sparsity": config.tune_sparsity,
        }

    def all(self) -> dict[str, Any]:
        """Does what is asked for; returns all cells that are in the directory."""
        config = self.config
        ways = [*itertools.product(config.steps, config.names())]
        for steps, method in ways:
            self.rate(method, steps)
        # All methods of a sparsity and seed one after the other, so that a run that is
        # stopped has whole comparisons.
        for sparsity, seed in itertools.product(config.sparsities, config.seeds):
            for steps, method in ways:
                rate = self.rate(method, steps)
                self.measured(self.cell(method, sparsity, steps, rate, seed))
        return {"cells": self.found(), "tune_seeds": [*config.tune_seeds]}

    def cell(self, method: str, sparsity: float, *settings: Any) -> Cell:
        """A cell; the dense control has no sparsity."""
        return Cell(method, 0.0 if method == DENSE else sparsity, *settings)

    def found(self) -> list[dict[str, Any]]:
        """All cells that are in the directory."""
        paths = sorted((self.config.out / "cells").glob("*.json"))
        return [json.loads(path.read_text()) for path in paths]

    def rate(self, method: str, steps: int) -> float:
        """The peak of the lowest mean loss of the tuning sparsity and seeds."""
        config, rates = self.config, self.config.rates(method)
        if len(rates) > 1:
            for rate, seed in itertools.product(rates, config.tune_seeds):
                cell = self.cell(method, config.tune_sparsity, steps, rate, seed)
                self.measured(cell)
        best = report.rates(self.found(), config.tune_sparsity, config.tune_seeds)
        key = (method, steps)
        best_rate = best.get(key, rates[0])
        # Cells of an earlier run in this directory, with other rates than this one's.
        tried = report.tried(self.found(), key) - {best_rate}
        if key not in best and tried:
            raise ValueError(
                f"{method} was trained here with a learning rate of "
                f"{listed(sorted(tried))}, and without all of tune_seeds "
                f"{listed(config.tune_seeds)} nothing says which is better; give that "
                "rate, several --learning-rates to choose from, or another --out"
            )
        if best_rate not in rates:
            flag = "control" if rates is config.control_rates else "learning"
            raise ValueError(
                f"{method} had its lowest loss here with a learning rate of "
                f"{best_rate:g}, which is not among {listed(rates)}; add it to "
                f"--{flag}-rates, or give another --out"
            )
        return best_rate

    def measured(self, cell: Cell) -> dict[str, Any]:
        """The cell's numbers, from its file where there is one."""

        def compute() -> dict[str, Any]:
            begun = self._start(cell)
            start = time.perf_counter()
            state, curve = self.trained(cell, begun)
            sparsity = jp.sparsity(jp.scores.magnitude(state.params))
            _, evaluate = self.model(self._width(cell))
            numbers = {
                "loss": evaluate(state.params, self.windows),
                "zeros": sparsity.zeros,
                "size": sparsity.size,
                "seconds": time.perf_counter() - start,
                "curve": curve,
            }
            print(f"{cell.name}  {numbers['loss']:.4f} nats", flush=True)
            return {**dataclasses.asdict(cell), **numbers}

        return once(self.config.out / "cells" / f"{cell.name}.json", compute)

    def trained(
        self, cell: Cell, begun: Begun
    ) -> tuple[training.TrainState, list[dict[str, Any]]]:
        """The state after the last step, and what was seen every tenth of the steps."""
        state, step_fn, batches = begun
        before = _masks(state)
        curve = [self._point(cell, state, before)]
        stops = [round(cell.steps * n / POINTS) for n in range(1, POINTS + 1)]
        for stop in stops:
            state = training.train(
                state,
                step_fn,
                batches,
                steps=stop,
                key=jax.random.key(cell.seed),
                reports=training.Reports(label=cell.name),
                mesh=self.mesh,
                prefetch=prefetch,
            )
            curve.append(self._point(cell, state, before))
            before = _masks(state)
        return state, curve

    def _start(self, cell: Cell) -> Begun:
        """Where a cell begins."""
        model, _ = self.model(self._width(cell))
        # A tenth at most: the shortest runs have ten steps.
        warmup = min(100, cell.steps // 10)
        rate = schedule(cell.learning_rate, cell.steps, warmup)
        tx = METHODS[cell.method](rate, self._span(cell))
        return Begun(
            training.init(model.init(cell.seed), tx, mesh=self.mesh),
            training.make_step(model.loss, tx),
            Batches(
                self.corpus.train, self.config.batch, self.shape.context, cell.seed
            ),
        )

    def _point(
        self, cell: Cell, state: training.TrainState, before: Any
    ) -> dict[str, Any]:
        """Sparsity and loss, and how many of the masks' ones were there before."""
        masks = _masks(state)
        _, evaluate = self.model(self._width(cell))
        return {
            "step": int(state.step),
            "loss": evaluate(state.params, self.watched),
            "sparsity": jp.sparsity(jp.scores.magnitude(state.params)).total,
            "overlap": None if masks is None else jp.masks.overlap(masks, before).total,
        }

    def _span(self, cell: Cell) -> Span:
        return Span.of(cell.sparsity, cell.steps)

    def _width(self, cell: Cell) -> int:
        """The model's; "dense_small" has about the pruned run's average of weights."""
        if cell.method != DENSE_SMALL:
            return self.shape.width
        # Matrices grow with the square of the width, hence the root.
        kept = self._span(cell).average(cell.steps)
        heads = self.shape.heads
        return max(round(self.shape.width * kept**0.5 / heads), 1) * heads

    def _model(self, width: int) -> tuple[LanguageModel, Any]:
        model = LanguageModel(dataclasses.replace(self.shape, width=width))
        return model, training.make_eval(model.token_losses, mesh=self.mesh)


def _masks(state: training.TrainState) -> Any:
    """The masks, copied: the next step uses the state up; None where there are none."""
    try:
        return jax.device_get(jp.masks.get(state.opt_state))
    except ValueError:
        return None


def main(config: Config) -> Path:
    """Runs the experiment, or what is left of it; returns the path of results.json.

    Raises:
      ValueError: the configuration is out of range, or the directory holds another run.
      OSError: the directory cannot be written to, or another process runs there.
      FloatingPointError: a loss is not finite.
    """
    config.check()
    corpus = load(config.data, text=config.text, data_dir=config.data_dir)
    run = Run(config, corpus)

    return runner.run(
        "prune_while_training",
        config.out,
        run.identity(),
        run.all,
        report.report,
        grows=True,
    )
