"""Which layers a decoder can do without: one after the other, by the loss.

Layers that are scored one by one mislead where several go, since each may be needed
once another is gone. So the layer whose absence costs least is left out, then the next
of those that remain.

Reference:
  Zhong et al., "BlockPruner: Fine-grained Pruning for Large Language Models", 2024,
  arXiv 2406.10594, whose greedy search on perplexity this is, for whole layers.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxprune.models.decoder.model import loss_per_token


class Left(NamedTuple):
    """What became of a search.

    Attributes:
      kept: the layers that stay, ascending.
      dropped: those that do not, in the order in which they went.
      nats: the mean loss before, and after each was left out.
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
    """Leaves out layers until so many are left, each time the one that costs least.

    Args:
      graphdef: of a `Decoder`, without its parameters.
      params: its parameters.
      tokens: sequences that show what the model is for.
      layers: how many layers stay.
      batch: sequences that the model sees at once.
      begun: what a search of the same arguments had found when it was stopped.
      tick: called with 1 after each evaluation of the loss.
      noted: called with what is left after each layer, to be `begun` from.

    Returns:
      The layers that stay, and the losses on the way.

    Raises:
      ValueError: `layers` is not between 1 and the number of layers, or the loss is
        not finite.

    Example:
      >>> from jaxprune.models.decoder.config import DecoderConfig
      >>> from jaxprune.models.decoder.model import Decoder
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

    @jax.jit
    def nats(params: Any, ids: Array, gates: Array) -> Float[Array, ""]:
        model = nnx.merge(graphdef, params)
        model.layers = nnx.List(
            [_Gated(layer, gates[i]) for i, layer in enumerate(model.layers)]
        )
        return jnp.sum(loss_per_token(model, ids[:, :-1], ids[:, 1:]))

    def loss(gates: np.ndarray) -> float:
        parts = range(0, len(tokens), batch)
        total = sum(float(nats(params, tokens[i : i + batch], gates)) for i in parts)
        tick(1)
        return total / (tokens.shape[0] * (tokens.shape[1] - 1))

    gates = np.ones(whole, bool)
    dropped = [] if begun is None else list(begun.dropped)
    gates[dropped] = False
    losses = [loss(gates)] if begun is None else list(begun.nats)
    for _ in range(whole - layers - len(dropped)):
        found = {
            i: loss(gates & (np.arange(whole) != i)) for i in np.flatnonzero(gates)
        }
        best = min(found, key=lambda i: (not math.isfinite(found[i]), found[i]))
        gates[best] = False
        dropped.append(int(best))
        losses.append(found[best])
        if not all(map(math.isfinite, losses)):
            raise ValueError(
                f"the loss must be finite, got {losses}; look at the model"
            )
        noted(Left(np.flatnonzero(gates).tolist(), dropped, losses))
    return Left(np.flatnonzero(gates).tolist(), dropped, losses)
