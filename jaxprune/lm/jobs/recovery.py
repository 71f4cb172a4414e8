"""Recovery of a pruned or smaller model: training on a text, or distillation."""

import dataclasses
import functools
import math
from collections.abc import Callable, Set
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float, Int

from jaxprune import leaves
from jaxprune.arrays import tree
from jaxprune.arrays.console_progress import Progress
from jaxprune.lm.jobs.recovery_settings import Recovery
from jaxprune.lm.jobs.settings import SELF, Calibration
from jaxprune.lm.models import hf
from jaxprune.lm.models.decoder.config import DecoderConfig
from jaxprune.lm.models.decoder.model import Decoder
from jaxprune.lm.models.loaded_model import LoadedModel
from jaxprune.lm.recovery import distill, predictions, retrain, sampled_tokens
from jaxprune.lm.recovery.sampled_tokens import TokenSampler

_RANK = 16  # of "lora"


def recover(
    recovery: Recovery,
    calibration: Calibration,
    sequences: Int[np.ndarray, "sequences length"],
    *,
    model: LoadedModel,
    teacher: Callable[[], Decoder],
    matrices: Set[str],
    work: Path,
    written: Int[np.ndarray, "written length"] | None = None,
) -> tuple[LoadedModel, set[str], dict[str, Any]]:
    """The model after some steps, which leaves moved, and what the record says.

    The zeros of matrices stay, of those too that were pruned before this job.

    Args:
      recovery: steps, learning rate, loss and which leaves are trained.
      calibration: settings whose batch and seed count.
      sequences: int32 tokens of texts that are trained on.
      model: model that is trained.
      teacher: function that gives the model to follow; called by a distillation alone.
      matrices: names of the leaves that "matrices" and "lora" mean.
      work: directory of the recovery's progress.
      written: int32 tokens that the model before wrote itself, if it did.

    Returns:
      The model, the names of the leaves that moved, and a JSON-able record.
    """
    names = _trained_leaves(model, recovery, matrices)
    sequences, shares = _sequences_and_shares(recovery, sequences, written)
    of_tokens = functools.partial(
        _sampler, model.config, names, recovery, calibration, sequences
    )
    loss, sampler = _loss(
        recovery, calibration, sequences, shares, of_tokens, teacher, work
    )
    settings = retrain.Settings(
        steps=recovery.steps,
        learning_rate=recovery.learning_rate,
        relative=recovery.relative,
        batch=recovery.batch(calibration),
        seed=calibration.seed,
        rank=_RANK if recovery.trained == "lora" else None,
    )
    title = {"distillation": "distilling", "retraining": "retraining"}
    with Progress(
        settings.steps, title[recovery.recover_by], unit="step", leave=False
    ) as progress:

        def tick(steps: int, loss: float) -> None:
            progress.note(f"loss {loss:.3f}")
            progress.update(steps)

        decoder, losses = retrain.retrain(
            model.decoder(),
            names,
            sequences,
            settings,
            loss=loss,
            masked=_sparse_leaves(model),  # zeros of an earlier job stay too
            directory=work / recovery.recover_by,
            progress=tick,
        )
    params = nnx.state(decoder, nnx.Param)
    record = _record(recovery, calibration, losses)
    if sampler is not None:
        record["logits"] = sampler.size
    return as_stored(model._replace(params=params), names), names, record


def _sequences_and_shares(
    recovery: Recovery,
    sequences: Int[np.ndarray, "sequences length"],
    written: Int[np.ndarray, "written length"] | None,
) -> tuple[Int[np.ndarray, "all length"], Float[np.ndarray, "all"]]:
    """All that is trained on, and how much of each sequence's loss is its text."""
    shares = np.full(len(sequences), recovery.recover_text_share)
    if written is None or not recovery.own_text:
        return sequences, shares
    number = math.ceil(len(sequences) / len(recovery.trained_files))
    repeated = np.resize(written, (number, written.shape[1]))  # as many as a text has
    # To learn what the model wrote itself would sharpen what it predicts.
    shares = np.concatenate([shares, np.zeros(number)])
    return np.concatenate([sequences, repeated]), shares


