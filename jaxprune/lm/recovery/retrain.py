"""A short training of a model that was pruned or made smaller, its zeros held.

Training uses AdamW with optax's default weight decay, clips gradients to a global norm
of 1; the learning rate rises along a line and then falls to zero along a cosine. A seed
draws the order of the texts' sequences. Trained leaves are held in float32; other
leaves stay as they are. The loss is that of the text, or of a teacher
(`distill.from_teacher`).
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Set
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Int

from jaxprune.arrays import compiling, placement, tree
from jaxprune.arrays.messages import listed
from jaxprune.contrib.lora import lora
from jaxprune.lm.models.decoder.model import Decoder, cross_entropy
from jaxprune.lm.recovery.checkpoints import Checkpoints
from jaxprune.lm.recovery.sampled_tokens import TokenSampler
from jaxprune.posttraining import fingerprint
from jaxprune.training.keep_masks import keep_masks

_CLIP = 1.0
_RISE = 20  # one step of so many lets the learning rate rise


class Loss(NamedTuple):
    """What is made small.

    Attributes:
      name: name that tells it from others.
      fn: function of the model, arrays and tokens (batch, length) to a scalar.
      arrays: arrays that it reads besides, handed to the compiled step.
      read: function of the numbers of a step's sequences to the arrays, where each
        sequence has arrays of its own, too many to be held; its `name` then tells
        them from others.
    """

    name: str
    fn: Callable[[Decoder, Any, jax.Array], jax.Array]
    arrays: Any = None
    read: Callable[[np.ndarray], Any] | None = None

    def arrays_of(self, rows: np.ndarray) -> Any:
        """The arrays for the sequences of these numbers, int (batch,)."""
        return self.arrays if self.read is None else self.read(rows)


def from_text(sampler: TokenSampler | None = None) -> Loss:
    """The cross entropy of the text's own tokens.

    Args:
      sampler: what draws the tokens of each step whose logits stand for all.

    Returns:
      The loss.
    """

    def loss(model: Decoder, sample: Any, tokens: jax.Array) -> jax.Array:
        # Activations of all layers would take more than the parameters.
        states, _ = model.states(model.embed(tokens[:, :-1]), remat=True)
        return cross_entropy(model, states, tokens[:, 1:], sample=sample).mean()

    if sampler is None:
        return Loss("text", loss)
    return Loss(f"text, {sampler.name}", loss, read=sampler.draw)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How a model is trained.

    Attributes:
      steps: number of steps.
      learning_rate: highest learning rate.
      relative: whether the rate of a leaf is so many times its root mean square.
      batch: number of sequences of a step.
      seed: rng seed of the order of the sequences.
      rank: rank of the change of each matrix (`jp.contrib.lora`); vectors then stay as
        they are. None trains the leaves themselves.
    """

    steps: int
    learning_rate: float
    relative: bool = False
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
    progress: Callable[[int, float], Any] = lambda steps, loss: None,
) -> tuple[Decoder, list[float]]:
    """Trains some of a model's leaves, pruned ones under the masks of their zeros.

    Args:
      model: model with all its parameters in memory; it is not changed.
      names: names of the leaves that are trained; `jp.tree.names` lists them.
      sequences: tokens, int32 (sequences, length).
      settings: number of steps, learning rate and the like.
      loss: loss that is made small; `from_text()` if left out.
      masked: names of those whose zeros stay zeros; all that are trained if left out.
      directory: directory in which a run that is killed finds how far it was, and goes
        on to the same bits.
      progress: function that is called with the number of steps that were done and the
        loss of the last.

    Returns:
      A model with the new parameters, in their dtypes, and each step's loss.

    Raises:
      ValueError: a name is of no leaf, there is nothing to train or to train on, the
        loss is not finite, or the directory is another job's.
    """
    length = sequences.shape[1]
    if not min(settings.steps, settings.batch, len(sequences)) >= 1:
        raise ValueError(
            "retrain needs at least one step, a batch of one and one sequence, got "
            f"{settings.steps}, {settings.batch} and {len(sequences)}"
        )
    if not length >= 2:
        raise ValueError(
            "retrain needs sequences of at least 2 tokens, since the first is only "
            f"seen, got {length}; give longer ones"
        )
    loss = from_text() if loss is None else loss
    masked = names if masked is None else names & masked
    trained, frozen, join = _split_leaves(model, names)
    optimizer = _optimizer(settings)
    step = _step(loss, join, keep_masks(optimizer, {}))
    state = (trained, _first_state(optimizer, trained, masked))
    checkpoints = None
    losses: list[float] = []
    if directory is not None:
        job = {
            **dataclasses.asdict(settings),
            "rise": _RISE,
            "loss": loss.name,
            "trained": sorted(names),
            "masked": sorted(masked),
            "start": fingerprint.of_arrays([trained, frozen, loss.arrays, sequences]),
        }
        checkpoints = Checkpoints(directory, job)
        done, state, losses_before = checkpoints.last(state)
        losses += losses_before or []
        if done:
            progress(done, losses[-1])
    state = placement.committed(state)  # else the first step is compiled twice
    for rows in _order(len(sequences), settings)[len(losses) :]:
        *state, value = step(*state, frozen, loss.arrays_of(rows), sequences[rows])
        losses.append(float(value))
        if not math.isfinite(losses[-1]):
            raise ValueError(
                f"the loss of retraining must be finite, got {losses[-1]} at step "
                f"{len(losses)}; lower the learning rate"
            )
        if checkpoints is not None and checkpoints.due():
            checkpoints.write(len(losses), tuple(state), losses)
        progress(1, losses[-1])
    return join(state[0], frozen), losses


