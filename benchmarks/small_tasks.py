"""Criteria and allocations on small networks of seven kinds.

    python -m benchmarks.small_tasks --out docs/results/small_tasks.csv

Each network is trained with SGD and with Adam, with normalisation and without, for
three seeds. Every criterion scores the same trained weights; each allocation prunes
them; each pruned model is measured as it is and after retraining. Training is one
program and so is all that follows it, a cell after the other. Rows are appended to the
file network by network, and those that it has are not made again. At the end, the
tables of the file.
"""

import csv
import dataclasses
import io
import itertools
import time
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

import jaxprune as jp
from benchmarks import measure, small_tables
from benchmarks.small_models import Task, loss_and_accuracy, make_task
from jaxprune.files import atomic

NetworkName = Literal["mlp", "cnn", "vit", "gpt", "masked", "lstm", "regression"]
CRITERIA = (
    "magnitude",
    "averaged_weight",
    "preconditioned_magnitude",
    "obd",
    "taylor",
)
ALLOCATIONS: tuple[Literal["layer", "global", "erk"], ...] = ("layer", "global", "erk")
# Blocks of attention have norms in practice; there is no variant without.
_ALWAYS_NORMALISED = ("vit", "gpt", "masked")


@dataclasses.dataclass(frozen=True)
class Config:
    """Trains, prunes, retrains; appends to a file.

    Attributes:
      out: CSV file of the rows.
      networks: which networks.
      optimizers: which optimizers.
      sparsities: shares to remove.
      seeds: number of seeds, of initialisation and batches.
      steps: number of steps of training.
      retraining: number of steps after pruning.
    """

    out: Path = Path("docs/results/small_tasks.csv")
    networks: tuple[NetworkName, ...] = (
        "mlp",
        "cnn",
        "gpt",
        "regression",
        "vit",
        "lstm",
        "masked",
    )
    optimizers: tuple[Literal["adam", "sgd"], ...] = ("adam", "sgd")
    sparsities: tuple[float, ...] = (0.8, 0.9, 0.95)
    seeds: int = 3
    steps: int = 400
    retraining: int = 100


class Variant(NamedTuple):
    """A network as it is trained."""

    network: str
    optimizer: str
    norm: bool


class Trained(NamedTuple):
    """What training leaves; every leaf is (seeds, ...)."""

    params: Any
    scores: dict[str, Any]
    dense: tuple[jax.Array, jax.Array]


def main(config: Config) -> None:
    """Makes the rows that are missing and prints the tables."""
    decisive = ("sparsities", "seeds", "steps", "retraining")
    measure.begin(config.out, config, *decisive)
    done = {
        (row["network"], row["optimizer"], row["norm"] == "True")
        for row in small_tables.read(config.out)
    }
    variants = [
        Variant(network, optimizer, norm)
        for network in config.networks
        for optimizer in config.optimizers
        for norm in ((True,) if network in _ALWAYS_NORMALISED else (False, True))
    ]
    missing = [variant for variant in variants if variant not in done]
    for variant in measure.progress(missing, "small tasks", "network"):
        start = time.process_time()
        rows = make_rows(config, variant)
        _append(config.out, rows)
        print(f"{variant}: {time.process_time() - start:.0f} processor seconds")
    rows = small_tables.read(config.out)
    print(small_tables.tables(rows))


def make_rows(config: Config, variant: Variant) -> list[dict[str, Any]]:
    """The rows of one network, a row a cell."""
    task = make_task(variant.network, norm=variant.norm)
    keys = jax.random.split(jax.random.key(0), config.seeds)
    # A map and not a vmap: over kernels, that would be a grouped convolution, which is
    # slow on CPUs.
    trained = jax.jit(
        lambda keys: jax.lax.map(lambda key: _train(config, variant, task, key), keys)
    )(keys)
    cells = list(
        itertools.product(CRITERIA, ALLOCATIONS, config.sparsities, range(config.seeds))
    )
    # Called by hand: `make` compiles a few programs a shape, for all cells together.
    masks = [
        _masks(trained, criterion, allocation, sparsity, seed)
        for criterion, allocation, sparsity, seed in cells
    ]
    seeds = jnp.array([seed for *_, seed in cells])
    # (cells, ...) a leaf, in one program with what trains and measures
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *masks)
    run = jax.jit(
        lambda cells: jax.lax.map(
            lambda cell: _pruned(config, variant, task, trained.params, *cell), cells
        )
    )
    results = jax.device_get(run((stacked, seeds)))
    dense_loss, dense_accuracy = map(np.asarray, trained.dense)
    return [
        {
            **variant._asdict(),
            "seed": seed,
            "criterion": criterion,
            "allocation": allocation,
            "sparsity": sparsity,
            "dense_loss": dense_loss[seed],
            "dense_accuracy": dense_accuracy[seed],
            **{name: values[number] for name, values in results.items()},
        }
        for number, (criterion, allocation, sparsity, seed) in enumerate(cells)
    ]