def _loss(
    recovery: Recovery,
    calibration: Calibration,
    sequences: Int[np.ndarray, "sequences length"],
    shares: Float[np.ndarray, "sequences"],
    of_tokens: Callable[..., TokenSampler | None],
    teacher: Callable[[], Decoder],
    work: Path,
) -> tuple[retrain.Loss, TokenSampler | None]:
    """What is made small, and what draws the tokens of a step; None for all.

    The teacher is let go where its predictions are kept.
    """
    if recovery.recover_by == "retraining":
        sampler = of_tokens()
        return retrain.from_text(sampler), sampler
    if not recovery.top:
        return distill.from_teacher(teacher(), hidden=recovery.recover_hidden), None
    shown = Progress(len(sequences), "predicting", unit="sequence", leave=False)
    with shown as progress:
        kept = predictions.keep_predictions(
            teacher(),
            sequences,
            work / "predictions",
            top=recovery.top,
            batch=calibration.batch,
            followed=shares < 1,
            progress=progress.update,
        )
    sampler = of_tokens(kept.likeliest)
    loss = predictions.from_predictions(kept, text=shares, sampler=sampler)
    return loss, sampler


def _sampler(
    config: DecoderConfig,
    names: Set[str],
    recovery: Recovery,
    calibration: Calibration,
    sequences: Int[np.ndarray, "sequences length"],
    likeliest: Callable[[int], np.ndarray] | None = None,
) -> TokenSampler | None:
    """What draws the tokens of a step; None where tokens are trained, or few."""
    fewer = dataclasses.replace(config, vocab_size=config.vocab_size - 1)
    if names & hf.changed_axes(config, fewer).keys():
        return None
    return sampled_tokens.sampler_of(
        config.vocab_size,
        sequences,
        likeliest,
        batch=recovery.batch(calibration),
        seed=calibration.seed,
    )


def _record(
    recovery: Recovery, calibration: Calibration, losses: list[float]
) -> dict[str, Any]:
    texts = [path.name for path in recovery.trained_files or calibration.files]
    record: dict[str, Any] = {
        "steps": recovery.steps,
        "learning_rate": recovery.learning_rate,
        "batch": recovery.batch(calibration),
        "trained": recovery.trained,
        "texts": [*texts, str(SELF)] if recovery.own_text else texts,
        "losses": losses,
    }
    if recovery.relative:
        record["relative"] = True
    if recovery.recover_hidden:  # the record has what was used
        record["hidden"] = recovery.recover_hidden
    if recovery.top:
        record["top"] = recovery.top
    if recovery.recover_teacher is not None:
        record["teacher"] = str(recovery.recover_teacher)
    if recovery.recover_text_share:
        record["text_share"] = recovery.recover_text_share
    return record


def _sparse_leaves(model: LoadedModel) -> set[str]:
    """The matrices that have zeros."""
    named = tree.named_leaves(model.params)
    return {
        n for n, leaf in named.items() if leaves.prunable(n, leaf) and (leaf == 0).any()
    }


def _trained_leaves(
    model: LoadedModel, recovery: Recovery, matrices: Set[str]
) -> set[str]:
    names = tree.names(model.params)
    if recovery.trained == "all":
        return set(names)
    if recovery.trained == "norms":
        # By name, since norms of heads and biases of experts have two axes.
        return {name for name in names if name.rsplit("/", 1)[-1] in ("scale", "bias")}
    return set(matrices)


def as_stored(model: LoadedModel, leaves: Set[str]) -> LoadedModel:
    """The model as it will be written: these leaves as their tensors hold them.

    Args:
      model: model with its parameters in memory.
      leaves: names of the leaves that are written anew.

    Returns:
      The model, in the dtypes of `model`.
    """

    def rounded(name: str, leaf: jax.Array) -> jax.Array:
        stored = model.names[name].dtype
        if name not in leaves or stored == leaf.dtype:
            return leaf
        # There and back: measured with the bits that the file has.
        return leaf.astype(stored).astype(leaf.dtype)

    named = tree.named_leaves(model.params)
    rounded_leaves = [rounded(name, leaf) for name, leaf in named.items()]
    structure = jax.tree.structure(model.params)
    return model._replace(params=jax.tree.unflatten(structure, rounded_leaves))