def _first_state(
    optimizer: optax.GradientTransformation,
    trained: dict[str, jax.Array],
    masked: Set[str],
) -> Any:
    """The optimizer's state, which holds the masks of the leaves' zeros."""

    @jax.jit  # masks are made in the state, and nowhere else
    def init(trained: dict[str, jax.Array]) -> Any:
        masks = {
            name: leaf != 0 if name in masked else optax.MaskedNode()
            for name, leaf in trained.items()
        }
        return keep_masks(optimizer, masks).init(trained)

    return init(trained)


def _split_leaves(
    model: Decoder, names: Set[str]
) -> tuple[dict[str, jax.Array], dict[str, jax.Array], Callable[..., Decoder]]:
    """The leaves that are trained, in float32, the others, and what joins them."""
    graphdef, params = nnx.split(model)
    leaves = tree.named_leaves(params)
    if (unknown := names - leaves.keys()) or not names:
        raise ValueError(
            "retrain needs names of the model's leaves, got "
            f"{listed(sorted(unknown)) or 'none'}; jp.tree.names lists them"
        )
    structure = jax.tree.structure(params)  # of trained and frozen leaves together
    dtypes = {name: leaf.dtype for name, leaf in leaves.items()}
    # Copies: a step gives up the arrays that it is given.
    trained = {
        n: jnp.array(leaf, np.float32) for n, leaf in leaves.items() if n in names
    }
    frozen = {n: x for n, x in leaves.items() if n not in names}

    def join(trained: Any, frozen: Any) -> Decoder:
        stored = {n: jnp.asarray(leaf, dtypes[n]) for n, leaf in trained.items()}
        ordered = [(frozen | stored)[name] for name in dtypes]
        return nnx.merge(graphdef, jax.tree.unflatten(structure, ordered))

    return trained, frozen, join


def _optimizer(settings: Settings) -> optax.GradientTransformation:
    optimizer = optax.chain(
        optax.clip_by_global_norm(_CLIP),
        optax.adamw(_rate(settings)),
        # Weights of one family are five times as large as those of another.
        optax.scale_by_param_block_rms() if settings.relative else optax.identity(),
    )
    if settings.rank is None:
        return optimizer
    return lora(
        optimizer,
        settings.rank,
        targets=lambda name, leaf: leaf.ndim > 1,
        seed=settings.seed,
    )


def _rate(settings: Settings) -> optax.Schedule:
    """The learning rate by step.

    Adam's first steps change each weight by the whole rate, whatever its gradient: at
    full size they make a trained model worse than it was.
    """
    peak, rising = settings.learning_rate, settings.steps // _RISE
    return optax.warmup_cosine_decay_schedule(
        peak / (rising + 1), peak, rising, settings.steps
    )


def _step(
    loss: Loss, join: Callable[..., Decoder], tx: optax.GradientTransformation
) -> Any:
    """A compiled step: trained and frozen leaves, state and tokens to the next."""

    def value(trained: Any, frozen: Any, arrays: Any, tokens: jax.Array) -> jax.Array:
        return loss.fn(join(trained, frozen), arrays, tokens)

    options = compiling.leaf_by_leaf()

    # Donated: two copies of leaves and state would not fit where one does.
    @functools.partial(jax.jit, donate_argnums=(0, 1), compiler_options=options)
    def step(
        trained: Any,
        state: Any,
        frozen: Any,
        arrays: Any,
        tokens: Int[jax.Array, "batch length"],
    ) -> tuple[Any, Any, jax.Array]:
        scalar, gradient = jax.value_and_grad(value)(trained, frozen, arrays, tokens)
        updates, state = tx.update(gradient, state, trained)
        return optax.apply_updates(trained, updates), state, scalar

    return step


def _order(sequences: int, settings: Settings) -> list[np.ndarray]:
    """Rows of each step; each sequence comes once before any comes twice."""
    chance = np.random.default_rng(settings.seed)
    needed = settings.batch * settings.steps
    rounds = -(-needed // sequences)
    # (rounds * sequences,): a permutation after the other.
    rows = np.concatenate([chance.permutation(sequences) for _ in range(rounds)])
    return np.split(rows[:needed], settings.steps)
