"""A short training of a model that was pruned or made smaller, its zeros held.

Training uses AdamW with optax's default weight decay, clips gradients to a global norm
of 1, and lets the learning rate fall to zero along a cosine. A seed draws the order of
the texts' sequences. Trained leaves are held in float32; other leaves stay as they are.
The loss is that of the text, or of a teacher (`distill.from_teacher`).
"""

import dataclasses
import functools
from collections.abc import Callable, Set
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Int

from jaxprune.arrays import placement, tree
from jaxprune.arrays.messages import listed
from jaxprune.contrib.lora import lora
from jaxprune.lm.models.decoder.model import Decoder, loss_per_token
from jaxprune.lm.recovery.checkpoints import Checkpoints
from jaxprune.posttraining import fingerprint
from jaxprune.training.keep_masks import keep_masks

_CLIP = 1.0


class Loss(NamedTuple):
    """What is made small.

    Attributes:
      name: tells it from others.
      of: the model, `arrays` and tokens (batch, length) to a scalar.
      arrays: what it reads besides, handed to the compiled step.
    """

    name: str
    of: Callable[[Decoder, Any, jax.Array], jax.Array]
    arrays: Any = None


def from_text() -> Loss:
    """The cross entropy of the text's own tokens."""

    def of(model: Decoder, _: Any, tokens: jax.Array) -> jax.Array:
        return loss_per_token(model, tokens[:, :-1], tokens[:, 1:]).mean()

    return Loss("text", of)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How a model is trained.

    Attributes:
      steps: how many.
      learning_rate: of the first step.
      batch: sequences of a step.
      seed: decides the order of the sequences.
      rank: of the change of each matrix (`jp.contrib.lora`); vectors then stay as
        they are. None trains the leaves themselves.
    """

    steps: int
    learning_rate: float
    batch: int = 4
    seed: int = 0
    rank: int | None = None


def retrain(
    model: Decoder,
    names: Set[str],
    sequences: Int[np.ndarray, "sequences length"],
    settings: Settings,
    *,
    loss: Loss | None = None,
    masked: Set[str] | None = None,
    directory: Path | None = None,
    tick: Callable[[int, float], Any] = lambda steps, loss: None,
) -> tuple[Decoder, list[float]]:
    """Trains some of a model's leaves, pruned ones under the masks of their zeros.

    Args:
      model: all its parameters in memory; it is not changed.
      names: of the leaves that are trained, as `tree.names` of its parameters.
      sequences: int32 (sequences, length).
      settings: steps, learning rate and the like.
      loss: `from_text()` if left out.
      masked: those whose zeros stay zeros; all that are trained if left out.
      directory: where a run that is killed finds how far it was, and goes on to the
        same bits.
      tick: called with how many steps were done and the loss of the last.

    Returns:
      A model with the new parameters, in their dtypes, and each step's loss.

    Raises:
      ValueError: a name is of no leaf, there is nothing to train or to train on, the
        loss is not finite, or the directory is another job's.
    """
    if min(settings.steps, settings.batch, len(sequences)) < 1:
        raise ValueError(
            "retrain needs at least one step, a batch of one and one sequence, got "
            f"{settings.steps}, {settings.batch} and {len(sequences)}"
        )
    if loss is None and sequences.shape[1] < 2:
        raise ValueError(
            "retrain needs sequences of at least 2 tokens, since the first is only "
            f"seen, got {sequences.shape[1]}; give longer ones"
        )
    loss = from_text() if loss is None else loss
    held = names if masked is None else names & masked
    trained, frozen, whole = _parted(model, names)
    optimizer = _optimizer(settings)

    @jax.jit  # masks are made in the state, and nowhere else
    def begun(trained: dict[str, jax.Array]) -> Any:
        masks = {
            name: leaf != 0 if name in held else optax.MaskedNode()
            for name, leaf in trained.items()
        }
        return keep_masks(optimizer, masks).init(trained)

    step = _step(loss, whole, keep_masks(optimizer, {}))
    kept = None
    if directory is not None:
        facts = {
            **dataclasses.asdict(settings),
            "loss": loss.name,
            "trained": sorted(names),
            "masked": sorted(held),
            "start": fingerprint.of_arrays([trained, frozen, loss.arrays, sequences]),
        }
        kept = Checkpoints(directory, facts)
    state = (trained, begun(trained))
    losses: list[float] = []
    if kept is not None:
        done, state, before = kept.last(state)
        losses += before or []
        if done:
            tick(done, losses[-1])
    state = placement.committed(state)
    for rows in _order(len(sequences), settings)[len(losses) :]:
        *state, found = step(*state, frozen, loss.arrays, sequences[rows])
        losses.append(float(found))
        if not np.isfinite(losses[-1]):
            raise ValueError(
                f"the loss of retraining must be finite, got {losses[-1]} at step "
                f"{len(losses)}; lower the learning rate"
            )
        if kept is not None and kept.due():
            kept.write(len(losses), tuple(state), losses)
        tick(1, losses[-1])
    return whole(state[0], frozen), losses


def _parted(
    model: Decoder, names: Set[str]
) -> tuple[dict[str, jax.Array], dict[str, jax.Array], Callable[..., Decoder]]:
    """The leaves that are trained, in float32, the others, and what joins them."""
    graphdef, params = nnx.split(model)
    named = tree.named_leaves(params)
    if (unknown := names - named.keys()) or not names:
        raise ValueError(
            "retrain needs names of the model's leaves, got "
            f"{listed(sorted(unknown)) or 'none'}; jp.tree.names lists them"
        )
    structure = jax.tree.structure(params)
    dtypes = {name: leaf.dtype for name, leaf in named.items()}
    # Copies: a step gives up the arrays that it is given.
    trained = {
        n: jnp.array(leaf, np.float32) for n, leaf in named.items() if n in names
    }
    frozen = {n: x for n, x in named.items() if n not in names}

    def whole(trained: Any, frozen: Any) -> Decoder:
        own = {name: jnp.asarray(leaf, dtypes[name]) for name, leaf in trained.items()}
        leaves = [(frozen | own)[name] for name in dtypes]
        return nnx.merge(graphdef, jax.tree.unflatten(structure, leaves))

    return trained, frozen, whole


def _optimizer(settings: Settings) -> optax.GradientTransformation:
    rate = optax.cosine_decay_schedule(settings.learning_rate, settings.steps)
    optimizer = optax.chain(optax.clip_by_global_norm(_CLIP), optax.adamw(rate))
    if settings.rank is None:
        return optimizer
    return lora(
        optimizer,
        settings.rank,
        targets=lambda name, leaf: leaf.ndim > 1,
        seed=settings.seed,
    )


def _step(
    loss: Loss, whole: Callable[..., Decoder], tx: optax.GradientTransformation
) -> Any:
    """A compiled step: trained leaves, state, the rest and tokens to the next."""

    def value(trained: Any, frozen: Any, arrays: Any, tokens: jax.Array) -> jax.Array:
        return loss.of(whole(trained, frozen), arrays, tokens)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(
        trained: Any,
        state: Any,
        frozen: Any,
        arrays: Any,
        tokens: Int[jax.Array, "batch length"],
    ) -> tuple[Any, Any, jax.Array]:
        found, gradient = jax.value_and_grad(value)(trained, frozen, arrays, tokens)
        updates, state = tx.update(gradient, state, trained)
        return optax.apply_updates(trained, updates), state, found

    return step


def _order(sequences: int, settings: Settings) -> list[np.ndarray]:
    """Rows of each step; each sequence comes once before any comes twice."""
    chance = np.random.default_rng(settings.seed)
    needed = settings.batch * settings.steps
    rounds = -(-needed // sequences)
    rows = np.concatenate([chance.permutation(sequences) for _ in range(rounds)])
    return np.split(rows[:needed], settings.steps)
