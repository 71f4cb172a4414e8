"""How much each expert of a mixture adds, by what the router gives it.

The score of an expert is the mean of router weight x |output| over the tokens that are
sent to it: one that is often asked and adds little can go.

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


class _MeasuredExperts(nnx.Module):
    """Experts that report how long their outputs are."""

    def __init__(
        self, experts: Experts, report: Callable[[Array, Array], None]
    ) -> None:
        self.experts, self.report = experts, report

    def __call__(self, x: Array) -> Array:
        _, expert, y = self.experts.expert_outputs(x.reshape(-1, x.shape[-1]))
        length = jnp.linalg.norm(y.astype(jnp.float32), axis=-1)  # (pairs,)
        count = self.experts.experts
        self.report(
            jnp.zeros(count).at[expert].add(length), jnp.bincount(expert, length=count)
        )
        return self.experts(x)


def expert_scores(
    graphdef: Any,
    params: Any,
    tokens: Int[np.ndarray, "sequences time"],
    *,
    batch: int = 4,
    progress: Callable[[int], None] = lambda sequences: None,
) -> tuple[Float[np.ndarray, "layers experts"], Int[np.ndarray, "layers experts"]]:
    """Scores of the experts of each layer, and how many tokens each was given.

    Args:
      graphdef: definition of a `Decoder` with experts, without its parameters.
      params: parameters of it.
      tokens: sequences that show what the model is for.
      batch: number of sequences that the model sees at once.
      progress: function that is called with the number of sequences after each batch.

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
      >>> scores, counts = expert_scores(*split, np.zeros((3, 8), np.int32))
      >>> scores.shape, counts.sum(axis=1).tolist()
      ((2, 4), [48, 48])
    """
    dense = [i for i, layer in params["layers"].items() if "router" not in layer["mlp"]]
    if dense:
        raise ValueError(
            "expert_scores needs a model with experts in each layer, but layers "
            f"{listed(dense)} have none; jp.shrink removes neurons of such layers"
        )

    @jax.jit
    def lengths_and_counts(params: Any, ids: Array) -> tuple[Array, Array]:
        model, layers = nnx.merge(graphdef, params), []
        for layer in model.layers:
            layer.mlp = _MeasuredExperts(
                layer.mlp, lambda *measured: layers.append(measured)
            )
        model.states(model.embed(ids))
        lengths, counts = zip(*layers, strict=True)
        return jnp.stack(lengths), jnp.stack(counts)  # (layers, experts)

    total_lengths, total_counts = 0.0, 0
    for i in range(0, len(tokens), batch):
        ids = tokens[i : i + batch]
        lengths, counts = jax.device_get(lengths_and_counts(params, ids))
        total_lengths = total_lengths + lengths.astype(np.float64)
        total_counts = total_counts + counts
        progress(len(ids))
    scores = total_lengths / np.maximum(total_counts, 1)  # 0 where no token was sent
    return scores, np.asarray(total_counts)
