"""Which channels of the residual stream a decoder can do without.

A channel's score is the sum over all norms that read the stream, the last one too, of

  E[x_j^2] / sum over all channels of the same,

x what the norm gives, its gains included: the share of what the matrices behind it are
given that enters by channel j. The channels with the least go, in all layers the same.
Weighing them by the squares of the matrices' rows, as Wanda does, chose no better on
SmolLM2 135M. `channel_fit` then fits the matrices that read the stream to what
is left of it.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxprune.arrays.console_progress import Progress
from jaxprune.lm.models import hf
from jaxprune.lm.models.loaded_model import LoadedModel
from jaxprune.lm.shrinking.channel_fit import ReportingNorm, fit_readers, norms_of


def without_channels(
    model: LoadedModel,
    tokens: Int[np.ndarray, "sequences length"],
    remaining: int,
    *,
    batch: int,
) -> tuple[LoadedModel, dict[str, Any]]:
    """The model with the channels of its residual stream that score highest.

    Args:
      model: model with its parameters in memory.
      tokens: tokens of the calibration.
      remaining: number of channels that stay.
      batch: number of sequences that the model sees at once.

    Returns:
      The smaller model; JSON-able: "kept" channels and the "scores" of all.
    """
    hf.check_channels(model.config, range(remaining))
    with Progress(len(tokens), "scoring channels", leave=False) as progress:
        scores = channel_scores(model, tokens, batch=batch, progress=progress.update)
    # Of equal scores the first stays.
    kept = np.sort(np.argsort(-scores, kind="stable")[:remaining])
    small = model.reshaped(*hf.keep_channels(model.config, model.params, kept.tolist()))
    small = fit_readers(model, small, kept, tokens, batch=batch)
    return small, {"kept": kept.tolist(), "scores": scores.tolist()}


def channel_scores(
    model: LoadedModel,
    tokens: Int[np.ndarray, "sequences length"],
    *,
    batch: int = 4,
    progress: Callable[[int], None] = lambda sequences: None,
) -> Float[np.ndarray, "width"]:
    """The scores of all channels, as above.

    Args:
      model: model with its parameters in memory.
      tokens: sequences that show what the model is for.
      batch: number of sequences that the model sees at once.
      progress: function that is called with the number of sequences after each batch.

    Returns:
      Scores, float64, which add up to the number of norms.
    """

    @jax.jit
    def mean_squares(params: Any, ids: Array) -> Float[Array, "norms width"]:
        decoder, squares = nnx.merge(model.graphdef, params), []

        def report(x: Array) -> None:
            squares.append(jnp.sum(jnp.square(x.astype(jnp.float32)), axis=(0, 1)))

        for layer in decoder.layers:
            for name in norms_of(layer):
                setattr(layer, name, ReportingNorm(getattr(layer, name), report))
        decoder.norm = ReportingNorm(decoder.norm, report)
        decoder.states(decoder.embed(ids))
        return jnp.stack(squares)

    total = 0.0
    for i in range(0, len(tokens), batch):
        ids = tokens[i : i + batch]
        squares = jax.device_get(mean_squares(model.params, ids))
        total = total + squares.astype(np.float64)  # (norms, width)
        progress(len(ids))
    energies = np.asarray(total)  # (norms, width)
    totals = np.maximum(energies.sum(axis=1, keepdims=True), np.finfo(np.float64).tiny)
    return np.sum(energies / totals, axis=0)