def _optimizer(
    task: Task, variant: Variant, steps: int, share: float
) -> optax.GradientTransformation:
    """The optimizer of a network at a share of its peak rate, along a cosine."""
    peak = task.rates[variant.optimizer] * share
    rate = optax.warmup_cosine_decay_schedule(0.0, peak, steps // 10, steps)
    # No weight decay: it would decide how much smaller weights tell.
    if variant.optimizer == "adam":
        return optax.adam(rate)
    return optax.sgd(rate, momentum=0.9)


def _fit(task: Task, tx: Any, params: Any, key: jax.Array, steps: int) -> Any:
    """Parameters and state after so many steps."""
    inputs, targets = (jnp.asarray(part) for part in task.train)

    def step(carry: Any, step_key: jax.Array) -> Any:
        params, state = carry
        examples = jax.random.randint(step_key, (task.batch,), 0, len(inputs))
        gradients = jax.grad(lambda p: loss_and_accuracy(task, p, batch)[0])
        batch = inputs[examples], targets[examples]
        updates, state = tx.update(gradients(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    keys = jax.random.split(key, steps)
    return jax.lax.scan(step, (params, tx.init(params)), keys)[0]


def _train(config: Config, variant: Variant, task: Task, key: jax.Array) -> Trained:
    """One training, from which every criterion has what it reads."""
    # Squares are tracked with Adam too, so that SGD and Adam have the same statistics.
    tx = optax.chain(
        jp.track_gradients(average=("square", "taylor")),
        _optimizer(task, variant, config.steps, 1.0),
        jp.track_importance(),
    )
    init_key, step_key = jax.random.split(key)
    params, state = _fit(task, tx, task.init(init_key), step_key, config.steps)
    scores = {name: getattr(jp.scores, name)(params, state) for name in CRITERIA}
    return Trained(params, scores, _measured(task, params, task.held_out))


def _masks(
    trained: Trained, criterion: str, allocation: Any, sparsity: float, seed: int
) -> Any:
    """The masks of one cell, of NumPy: all cells go into one program."""
    scores = jax.tree.map(lambda leaf: leaf[seed], trained.scores[criterion])
    masks = jp.masks.make(scores, sparsity, allocation=allocation)
    return jax.device_get(masks)


def _measured(task: Task, params: Any, data: Any) -> tuple[jax.Array, jax.Array]:
    return loss_and_accuracy(task, params, tuple(map(jnp.asarray, data)))


def _pruned(
    config: Config, variant: Variant, task: Task, all_params: Any, masks: Any, seed: Any
) -> dict[str, jax.Array]:
    """A pruned model, as it is and retrained."""
    params = jp.masks.apply(jax.tree.map(lambda leaf: leaf[seed], all_params), masks)
    # What an allocation may be chosen by: some of the training data.
    few = tuple(part[:256] for part in task.train)
    tx = jp.keep_masks(_optimizer(task, variant, config.retraining, 0.3), masks)
    # The same batches for all cells of a seed: what differs is the mask alone.
    key = jax.random.fold_in(jax.random.key(1), seed)
    retrained, _ = _fit(task, tx, params, key, config.retraining)
    loss, accuracy = _measured(task, params, task.held_out)
    retrained_loss, retrained_accuracy = _measured(task, retrained, task.held_out)
    return {
        "calibration_loss": _measured(task, params, few)[0],
        "loss": loss,
        "accuracy": accuracy,
        "retrained_loss": retrained_loss,
        "retrained_accuracy": retrained_accuracy,
    }


def _append(path: Path, rows: list[dict[str, Any]]) -> None:
    """Adds a network's rows to a file, which begins with their names: all or none."""
    before = path.read_bytes() if path.exists() else b""
    added = io.StringIO()
    writer = csv.DictWriter(added, list(rows[0]), lineterminator="\n")
    if not before:
        writer.writeheader()
    for row in rows:
        writer.writerow(
            {
                name: f"{value:.5g}" if isinstance(value, np.floating) else value
                for name, value in row.items()
            }
        )
    # Rows of a part of a network would be taken for all of it.
    atomic.replace(path, before + added.getvalue().encode())


if __name__ == "__main__":
    main(tyro.cli(Config))
