"""A tiny GPT trained with tracking, pruned and retrained, all within seconds."""

import collections
import hashlib
from typing import NamedTuple

import jax
import numpy as np

import jaxprune as jp
from experiments import gpt
from experiments.datasets import Batches, validation_batches
from experiments.harness import training
from experiments.harness.optimizer import EVERYTHING, optimizer
from experiments.tasks.language_model import LanguageModel
from jaxprune.arrays import processes

MODEL = LanguageModel(
    gpt.GPTConfig(vocab_size=16, context=8, layers=1, heads=2, width=16)
)
TOKENS = (np.arange(2000) * np.arange(2000) // 7 % 16).astype(np.int32)
BATCHES = Batches(TOKENS, batch_size=8, context=8, seed=0)
WINDOWS = validation_batches(TOKENS[:500], 16, 8)
STEPS, RETRAIN, SPARSITY = 6, 4, 0.6
WATCHED = optimizer(3e-3, track=EVERYTHING)
HELD = optimizer(1e-3, track=())

traces = collections.Counter()
"""How often each step was traced."""


def counted(name, step):
    def counting(*arguments):
        traces[name] += 1
        return step(*arguments)

    return counting


WATCHED_STEP = counted("watched", training.make_step(MODEL.loss, WATCHED))
HELD_STEP = counted("held", training.make_step(MODEL.loss, jp.keep_masks(HELD, {})))


_initial = jax.jit(lambda: MODEL.init(0))


def start(mesh):
    """The state before the first step."""
    params = jax.device_get(_initial())
    if mesh is None:
        params = jax.device_put(params)  # on a mesh `init` places them, by no program
    return training.init(params, WATCHED, mesh=mesh)


@jax.jit
def pruned(params, importance):
    """The masks by the preconditioned magnitude, and the parameters that they leave."""
    scores = jp.scores.preconditioned_magnitude(params, importance)
    masks = jp.masks.make(scores, SPARSITY, allocation="global")
    return masks, jp.masks.apply(params, masks)


class Result(NamedTuple):
    """What a run ends with: losses in order, and the states that they are of."""

    losses: list
    trained: training.TrainState
    importance: jp.Importance
    masks: dict
    retrained: training.TrainState


def fit(state, step_fn, mesh, steps, losses, batches=BATCHES, directory=None):
    checkpoints = directory and training.Checkpoints(directory, {}, every=2)
    return training.train(
        state,
        step_fn,
        batches,
        steps=steps,
        key=jax.random.key(0),
        checkpoints=checkpoints,
        reports=training.Reports(lambda m: losses.append(m["loss"]), every=1),
        mesh=mesh,
    )


def run(
    mesh,
    folder=None,
    *,
    batches=BATCHES,
    before_prune=lambda: None,
    retrain_batches=BATCHES,
):
    """Trains, prunes and retrains on a mesh, checkpoints in the folder."""
    losses = []
    evaluate = training.make_eval(MODEL.token_losses, mesh=mesh)
    state = start(mesh)
    named = {} if folder is None else {"directory": folder / "train"}
    trained = fit(state, WATCHED_STEP, mesh, STEPS, losses, batches, **named)
    losses.append(evaluate(trained.params, WINDOWS))
    importance = jp.get_importance(trained.opt_state)
    before_prune()
    masks, params = pruned(trained.params, importance)
    losses.append(evaluate(params, WINDOWS))
    state = training.init(params, jp.keep_masks(HELD, masks), mesh=mesh)
    named = {} if folder is None else {"directory": folder / "retrain"}
    retrained = fit(state, HELD_STEP, mesh, RETRAIN, losses, retrain_batches, **named)
    losses.append(evaluate(retrained.params, WINDOWS))
    return Result(losses, trained, importance, masks, retrained)


def digest(tree):
    """Of every leaf's name, kind and bytes."""
    seen = hashlib.sha256()
    for name, leaf in jp.tree.named_leaves(tree).items():
        if not jp.tree.is_excluded(leaf):
            value = processes.fetch(leaf)
            seen.update(f"{name} {value.dtype} {value.shape}".encode())
            seen.update(np.ascontiguousarray(value).tobytes())
    return seen.hexdigest()
