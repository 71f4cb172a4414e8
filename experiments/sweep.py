"""Train once, then prune in every way that is asked for: one stage after the other.

Each stage's result is a small JSON file in the run's folder, written when the stage is
over; a run started again reads what is there and does the rest. Inside a stage of many
steps, `training.train` goes on from its own checkpoints.
"""

import functools
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

import jaxprune as jp
from experiments import layout, training
from experiments.criteria import CRITERIA, Watched
from experiments.datasets import Batches, Corpus, prefetch, validation_batches
from experiments.language_model import (
    ADAMW,
    LanguageModel,
    keep_everything,
    optimizer,
    schedule,
)
from experiments.plan import Plan
from experiments.records import MetricsLog, measure, write_json
from jaxprune import checkpoint
from jaxprune.processes import is_first, on_first

METRICS = "metrics.jsonl"
WATCHED_WEIGHTS = 64
CURVE_TOKENS = 16_384


class Seed:
    """All stages of one seed; `run` returns what results.json holds of it."""

    def __init__(
        self,
        seed: int,
        plan: Plan,
        model: LanguageModel,
        corpus: Corpus,
        out: Path,
        log: MetricsLog | None,
        identity: dict[str, Any],
        mesh: Mesh | None = None,
    ) -> None:
        """Prepares the data and the compiled functions; computes nothing.

        `log` is None on processes that write nothing.
        """
        self.seed, self.plan, self.model, self.corpus = seed, plan, model, corpus
        self.log, self.identity = log, {**identity, "seed": seed}
        self.folder, self.metrics = out / f"seed-{seed}", out / METRICS
        self.mesh = mesh
        context = model.config.context
        self.batches = Batches(corpus.train, plan.batch_size, context, seed)
        evaluate = training.make_eval(model.token_losses, mesh=mesh)

        def validation(limit: int | None) -> Callable[[Any], float]:
            size = layout.batch_size(64, mesh)
            windows = validation_batches(corpus.validation, size, context, limit)

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
            min(CURVE_TOKENS, plan.eval_tokens or CURVE_TOKENS)
        )
        self.phases: list[dict[str, Any]] = []

    def run(self) -> dict[str, Any]:
        """Every stage in order, or what is left of them."""
        watched = self._train()
        dense = {"steps": self.plan.steps}
        dense |= self._once("dense", lambda: {"loss": self.loss(watched.params)})
        samples = [self._once("sample", lambda: self._sample("dense", watched.params))]
        control = self._control(watched)
        cells = []
        for criterion in self.plan.criteria:
            scores: list[Any] = []  # made once, and only if a cell is left to do
            for scope in self.plan.scopes:
                cells += [
                    self._cell(watched, criterion, scope, sparsity, scores, samples)
                    for sparsity in self.plan.sparsities
                ]
        return {
            "seed": self.seed,
            "dense": dense,
            "control": control,
            "curve": self._curve(),
            "cells": cells,
            "samples": samples,
            "weights": self._once("weights", lambda: self._weights(watched)),
        }

    def _once(self, stage: str, compute: Callable[[], dict[str, Any]]) -> Any:
        """The stage's result, read if it is there, else computed and kept."""
        path = self.folder / f"{stage}.json"
        if not on_first(path.exists):
            country = self.plan.energy_country if is_first() else None
            with measure(stage.split("/")[0], seed=self.seed, country=country) as phase:
                content = compute()
                phase.tokens = content.pop("tokens", None)
            result = {"content": content, "phase": phase.record()}
            on_first(lambda: write_json(path, result))
        stored = on_first(lambda: json.loads(path.read_text()))
        self.phases.append(stored["phase"])
        return stored["content"]

    def _train(self) -> Watched:
        """The trained parameters and what was seen on the way to them."""
        plan = self.plan
        tx, step_fn = _watching(self.model, plan.learning_rate, plan.steps)
        params = self.model.init(self.seed)
        sampled = _sampled_weights(params, self.seed)

        def evaluate(state: training.TrainState) -> dict[str, Any]:
            weights = _values(state.params, sampled)
            return {
                "validation_loss": self.curve_loss(state.params),
                "weights": weights,
            }

        state = training.init(params, tx, mesh=self.mesh)

        def train() -> dict[str, Any]:
            every = max(plan.steps // 40, 1)
            self._fit("train", state, step_fn, plan.steps, 0, evaluate, every)
            return {"tokens": self._tokens(plan.steps)}

        self._once("train", train)
        state = checkpoint.restore(self.folder / "train", state).state
        tracked = jp.get_importance(state.opt_state)
        adam = jp.get_importance(state.opt_state[ADAMW])
        return Watched(state.params, tracked, tracked._replace(square=adam.square))

    def _fit(
        self,
        stage: str,
        state: training.TrainState,
        step_fn: training.StepFunction,
        steps: int,
        offset: int,
        evaluate: Any = None,
        evaluate_every: int = 1,
    ) -> training.TrainState:
        labels = {"phase": stage, "seed": self.seed}

        def begin(step: int) -> None:
            self.begun = step
            if self.log is not None:
                self.log.resume(step, **labels)

        def report(metrics: dict[str, Any]) -> None:
            if self.log is not None:
                self.log.write(metrics, **labels)

        return training.train(
            state,
            step_fn,
            lambda step: self.batches(offset + step),
            steps=steps,
            key=jax.random.key(self.seed),
            directory=self.folder / stage,
            configuration={**self.identity, "stage": stage},
            every=self.plan.checkpoint_every,
            log_every=max(min(50, steps // 10), 1),
            on_start=begin,
            on_metrics=report,
            evaluate=evaluate,
            evaluate_every=evaluate_every,
            label=f"seed {self.seed} {stage.replace('/', ' ')}",
            mesh=self.mesh,
            prefetch=prefetch,
        )

    def _tokens(self, steps: int) -> int:
        """Those of the last `_fit`, from where it began: what its seconds are of."""
        return (steps - self.begun) * self.plan.batch_size * self.model.config.context

    def _retrained(
        self,
        stage: str,
        params: Any,
        masks: Any,
        then: Callable[[Any], dict[str, Any]] = lambda params: {},
    ) -> dict[str, Any]:
        """The loss after `retrain_steps` more steps with the masks held."""
        plan = self.plan

        def compute() -> dict[str, Any]:
            inner, step_fn = _retraining(
                self.model, plan.learning_rate, plan.retrain_steps
            )
            tx = jp.keep_masks(inner, masks)
            state = training.init(params, tx, mesh=self.mesh)
            state = self._fit(stage, state, step_fn, plan.retrain_steps, plan.steps)
            result = {"loss": self.loss(state.params), **then(state.params)}
            return {**result, "tokens": self._tokens(plan.retrain_steps)}

        result = self._once(stage, compute)
        on_first(lambda: shutil.rmtree(self.folder / stage, ignore_errors=True))
        return result

    def _control(self, watched: Watched) -> dict[str, Any] | None:
        """The dense model after as many more steps, by the very same program."""
        if not self.plan.retrain_steps:
            return None
        everything = keep_everything(watched.params)
        result = self._retrained("control", watched.params, everything)
        steps = self.plan.steps + self.plan.retrain_steps
        return {"steps": steps, "loss": result["loss"]}

    def _cell(
        self,
        watched: Watched,
        criterion: str,
        scope: jp.base.Scope,
        sparsity: float,
        scores: list[Any],
        samples: list[Any],
    ) -> dict[str, Any]:
        """One criterion at one sparsity: right after pruning, and retrained."""
        plan, name = self.plan, f"{criterion}-{scope}-{sparsity}"
        shown = sparsity == plan.show_sparsity and scope == plan.scopes[0]
        label = f"{criterion}, {100 * sparsity:g}% removed"

        def masks() -> Any:
            if not scores:
                scores.append(CRITERIA[criterion](watched))
            return jp.masks.make(scores[0], sparsity, scope=scope)

        def prune() -> dict[str, Any]:
            kept = masks()
            counts = jp.sparsity(kept)
            params = jp.masks.apply(watched.params, kept)
            shares = {k: zeros / size for k, (zeros, size) in counts.by_leaf.items()}
            sample = self._sample(label, params) if shown else None
            return {
                "achieved": counts.total,
                "loss_pruned": self.loss(params),
                "sparsity_by_leaf": shares,
                "sample": sample,
            }

        pruned = self._once(f"prune/{name}", prune)
        samples += [pruned["sample"]] if shown else []
        retrained: dict[str, Any] = {"loss": None}
        retrain = (
            plan.retrain_steps > 0
            and criterion in plan.retrain_criteria
            and sparsity in plan.retrain_sparsities
            and scope == plan.scopes[0]
        )
        if retrain:
            stage = f"retrain/{name}"
            done = on_first((self.folder / f"{stage}.json").exists)
            kept = None if done else masks()
            params = None if done else jp.masks.apply(watched.params, kept)

            def sample(params: Any) -> dict[str, Any]:
                text = self._sample(f"{label}, retrained", params) if shown else None
                return {"sample": text}

            retrained = self._retrained(stage, params, kept, sample)
            samples += [retrained["sample"]] if shown else []
        return {
            "criterion": criterion,
            "scope": scope,
            "sparsity": sparsity,
            "achieved": pruned["achieved"],
            "loss_pruned": pruned["loss_pruned"],
            "loss_retrained": retrained["loss"],
            "sparsity_by_leaf": pruned["sparsity_by_leaf"],
        }

    def _sample(self, label: str, params: Any) -> dict[str, Any]:
        """A text that the model writes, begun with the first validation words."""
        prompt = self.corpus.validation[: self.model.config.context // 4]
        written = self.model.sample(params, prompt, self.plan.sample_length)
        text = self.corpus.vocabulary.decode([*prompt, *written])
        return {"label": label, "text": text}

    def _curve(self) -> list[dict[str, Any]]:
        """Training and validation loss over the steps of the dense run."""
        return [
            {
                "step": line["step"],
                "loss": line.get("loss"),
                "validation_loss": line.get("validation_loss"),
            }
            for line in self._lines()
            if line.get("loss") is not None
        ]

    def _lines(self) -> list[dict[str, Any]]:
        def read() -> list[dict[str, Any]]:
            lines = map(json.loads, self.metrics.read_text().splitlines())
            return [
                x for x in lines if x["phase"] == "train" and x["seed"] == self.seed
            ]

        return on_first(read)

    def _weights(self, watched: Watched) -> dict[str, Any]:
        """How sampled weights moved, and which of them each criterion keeps."""
        sampled = _sampled_weights(watched.params, self.seed)
        rows = [line for line in self._lines() if "weights" in line]
        names = list(jp.tree.named_leaves(watched.params))
        kept = {}
        for criterion in self.plan.criteria:
            masks = jp.masks.make(
                CRITERIA[criterion](watched),
                self.plan.show_sparsity,
                scope=self.plan.scopes[0],
            )
            kept[criterion] = [bool(bit) for bit in _values(masks, sampled)]
        return {
            "steps": [row["step"] for row in rows],
            "names": [f"{names[leaf]}[{index}]" for leaf, index in sampled],
            "values": np.array([row["weights"] for row in rows]).T.tolist(),
            "averages": _values(watched.tracked.weight, sampled),
            "kept": kept,
            "sparsity": self.plan.show_sparsity,
        }


@functools.cache
def _watching(
    model: LanguageModel, learning_rate: float, steps: int
) -> tuple[optax.GradientTransformation, training.StepFunction]:
    """The optimizer of the dense run and its step; one object, so compiled once."""
    tx = optimizer(schedule(learning_rate, steps, warmup=100), track=True)
    return tx, training.make_step(model.loss, tx)


@functools.cache
def _retraining(
    model: LanguageModel, learning_rate: float, steps: int
) -> tuple[optax.GradientTransformation, training.StepFunction]:
    """The optimizer of every retraining and its step.

    The masks a step holds are those in its state, so one program serves every cell, and
    the control, whose masks keep everything.
    """
    tx = optimizer(schedule(learning_rate, steps, warmup=50), track=False)
    return tx, training.make_step(model.loss, jp.keep_masks(tx, {}))


def _sampled_weights(params: Any, seed: int) -> list[tuple[int, int]]:
    """(leaf, flat index) of some prunable weights, spread evenly over the leaves."""
    rng = np.random.default_rng(seed)
    named = jp.tree.named_leaves(params)
    prunable = [i for i, (n, x) in enumerate(named.items()) if jp.tree.prunable(n, x)]
    sizes = [leaf.size for leaf in named.values()]
    chosen = [prunable[n % len(prunable)] for n in range(WATCHED_WEIGHTS)]
    return [(leaf, int(rng.integers(sizes[leaf]))) for leaf in sorted(chosen)]


def _values(tree: Any, sampled: list[tuple[int, int]]) -> list[float]:
    """The sampled elements of a tree, fetched at once and nothing else."""
    picked = []
    for number, leaf in enumerate(jp.tree.named_leaves(tree).values()):
        indices = [index for owner, index in sampled if owner == number]
        if indices:
            picked.append(leaf[np.unravel_index(indices, leaf.shape)])
    return np.concatenate(layout.fetch(picked)).tolist()
