"""Train once, then prune in every way that is asked for: one stage after the other.

Each stage's result is a small JSON file in the run's directory, written at the end of
the stage; a run started again reads what is there and does the rest. Inside a stage of
many steps, `training.train` continues from its own checkpoints.
"""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

import jaxprune as jp
from experiments.harness import device_mesh, training
from experiments.harness.criteria import CRITERIA, GRADUAL, Watched
from experiments.harness.plan import Cell, Plan
from experiments.harness.records import MetricsLog, Stages
from experiments.harness.seed_trainer import SeedTrainer
from experiments.harness.solvers import SOLVERS, named
from experiments.harness.task import Task
from jaxprune.arrays.console_progress import Progress
from jaxprune.arrays.processes import on_first
from jaxprune.typing import Prunable

METRICS = "metrics.jsonl"
MODEL = "model"
"""In a seed's directory: the first criterion's model at the sparsity that is shown."""


class Seed:
    """All stages of one seed; `run` returns what results.json holds of it."""

    def __init__(
        self,
        seed: int,
        plan: Plan,
        task: Task,
        out: Path,
        log: MetricsLog | None,
        identity: dict[str, Any],
        progress: Progress,
        mesh: Mesh | None = None,
    ) -> None:
        """Prepares the data and the compiled functions; computes nothing.

        `log` is None on processes that write nothing.
        """
        self.seed, self.plan, self.task = seed, plan, task
        self.directory = directory = out / f"seed-{seed}"
        self.metrics = out / METRICS
        self.trainer = SeedTrainer(seed, plan, task, directory, log, identity, mesh)
        self.stages = Stages(directory, seed, plan.energy_country, progress)
        self._once = self.stages.once
        evaluate = training.make_eval(task.token_losses, mesh=mesh)

        def validation(limit: int | None) -> Callable[[Any], float]:
            size = device_mesh.batch_size(task.looks.batch, mesh)
            windows = task.validation(size, limit)

            def loss(params: Any) -> float:
                mean = evaluate(params, windows)
                if not math.isfinite(mean):
                    raise FloatingPointError(
                        f"seed {seed}: the validation loss must be finite, got {mean}; "
                        "give a lower --learning-rate"
                    )
                return mean

            return loss

        self.loss = validation(plan.eval_tokens)
        self.curve_loss = validation(
            min(task.looks.tokens, plan.eval_tokens or task.looks.tokens)
        )
        self._mean = evaluate
        # Scores and solutions are as large as the model: those of one cell are held at
        # a time.
        self._scores: tuple[str, Any] = ("", None)
        self._solution: tuple[Cell | None, Any] = (None, None)

    def run(self) -> dict[str, Any]:
        """Every stage in order, or what is left of them."""
        # Before training: how much fine-tuning itself changed both texts.
        start = None
        if self.task.begins_trained:
            begun = self.trainer.start
            start = self._once("start", lambda: self._measured(begun()))
        watched = self._train()
        dense = {"steps": self.plan.steps}
        dense |= self._once("dense", lambda: self._measured(watched.params))
        samples = [self._once("sample", lambda: self._sample("dense", watched.params))]
        control = self._control(watched)
        cells = [self._cell(watched, cell, samples) for cell in self.plan.cells()]
        return {
            "seed": self.seed,
            "start": start,
            "dense": dense,
            "control": control,
            "curve": self._curve(),
            "cells": cells,
            "samples": samples,
        }

    def _train(self) -> Watched:
        """The dense model and what was tracked while it was trained."""

        def evaluate(state: training.TrainState) -> dict[str, Any]:
            return {"validation_loss": self.curve_loss(state.params)}

        self._once("train", lambda: self.trainer.train(evaluate))
        return self.trainer.watched()

    def _retrained(
        self,
        stage: str,
        train: Callable[[str], tuple[Any, dict[str, int]]],
        then: Callable[[Any], dict[str, Any]] = lambda params: {},
    ) -> dict[str, Any]:
        """What is measured after `retrain_steps` more steps, taken by `train`."""

        def compute() -> dict[str, Any]:
            trained, costs = train(stage)
            return {**self._measured(trained), **then(trained), **costs}

        result = self._once(stage, compute)
        # The stage's checkpoints: its numbers are written, nothing continues from them.
        on_first(lambda: shutil.rmtree(self.directory / stage, ignore_errors=True))
        return result

    def _control(self, watched: Watched) -> dict[str, Any] | None:
        """The dense model after as many more steps, by the very same program."""
        if not self.plan.retrain_steps:
            return None
        params = watched.params
        # None may be retrained: then the control stands alone.
        allocation = (*self.plan.retrain_allocations, *self.plan.allocations)[0]
        _, prunable = self.task.allocations[allocation]
        result = self._retrained(
            "control",
            lambda stage: self.trainer.retrain(
                stage,
                params,
                # Masks of ones: the control runs the program of the pruned models, so a
                # difference in loss is none of compilation or rounding.
                lambda: _only(_keep_everything(params), params, prunable),
            ),
        )
        return {"steps": self.plan.steps + self.plan.retrain_steps, **result}

    def _measured(self, params: Any) -> dict[str, Any]:
        """The validation loss, and what else the task measures."""
        loss = self.loss(params)
        return {"loss": loss, **self.task.measured(params, loss, self._mean)}

    def _masks(self, watched: Watched, cell: Cell) -> Any:
        """What a criterion keeps of the leaves that an allocation is about."""
        ranked, prunable = self.task.allocations[cell.allocation]
        # Leaves outside the allocation's part are neither ranked nor pruned.
        scores = _only(self._scored(watched, cell.criterion), watched.params, prunable)
        return jp.masks.make(scores, cell.sparsity, allocation=ranked)

    def _scored(self, watched: Watched, criterion: str) -> Any:
        """The scores of a criterion; only the last one's are held."""
        if self._scores[0] != criterion:
            self._scores = (criterion, CRITERIA[criterion](watched))
        return self._scores[1]

    def _cell(self, watched: Watched, cell: Cell, samples: list[Any]) -> dict[str, Any]:
        """One criterion at one sparsity: right after pruning, and retrained."""
        pruned = self._once(f"prune/{cell.name}", lambda: self._pruned(watched, cell))
        retrained: dict[str, Any] = {"loss": None}
        if self.plan.retrains(cell):
            retrained = self._retrained(
                f"retrain/{cell.name}",
                lambda stage: self._pruned_and_trained(stage, watched, cell),
                lambda params: self._shown(cell, params, retrained=True),
            )
        samples_shown = [stage.pop("sample", None) for stage in (pruned, retrained)]
        samples += [sample for sample in samples_shown if sample is not None]
        return {**cell._asdict(), **pruned, **_named("retrained", retrained)}

    def _pruned_and_trained(
        self, stage: str, watched: Watched, cell: Cell
    ) -> tuple[Any, dict[str, int]]:
        """The parameters after the steps that follow training, and what was done."""
        if cell.criterion == GRADUAL:
            return self.trainer.prune_gradually(
                stage, watched.params, cell.sparsity, cell.allocation
            )
        if named(cell.criterion):
            params = self._solved(watched, cell)
            kept = self._kept(params, cell)
            return self.trainer.retrain(stage, params, lambda: kept)
        return self.trainer.retrain(
            stage, watched.params, lambda: self._masks(watched, cell)
        )

    def _solved(self, watched: Watched, cell: Cell) -> Any:
        """The parameters that a solver leaves; only the last cell's are held."""
        if self._solution[0] != cell:
            # Before the next one is made, so that two are never held.
            self._solution = (None, None)
            solver = named(cell.criterion)
            assert solver is not None
            prunable = self.task.allocations[cell.allocation][1]
            params = self.task.solved(
                watched.params,
                method=SOLVERS[solver.method](
                    cell.sparsity,
                    allocation=solver.shared_out(
                        lambda name: _only(
                            self._scored(watched, name), watched.params, prunable
                        )
                    ),
                ),
                seed=self.seed,
            )
            self._solution = (cell, params)
        return self._solution[1]

    def _kept(self, params: Any, cell: Cell) -> Any:
        """Where pruned parameters are not zero, of the leaves that were pruned."""
        # A solver moves the weights that it keeps: which are gone only the zeros say.
        nonzero = jax.tree.map(lambda leaf: leaf != 0, params)
        return _only(nonzero, params, self.task.allocations[cell.allocation][1])

    def _pruned(self, watched: Watched, cell: Cell) -> dict[str, Any]:
        """What is measured right after pruning."""
        if named(cell.criterion):
            params = self._solved(watched, cell)
            kept = self._kept(params, cell)
        else:
            kept = self._masks(watched, cell)
            params = jp.masks.apply(watched.params, kept)
        counts = jp.sparsity(kept)
        removed = {k: zeros / size for k, (zeros, size) in counts.by_leaf.items()}
        return {
            "achieved": counts.total,
            **_named("pruned", self._measured(params)),
            "sparsity_by_leaf": removed,
            **self._shown(cell, params, retrained=False),
        }

    def _shown(self, cell: Cell, params: Any, *, retrained: bool) -> dict[str, Any]:
        """A sample of the cells that are shown; the first's final model is written."""
        plan = self.plan
        if not plan.shows(cell):
            return {"sample": None}
        # One model is enough for a reader to load: retrained, where that cell is.
        if cell.criterion == plan.criteria[0] and retrained == plan.retrains(cell):
            steps = plan.retrain_steps if retrained else 0
            provenance = {
                **cell._asdict(),
                "method": cell.criterion,
                "retrain_steps": steps,
            }
            self.task.save(params, self.directory / MODEL, provenance)
        label = f"{cell.label}, retrained" if retrained else cell.label
        return {"sample": self._sample(label, params)}

    def _sample(self, label: str, params: Any) -> dict[str, Any]:
        return self.task.shown(params, label, self.plan.sample_length)

    def _curve(self) -> list[dict[str, Any]]:
        """What the dense run reported: a dict for each step with a loss."""
        names = ("step", "loss", "validation_loss")

        def read() -> list[dict[str, Any]]:
            lines = map(json.loads, self.metrics.read_text().splitlines())
            return [
                {name: line.get(name) for name in names}
                for line in lines
                if (line["phase"], line["seed"]) == ("train", self.seed)
                and line.get("loss") is not None
            ]

        return on_first(read)


def _named(stage: str, measured: dict[str, Any]) -> dict[str, Any]:
    """Measures of a stage by the names of results: "loss_pruned"."""
    return {f"{name}_{stage}": value for name, value in measured.items()}


def _keep_everything(params: Any) -> Any:
    """Masks that prune nothing, for a dense run by the program of the pruned ones."""
    return jax.tree.map(
        # Of the scores, which have no entry for leaves that nothing prunes.
        lambda score: jnp.ones_like(score, bool),
        jp.scores.magnitude(params),
    )


def _only(tree: Any, params: Any, prunable: Prunable) -> Any:
    """The scores or masks of leaves that may be pruned; the others are left out."""
    structure = jax.tree.structure(tree, is_leaf=jp.tree.is_excluded)
    weights = jp.tree.named_leaves(params)
    leaves = [
        leaf if prunable(name, weights[name]) else optax.MaskedNode()
        for name, leaf in jp.tree.named_leaves(tree).items()
    ]
    return jax.tree.unflatten(structure, leaves)
