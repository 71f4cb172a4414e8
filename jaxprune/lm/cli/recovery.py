"""Recovery of a pruned or smaller model: training on a text, or distillation."""

from collections.abc import Callable, Set
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxprune import leaves
from jaxprune.arrays import tree
from jaxprune.arrays.console_progress import Progress
from jaxprune.lm.cli import models
from jaxprune.lm.cli.job_options import JobOptions, Recovery, Trained
from jaxprune.lm.models.decoder.model import Decoder
from jaxprune.lm.recovery import distill, retrain

_RANK = 16  # of "lora"


def recover(
    job: JobOptions,
    recovery: Recovery,
    sequences: np.ndarray,
    model: models.Model,
    teacher: Callable[[], Decoder],
    matrices: Set[str],
) -> tuple[models.Model, set[str], dict[str, Any]]:
    """The model after some steps, which leaves moved, and what the record says.

    The zeros of matrices stay, of those too that were pruned before this job.

    Args:
      job: its batch, seed and place of progress count.
      recovery: how long and how.
      sequences: int32 (sequences, length).
      model: what is trained.
      teacher: gives the model before; called by a distillation alone.
      matrices: the leaves that "matrices" and "lora" mean.

    Returns:
      The model, the names of the leaves that moved, and a JSON-able record.
    """
    names = _trained(model, recovery.trained, matrices)
    lora = recovery.trained == "lora"
    settings = retrain.Settings(
        steps=recovery.steps,
        learning_rate=recovery.learning_rate,
        batch=job.batch,
        seed=job.seed,
        rank=_RANK if lora else None,
    )
    distils = recovery.kind == "distillation"
    doing = "distilling" if distils else "retraining"
    with Progress(recovery.steps, doing, unit="step", leave=False) as progress:

        def tick(steps: int, loss: float) -> None:
            progress.note(f"loss {loss:.3f}")
            progress.update(steps)

        decoder, losses = retrain.retrain(
            model.decoder(),
            names,
            sequences,
            settings,
            loss=distill.from_teacher(teacher(), hidden=recovery.hidden)
            if distils
            else None,
            masked=_sparse(model),
            directory=job.work / recovery.kind,
            progress=tick,
        )
    record = {
        "steps": recovery.steps,
        "learning_rate": recovery.learning_rate,
        "batch": job.batch,
        "trained": recovery.trained,
        "texts": [path.name for path in recovery.texts],
        "losses": losses,
    }
    if recovery.hidden:
        record["hidden"] = recovery.hidden
    params = nnx.state(decoder, nnx.Param)
    return rounded(model._replace(params=params), names), names, record


def _sparse(model: models.Model) -> set[str]:
    """The matrices that have zeros."""
    named = tree.named_leaves(model.params)
    return {
        n for n, leaf in named.items() if leaves.prunable(n, leaf) and (leaf == 0).any()
    }


def _trained(model: models.Model, trained: Trained, matrices: Set[str]) -> set[str]:
    named = tree.named_leaves(model.params)
    if trained == "all":
        return set(named)
    if trained == "norms":
        # By name, since norms of heads and biases of experts have two axes.
        return {name for name in named if name.rsplit("/", 1)[-1] in ("scale", "bias")}
    return set(matrices)


def rounded(model: models.Model, leaves: Set[str]) -> models.Model:
    """The model as it will be written: these leaves as their tensors hold them."""

    def leaf(name: str, value: jax.Array) -> jax.Array:
        stored = model.names[name].dtype
        if name not in leaves or stored == value.dtype:
            return value
        return value.astype(stored).astype(value.dtype)

    named = tree.named_leaves(model.params)
    values = [leaf(name, value) for name, value in named.items()]
    structure = jax.tree.structure(model.params)
    return model._replace(params=jax.tree.unflatten(structure, values))
