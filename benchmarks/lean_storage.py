"""Averages in two bytes or one rank the weights as float32 does.

Trains a GPT from nothing with all storages watching the same run, then ranks, masks
and prunes by each, and compares with float32.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import tyro
from scipy import stats

import jaxprune as jp
from benchmarks import measure
from experiments import gpt
from experiments.datasets import Batches, load, prefetch, validation_batches
from experiments.harness import training
from experiments.harness.optimizer import optimizer, schedule
from experiments.tasks.language_model import LanguageModel
from jaxprune.arrays import low_bit

SPARSITIES = (0.5, 0.8, 0.9)
CRITERIA = {
    "averaged_weight": jp.scores.averaged_weight,
    "preconditioned_magnitude": jp.scores.preconditioned_magnitude,
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Compares the storages of the averages on a GPT that is really trained.

    Attributes:
      preset: the GPT's size, "cpu" or "medium".
      steps: updates.
      batch_size: sequences in a batch.
      every: updates between snapshots.
      seeds: one training run each.
      data: name of the data set.
      data_dir: where data sets are prepared; TFDS's own place by default.
    """

    preset: str = "cpu"
    steps: int = 2000
    batch_size: int = 12
    every: int = 1
    seeds: tuple[int, ...] = (0, 1, 2)
    data: str = "shakespeare_plays"
    data_dir: Path | None = None


def main(config: Config) -> None:
    """Prints the comparison as one JSON line, each number with one value a seed."""
    runs = [_run(config, seed) for seed in config.seeds]
    measure.report(
        "lean_storage",
        config=dataclasses.asdict(config) | {"data_dir": None},
        bytes_per_weight=runs[0]["bytes_per_weight"],
        dense=[run["dense"] for run in runs],
        rows={
            row: {key: [run["rows"][row][key] for run in runs] for key in numbers}
            for row, numbers in runs[0]["rows"].items()
        },
    )


def _run(config: Config, seed: int) -> dict[str, Any]:
    """Trains once and compares; losses are nats a token on the full validation set."""
    corpus = load(config.data, data_dir=config.data_dir)
    shape = gpt.GPTConfig(
        vocab_size=len(corpus.vocabulary), **gpt.PRESETS[config.preset]
    )
    model = LanguageModel(shape)
    # All storages see the very same gradients and weights, which separate runs would
    # not.
    tx = _watched_by_all(config)
    state = training.train(
        training.init(model.init(seed), tx),
        training.make_step(model.loss, tx),
        Batches(corpus.train, config.batch_size, shape.context, seed),
        steps=config.steps,
        key=jax.random.key(seed),
        reports=training.Reports(label=f"seed {seed}"),
        prefetch=prefetch,
    )
    windows = validation_batches(corpus.validation, 64, shape.context, None)
    evaluate = training.make_eval(model.token_losses)

    def loss(params: Any) -> float:
        return evaluate(params, windows)

    importances = _importances(state.opt_state)
    rows: dict[str, Any] = {}
    for criterion, score in CRITERIA.items():
        # What the others are compared with.
        exact = score(state.params, importances["float32"])
        for name in low_bit.STORAGES:
            rows[f"{criterion} {name}"] = _compare(
                state.params, exact, score(state.params, importances[name]), loss
            )
    count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    bytes_a_weight = {
        name: _bytes(importances[name].weight) / count for name in low_bit.STORAGES
    }
    return {
        "dense": loss(state.params),
        "rows": rows,
        "bytes_per_weight": bytes_a_weight,
    }


def _importances(opt_state: Any) -> dict[str, jp.Importance]:
    """What each storage has averaged of the same run, by its name."""
    # Trackers of gradients begin the chain, those of weights end it in reverse order.
    return {
        name: jp.Importance(
            weight=jp.get_importance(opt_state[-1 - number]).weight,
            square=jp.get_importance(opt_state[number]).square,
        )
        for number, name in enumerate(low_bit.STORAGES)
    }


def _watched_by_all(config: Config) -> optax.GradientTransformation:
    """Gradients in front, weights behind; the storages of the latter in reverse."""
    every = config.every
    gradients = [jp.track_gradients(storage=s, every=every) for s in low_bit.STORAGES]
    weights = [jp.track_importance(storage=s, every=every) for s in low_bit.STORAGES]
    adamw = optimizer(schedule(1e-3, config.steps, warmup=100), track=())
    return optax.chain(*gradients, adamw, *reversed(weights))


def _compare(params: Any, exact: Any, scores: Any, loss: Any) -> dict[str, float]:
    """Rank correlation, agreement of global masks, loss of the pruned model."""
    # Over all weights: masks are of ranks alone.
    numbers = {"rank_correlation": stats.spearmanr(_flat(exact), _flat(scores))[0]}
    for sparsity in SPARSITIES:
        expected = jp.masks.make(exact, sparsity, allocation="global")
        masks = jp.masks.make(scores, sparsity, allocation="global")
        percent = f"{100 * sparsity:g}"
        numbers[f"agreement_{percent}"] = np.mean(_flat(expected) == _flat(masks))
        numbers[f"loss_{percent}"] = loss(jp.masks.apply(params, masks))
    return {key: float(value) for key, value in numbers.items()}


def _flat(tree: Any) -> np.ndarray:
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def _bytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


if __name__ == "__main__":
    main(tyro.cli(Config))
