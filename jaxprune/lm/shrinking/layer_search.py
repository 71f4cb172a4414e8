"""Which layers a decoder can do without: one after the other, by what it predicts.

Layers that are scored one by one mislead where several go, since each may be needed
once another is gone. So the layer goes whose absence changes the predictions least,
then the next of those that remain. The change is KL(whole model || pruned model) at
every token. The loss on the text chose worse layers of Gemma 3 270M on the same tokens.

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


class LayerSearch(NamedTuple):
    """How far a search is.

    Attributes:
      kept: the layers that stay, ascending.
      dropped: layers that do not, in the order in which they went.
      nats: the mean KL(whole model || pruned model) after each went, nats a token.
    """

    kept: list[int]
    dropped: list[int]
    nats: list[float]


class _Gated(nnx.Module):
    """A layer that is skipped where its gate is zero."""

    def __init__(self, layer: Any, gate: Array) -> None:
        self.layer = layer
        self.gate = nnx.Variable(gate)

    def __call__(self, x: Array, *arguments: Any) -> Any:
        y, kv_cache = self.layer(x, *arguments)
        # Both are computed: one program for all layers.
        return jnp.where(self.gate[...], y, x), kv_cache


def search_layers(
    graphdef: Any,
    params: Any,
    tokens: Int[np.ndarray, "sequences time"],
    layers: int,
    *,
    batch: int = 4,
    start: LayerSearch | None = None,
    progress: Callable[[int], None] = lambda batches: None,
    save: Callable[[LayerSearch], None] = lambda search: None,
) -> LayerSearch:
    """Leaves out layers until so many are left, each time the one that matters least.

    Beside the parameters it holds what the head reads of all tokens, (sequences, time,
    width) values, of the whole model.

    Args:
      graphdef: definition of a `Decoder`, without its parameters.
      params: parameters of it.
      tokens: sequences that show what the model is for.
      layers: number of layers that stay.
      batch: number of sequences that the model sees at once.
      start: state of a search of the same arguments that was stopped.
      progress: function that is called with the number of batches that were computed,
        or that turned out not to be needed. The numbers add up to all batches once for
        the whole model, and once more for each candidate layer in each step of the
        search.
      save: function that is called with the state after each layer, to `start` from.

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
      >>> len(search_layers(*split, np.zeros((4, 8), np.int32), 1).kept)
      1
    """
    count = len(params["layers"])
    if not 1 <= layers <= count:
        raise ValueError(
            f"the number of layers that stay must be between 1 and {count}, got "
            f"{layers}"
        )
    states, nats = _programs(graphdef)
    # (batch, time - 1) each
    batches = [tokens[i : i + batch, :-1] for i in range(0, len(tokens), batch)]
    all_open = np.ones(count, bool)  # never changed: a running program may read it
    dense = [states(params, ids, all_open) for ids in batches]
    progress(len(batches))

    def cost(layer: int, gates: np.ndarray, number: int) -> float:
        """Nats of a batch without one layer more."""
        without = gates & (np.arange(count) != layer)
        return float(nats(params, batches[number], without, dense[number]))

    dropped = [] if start is None else list(start.dropped)
    changes = [] if start is None else list(start.nats)
    gates = all_open.copy()
    gates[dropped] = False
    for _ in range(count - layers - len(dropped)):
        candidates = np.flatnonzero(gates).tolist()
        cost_of_batch = functools.partial(cost, gates=gates)
        best, total = _cheapest(candidates, len(batches), cost_of_batch, progress)
        change = total / tokens[:, :-1].size
        if not math.isfinite(change):
            raise ValueError(
                "what the model predicts must be finite, but it is not, whichever "
                "layer is left out; look at its weights"
            )
        gates[best] = False
        dropped.append(best)
        changes.append(change)
        save(LayerSearch(np.flatnonzero(gates).tolist(), [*dropped], [*changes]))
    return LayerSearch(np.flatnonzero(gates).tolist(), dropped, changes)


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
        pruned = states(params, ids, gates)
        return jnp.sum(divergence_of_states(model, model, dense, pruned))

    return states, nats


def _cheapest(
    layers: list[int],
    batches: int,
    cost: Callable[..., float],
    progress: Callable[[int], None],
) -> tuple[int, float]:
    """The layer with the least sum over all batches of a cost >= 0, and that sum."""
    sums = dict.fromkeys(layers, 0.0)
    done = dict.fromkeys(layers, 0)  # batches
    while True:
        # Costs are not negative, so a sum never falls. The layer with the least sum is
        # continued; once its sum covers all batches, no other layer can cost less.
        best = min(layers, key=lambda i: (not math.isfinite(sums[i]), sums[i]))
        if done[best] == batches or not math.isfinite(sums[best]):
            progress(sum(batches - number for number in done.values()))
            return best, sums[best]
        sums[best] += cost(best, number=done[best])
        done[best] += 1
        progress(1)
