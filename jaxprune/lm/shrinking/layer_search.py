"""Which layers a decoder can do without: one after the other, by what it predicts.

Layers that are scored one by one mislead where several go, since each may be needed
once another is gone. So the layer goes whose absence changes the predictions least,
then the next of those that remain. The change is KL(whole model || what is left) at
every token. The loss on the text chose worse layers of Gemma 3 270M on the same tokens
(benchmarks/README.md).

Reference:
  Zhong et al., "BlockPruner: Fine-grained Pruning for Large Language Models", 2024,
  arXiv 2406.10594, whose greedy search this is, for whole layers; theirs goes by the
  perplexity.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxprune.lm.recovery.distill import divergence_of_states


class Left(NamedTuple):
    """What became of a search.

    Attributes:
      kept: the layers that stay, ascending.
      dropped: those that do not, in the order in which they went.
      nats: the mean KL(whole model || what is left) after each went, nats a token.
    """

    kept: list[int]
    dropped: list[int]
    nats: list[float]


class _Gated(nnx.Module):
    """A layer that is skipped where its gate is zero."""

    def __init__(self, layer: Any, gate: Array) -> None:
        self.layer = layer
        self.gate = nnx.Variable(gate)

    def __call__(self, x: Array, *rest: Any) -> Any:
        y, past = self.layer(x, *rest)
        return jnp.where(self.gate[...], y, x), past


def keep(
    graphdef: Any,
    params: Any,
    tokens: Int[np.ndarray, "sequences time"],
    layers: int,
    *,
    batch: int = 4,
    begun: Left | None = None,
    tick: Callable[[int], None] = lambda count: None,
    noted: Callable[[Left], None] = lambda left: None,
) -> Left:
    """Leaves out layers until so many are left, each time the one that matters least.

    Beside the parameters it holds what the head reads of all tokens, (sequences, time,
    width) values, of the whole model.

    Args:
      graphdef: of a `Decoder`, without its parameters.
      params: its parameters.
      tokens: sequences that show what the model is for.
      layers: how many layers stay.
      batch: sequences that the model sees at once.
      begun: what a search of the same arguments had found when it was stopped.
      tick: called with the number of batches that were computed, or that turned out not
        to be needed. The numbers add up to all batches once for the whole model, and
        once more for each candidate layer in each step of the search.
      noted: called with what is left after each layer, to be `begun` from.

    Returns:
      The layers that stay, and the divergences on the way.

    Raises:
      ValueError: `layers` is not between 1 and the number of layers, or what the model
        predicts is not finite.

    Example:
      >>> from jaxprune.lm.models.decoder.config import DecoderConfig
      >>> from jaxprune.lm.models.decoder.model import Decoder
      >>> config = DecoderConfig(
      ...     vocab_size=65, context=32, layers=3, width=16, heads=4, kv_heads=2,
      ...     head_dim=8, mlp_width=32,
      ... )
      >>> split = nnx.split(Decoder(config, rngs=nnx.Rngs(0)), nnx.Param)
      >>> len(keep(*split, np.zeros((4, 8), np.int32), 1).kept)
      1
    """
    whole = len(params["layers"])
    if not 1 <= layers <= whole:
        raise ValueError(
            f"the number of layers that stay must be between 1 and {whole}, got "
            f"{layers}"
        )

    states, nats = _programs(graphdef)
    batches = [tokens[i : i + batch, :-1] for i in range(0, len(tokens), batch)]
    every = np.ones(whole, bool)  # never changed: a running program may read it
    dense = [states(params, ids, every) for ids in batches]
    tick(len(batches))

    def cost(layer: int, gates: np.ndarray, number: int) -> float:
        """Nats of a batch without one layer more."""
        without = gates & (np.arange(whole) != layer)
        return float(nats(params, batches[number], without, dense[number]))

    dropped = [] if begun is None else list(begun.dropped)
    gates = every.copy()
    gates[dropped] = False
    changes = [] if begun is None else list(begun.nats)
    for _ in range(whole - layers - len(dropped)):
        left = np.flatnonzero(gates).tolist()
        of_batch = functools.partial(cost, gates=gates)
        best, total = _cheapest(left, len(batches), of_batch, tick)
        change = total / tokens[:, :-1].size
        if not math.isfinite(change):
            raise ValueError(
                "what the model predicts must be finite, but it is not, whichever "
                "layer is left out; look at its weights"
            )
        gates[best] = False
        dropped.append(best)
        changes.append(change)
        noted(Left(np.flatnonzero(gates).tolist(), [*dropped], [*changes]))
    return Left(np.flatnonzero(gates).tolist(), dropped, changes)


def _programs(graphdef: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """What the head reads where gates are open, and how far that is from `dense`."""

    @jax.jit
    def states(params: Any, ids: Array, gates: Array) -> Float[Array, "batch time w"]:
        model = nnx.merge(graphdef, params)
        model.layers = nnx.List(
            [_Gated(layer, gates[i]) for i, layer in enumerate(model.layers)]
        )
        return model.states(model.embed(ids))[0]

    @jax.jit
    def nats(params: Any, ids: Array, gates: Array, dense: Array) -> Float[Array, ""]:
        model = nnx.merge(graphdef, params)
        own = states(params, ids, gates)
        return jnp.sum(divergence_of_states(model, model, dense, own))

    return states, nats


def _cheapest(
    layers: list[int],
    batches: int,
    cost: Callable[..., float],
    tick: Callable[[int], None],
) -> tuple[int, float]:
    """The layer with the least sum over all batches of a cost >= 0, and that sum."""
    sums = dict.fromkeys(layers, 0.0)
    seen = dict.fromkeys(layers, 0)
    while True:
        # Costs are not negative, so a sum never falls. The layer with the least sum is
        # continued; once its sum covers all batches, no other layer can cost less.
        best = min(layers, key=lambda i: (not math.isfinite(sums[i]), sums[i]))
        if seen[best] == batches or not math.isfinite(sums[best]):
            tick(sum(batches - number for number in seen.values()))
            return best, sums[best]
        sums[best] += cost(best, number=seen[best])
        seen[best] += 1
        tick(1)
