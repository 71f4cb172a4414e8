"""How much each expert of a mixture adds, by what the router gives it.

The score of an expert is the mean of share x |answer| over the tokens that it is given:
one that is often asked and says little, or that the router gives little weight, can go.

Reference:
  Lasby et al., "REAP the Experts: Why Pruning Prevails for One-Shot MoE Compression",
  2025, arXiv 2510.13999.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxprune.arrays.messages import listed
from jaxprune.lm.models.decoder.experts import Experts


class _Noted(nnx.Module):
    """Experts that say how long their answers are."""

    def __init__(self, experts: Experts, note: Callable[[Array, Array], None]) -> None:
        self.experts, self.note = experts, note

    def __call__(self, x: Array) -> Array:
        _, expert, y = self.experts.answers(x.reshape(-1, x.shape[-1]))
        length = jnp.linalg.norm(y.astype(jnp.float32), axis=-1)  # (given,)
        count = self.experts.experts
        self.note(
            jnp.zeros(count).at[expert].add(length), jnp.bincount(expert, length=count)
        )
        return self.experts(x)


def expert_scores(
    graphdef: Any,
    params: Any,
    tokens: Int[np.ndarray, "sequences time"],
    *,
    batch: int = 4,
    tick: Callable[[int], None] = lambda count: None,
) -> tuple[Float[np.ndarray, "layers experts"], Int[np.ndarray, "layers experts"]]:
    """Scores of the experts of each layer, and how many tokens each was given.

    Args:
      graphdef: of a `Decoder` with experts, without its parameters.
      params: its parameters.
      tokens: sequences that show what the model is for.
      batch: sequences that the model sees at once.
      tick: called with the number of sequences after each batch.

    Returns:
      Scores, float64, 0 where an expert was given no token; numbers of tokens.

    Raises:
      ValueError: the model has no experts.

    Example:
      >>> from jaxprune.lm.models.decoder.config import DecoderConfig
      >>> from jaxprune.lm.models.decoder.model import Decoder
      >>> config = DecoderConfig(
      ...     vocab_size=65, context=32, layers=2, width=16, heads=4, kv_heads=2,
      ...     head_dim=8, mlp_width=32, experts=4, experts_per_token=2,
      ... )
      >>> split = nnx.split(Decoder(config, rngs=nnx.Rngs(0)), nnx.Param)
      >>> scores, given = expert_scores(*split, np.zeros((3, 8), np.int32))
      >>> scores.shape, given.sum(axis=1).tolist()
      ((2, 4), [48, 48])
    """
    dense = [i for i, layer in params["layers"].items() if "router" not in layer["mlp"]]
    if dense:
        raise ValueError(
            "expert_scores needs a model with experts in each layer, but layers "
            f"{listed(dense)} have none; jp.shrink removes neurons of such layers"
        )

    @jax.jit
    def lengths(params: Any, ids: Array) -> tuple[Array, Array]:
        model, found = nnx.merge(graphdef, params), []
        for layer in model.layers:
            layer.mlp = _Noted(layer.mlp, lambda *pair: found.append(pair))
        model.states(model.embed(ids))
        sums, counts = zip(*found, strict=True)
        return jnp.stack(sums), jnp.stack(counts)

    total, given = 0.0, 0
    for i in range(0, len(tokens), batch):
        part = tokens[i : i + batch]
        sums, counts = jax.device_get(lengths(params, part))
        total, given = total + sums.astype(np.float64), given + counts
        tick(len(part))
    return total / np.maximum(given, 1), np.asarray(given)
