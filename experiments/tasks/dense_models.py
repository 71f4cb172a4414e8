"""The dense models that `allocation_with_solvers` prunes: those of the main experiment.

Same data, batches, optimizer and steps as `experiments.scaled_down_llm`, so on the same
machine the same weights; the last checkpoint keeps the optimizer's state.
"""

import dataclasses
from pathlib import Path

import jax

import jaxprune as jp
from experiments.datasets import Batches, Corpus, prefetch
from experiments.harness import training
from experiments.harness.criteria import Watched
from experiments.harness.optimizer import ADAMW, EVERYTHING, optimizer, schedule
from experiments.tasks.language_model import LanguageModel


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How the dense models are trained.

    Attributes:
      steps: number of steps of training.
      batch_size: sequences in a batch.
      learning_rate: the peak.
    """

    steps: int
    batch_size: int
    learning_rate: float = 1e-3


RECIPES = {"cpu": Recipe(2000, 12), "medium": Recipe(900, 16)}
"""Those of the records of small and medium GPTs (docs/results.md), by preset."""


def trained(
    model: LanguageModel, corpus: Corpus, recipe: Recipe, seed: int, directory: Path
) -> Watched:
    """Trains a dense model, or what is left of it, and returns what was tracked.

    The directory is that of its checkpoints; a run found there continues.

    Raises:
      ValueError: the directory holds a run of another configuration.
      FloatingPointError: the loss is not finite.
    """
    # All averages are tracked, whatever a run asks for: its cells share this training.
    rate = schedule(recipe.learning_rate, recipe.steps, warmup=100)
    tx = optimizer(rate, track=EVERYTHING)
    context = model.config.context
    state = training.train(
        training.init(model.init(seed), tx),
        training.make_step(model.loss, tx),
        Batches(corpus.train, recipe.batch_size, context, seed),
        steps=recipe.steps,
        key=jax.random.key(seed),
        checkpoints=training.Checkpoints(
            directory,
            {
                **dataclasses.asdict(recipe),
                "model": dataclasses.asdict(model.config),
                "fingerprint": corpus.fingerprint,
                "seed": seed,
            },
        ),
        reports=training.Reports(label=f"seed {seed} train"),
        prefetch=prefetch,
    )
    tracked = jp.get_importance(state.opt_state)
    adam = jp.get_importance(state.opt_state[ADAMW])
    return Watched(
        state.params,
        tracked,
        tracked._replace(
            square=adam.square
        ),  # E[g^2] of Adam, for "preconditioned_adam"
        lambda: model.init(seed),
    )
