"""A short retraining of the pruned matrices, the zeros staying zeros.

Adam on the texts' sequences in an order drawn by a seed, its rate falling to zero along
a cosine. What is trained is held in float32; all else stays as it is.
"""

import functools
from collections.abc import Callable, Set
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Int

from jaxprune.arrays import tree
from jaxprune.models.decoder.model import Decoder, loss_per_token
from jaxprune.training.keep_masks import keep_masks

_CLIP = 1.0


def retrain(
    model: Decoder,
    names: Set[str],
    sequences: Int[np.ndarray, "sequences length"],
    *,
    batch: int = 4,
    steps: int,
    learning_rate: float,
    seed: int = 0,
    tick: Callable[[float], Any] = lambda loss: None,
) -> tuple[Decoder, list[float]]:
    """Retrains some of a model's leaves under the masks of their zeros.

    Args:
      model: all its parameters in memory; it is not changed.
      names: of the leaves that are trained, as `tree.names` of its parameters.
      sequences: int32 (sequences, length).
      batch: sequences of a step.
      steps: how many.
      learning_rate: of the first step.
      seed: decides the order.
      tick: called after each step with its loss.

    Returns:
      A model with the new parameters, in their dtypes, and each step's loss.

    Raises:
      ValueError: the loss is not finite.
    """
    graphdef, params = nnx.split(model)
    leaves, structure = jax.tree.flatten(params)
    places = [i for i, name in enumerate(tree.names(params)) if name in names]
    dtypes = [leaves[i].dtype for i in places]
    # Copies: a step gives up the arrays that it is given.
    trained = [jnp.array(leaves[i], np.float32) for i in places]
    frozen = [None if i in places else leaf for i, leaf in enumerate(leaves)]
    optimizer = optax.chain(
        optax.clip_by_global_norm(_CLIP),
        optax.adamw(optax.cosine_decay_schedule(learning_rate, steps)),
    )
    tx = keep_masks(optimizer, [leaf != 0 for leaf in trained])

    def whole(trained: Any, frozen: Any) -> Decoder:
        found = list(frozen)
        for i, leaf, dtype in zip(places, trained, dtypes, strict=True):
            found[i] = jnp.asarray(leaf, dtype)
        return nnx.merge(graphdef, jax.tree.unflatten(structure, found))

    def loss(trained: Any, frozen: Any, tokens: jax.Array) -> jax.Array:
        inputs, targets = tokens[:, :-1], tokens[:, 1:]  # (batch, length - 1)
        return loss_per_token(whole(trained, frozen), inputs, targets).mean()

    step = _step(loss, tx)
    state = jax.jit(tx.init)(trained)
    losses = []
    for rows in _order(len(sequences), batch, steps, seed):
        trained, state, value = step(trained, state, frozen, sequences[rows])
        losses.append(float(value))
        if not np.isfinite(losses[-1]):
            raise ValueError(
                f"the loss of retraining must be finite, got {losses[-1]} at step "
                f"{len(losses)}; lower the learning rate"
            )
        tick(losses[-1])
    return whole(trained, frozen), losses


def _step(loss: Callable[..., jax.Array], tx: optax.GradientTransformation) -> Any:
    """A compiled step: trained leaves, state, frozen leaves and tokens to the next."""

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(
        trained: Any, state: Any, frozen: Any, tokens: Int[jax.Array, "batch length"]
    ) -> tuple[Any, Any, jax.Array]:
        value, gradient = jax.value_and_grad(loss)(trained, frozen, tokens)
        updates, state = tx.update(gradient, state, trained)
        return optax.apply_updates(trained, updates), state, value

    return step


def _order(sequences: int, batch: int, steps: int, seed: int) -> list[np.ndarray]:
    """Rows of each step; each sequence comes once before any comes twice."""
    chance = np.random.default_rng(seed)
    needed = batch * steps
    rounds = -(-needed // sequences)
    rows = np.concatenate([chance.permutation(sequences) for _ in range(rounds)])
    return np.split(rows[:needed], steps)
