"""The training runs of one seed: the watched dense one, and those with masks held."""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

import jaxprune as jp
from experiments.datasets import prefetch
from experiments.harness import checkpoint, device_mesh, training
from experiments.harness.criteria import Watched, averages
from experiments.harness.optimizer import ADAMW, schedule
from experiments.harness.plan import Plan
from experiments.harness.records import MetricsLog
from experiments.harness.solvers import rankings
from experiments.harness.task import Task


class SeedTrainer:
    """Trains and retrains; a run in the directory continues."""

    def __init__(
        self,
        seed: int,
        plan: Plan,
        task: Task,
        directory: Path,
        log: MetricsLog | None,
        identity: Mapping[str, Any],
        mesh: Mesh | None,
    ) -> None:
        """Prepares the data and the dense run's step; computes nothing.

        `log` is None on processes that write nothing.
        """
        self._seed, self._plan, self._task, self._mesh = seed, plan, task, mesh
        self._directory, self._log = directory, log
        self._identity = {**identity, "seed": seed}
        self._batches = task.batches(plan.batch_size, seed)
        self._watching = _watching(
            task, plan.learning_rate, plan.steps, averages(rankings(plan.criteria))
        )

    def train(
        self, evaluate: Callable[[training.TrainState], Mapping[str, Any]]
    ) -> dict[str, int]:
        """Trains the dense model, its checkpoints in "train"; returns its tokens.

        `evaluate` maps the state to what is reported on the way, as often as the task
        looks.
        """
        tx, step_fn = self._watching
        state = training.init(self._task.init(self._seed), tx, mesh=self._mesh)
        return self._fit("train", state, step_fn, evaluate)[1]

    def watched(self) -> Watched:
        """The trained parameters and what was tracked on the way to them."""
        tx, _ = self._watching
        target = training.abstract(self._task.shapes, tx, mesh=self._mesh)
        trained = checkpoint.restore(
            self._directory / "train", target, configuration=self._stage("train")
        )
        assert trained is not None
        state = trained.state
        # Without a criterion that needs them nothing was tracked.
        tracked = adam = (
            jp.get_importance(state.opt_state)
            if averages(rankings(self._plan.criteria))
            else jp.Importance()
        )
        if "preconditioned_adam" in rankings(self._plan.criteria):
            # Adam's nu: an average of the squared gradients after the clipping.
            square = jp.get_importance(state.opt_state[ADAMW]).square
            adam = tracked._replace(square=square)
        return Watched(state.params, tracked, adam, self.start)

    def start(self) -> Any:
        """The parameters that training began with, placed as those that it left."""
        params = self._task.init(self._seed)
        if self._mesh is None:
            return params
        return device_mesh.put(params, device_mesh.shardings(params, self._mesh))

    def retrain(
        self, stage: str, params: Any, masks: Callable[[], Any]
    ) -> tuple[Any, dict[str, int]]:
        """The parameters after `retrain_steps` steps with masks, and their tokens.

        `masks` makes the masks, so that they are held only while they are needed.
        """
        plan = self._plan
        # One transformation for all cells, so one compiled program.
        inner, step_fn = _retraining(
            self._task, plan.retrain_learning_rate, plan.retrain_steps
        )
        kept = masks()
        # New arrays all of them, since the first step uses them up.
        pruned = jax.tree.map(
            lambda new, old: jnp.copy(new) if new is old else new,
            jp.masks.apply(params, kept),
            params,
        )
        tx = jp.keep_masks(inner, kept)
        state = training.init(pruned, tx, mesh=self._mesh)
        del kept, pruned, tx  # the state has them
        state, tokens = self._fit(stage, state, step_fn)
        return state.params, tokens

    def prune_gradually(
        self, stage: str, params: Any, sparsity: float, allocation: str
    ) -> tuple[Any, dict[str, int]]:
        """The parameters after `retrain_steps` steps that prune, and their tokens."""
        plan = self._plan
        tx, step_fn = _gradual(
            self._task,
            plan.retrain_learning_rate,
            plan.retrain_steps,
            sparsity,
            allocation,
        )
        state = training.init(jax.tree.map(jnp.copy, params), tx, mesh=self._mesh)
        state, tokens = self._fit(stage, state, step_fn)
        return state.params, tokens

    def _stage(self, stage: str) -> dict[str, Any]:
        return {**self._identity, "stage": stage}

    def _fit(
        self,
        stage: str,
        state: training.TrainState,
        step_fn: training.StepFunction,
        evaluate: Any = None,
    ) -> tuple[training.TrainState, dict[str, int]]:
        """The state after the last step, and the tokens of this start."""
        plan, log = self._plan, self._log
        dense = stage == "train"
        steps = plan.steps if dense else plan.retrain_steps
        # Retraining goes on behind the last training batch, and sees no batch twice.
        offset = 0 if dense else plan.steps
        labels = {"phase": stage, "seed": self._seed}
        first_step = 0

        def begin(step: int) -> None:
            nonlocal first_step
            first_step = step
            if log is not None:
                # What was reported past the checkpoint is about to be reported again.
                log.resume(step, **labels)

        def report(metrics: dict[str, Any]) -> None:
            if log is not None:
                log.write(metrics, **labels)

        state = training.train(
            state,
            step_fn,
            lambda step: self._batches(offset + step),
            steps=steps,
            key=jax.random.key(self._seed),
            checkpoints=training.Checkpoints(
                self._directory / stage, self._stage(stage), plan.checkpoint_every
            ),
            reports=training.Reports(
                report,
                begin,
                max(min(50, steps // 10), 1),
                evaluate,
                # As many looks whatever the length, so curves of all presets are alike.
                max(steps // self._task.looks.times, 1) if dense else 1,
                label=f"seed {self._seed} {stage.replace('/', ' ')}",
            ),
            mesh=self._mesh,
            prefetch=prefetch,
            donate=True,
        )
        # Of the steps of this start alone, as the seconds are.
        tokens = (steps - first_step) * plan.batch_size * self._task.length
        return state, {"tokens": tokens}


@functools.cache
def _watching(
    task: Task, learning_rate: float, steps: int, averages_held: frozenset[str]
) -> tuple[optax.GradientTransformation, training.StepFunction]:
    """The optimizer of the dense run and its step; one object, so compiled once."""
    tx = task.optimizer(schedule(learning_rate, steps, warmup=100), track=averages_held)
    return tx, training.make_step(task.loss, tx)


@functools.cache
def _retraining(
    task: Task, learning_rate: float, steps: int
) -> tuple[optax.GradientTransformation, training.StepFunction]:
    """The optimizer of every retraining and its step.

    The masks a step holds are those in its state, so one program serves every cell, and
    the control, whose masks keep everything.
    """
    tx = task.optimizer(schedule(learning_rate, steps, warmup=50), track=())
    return tx, training.make_step(task.loss, jp.keep_masks(tx, {}))


@functools.lru_cache(maxsize=1)
def _gradual(
    task: Task, learning_rate: float, steps: int, sparsity: float, allocation: str
) -> tuple[optax.GradientTransformation, training.StepFunction]:
    """The optimizer that prunes in the first three fifths of the steps, and its step.

    The rise is the one that `prune_while_training` found better from a dense model. It
    is part of the program, so each sparsity has its own.
    """
    ranked, prunable = task.allocations[allocation]
    rise = jp.schedules.cubic(
        # Begins at 5 %: the weights are trained, and nothing is to be waited for.
        sparsity,
        max(steps // 20, 1),
        3 * steps // 5,
        every=max(steps // 100, 1),
    )
    tx = jp.gradual(
        task.optimizer(schedule(learning_rate, steps, warmup=50), track=()),
        rise,
        allocation=ranked,
        prunable=prunable,
    )
    return tx, training.make_step(task.loss, tx)
