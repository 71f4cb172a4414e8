"""Which channels of the residual stream a decoder can do without.

Where the stream can be rotated, its channels become its principal components: with x
what a norm that reads it gives, gains aside, those of the sum of E[x x^T] over all such
norms, the last one too. Those of least variance go, as in SliceGPT, in all layers the
same. Where the head is the embedding, channels are mixed with those alone whose gains
in the last norm are about theirs, since the embedding cannot take them.

Elsewhere a channel's score is the sum over these norms of

  E[x_j^2] / sum over all channels of the same,

gains included: the share of what the matrices behind it are given that enters by
channel j. Weighing them by the squares of the matrices' rows, as Wanda does, chose no
better on SmolLM2 135M. `channel_fit` then fits the matrices that read the stream to
what is left of it.

Reference:
  Ashkboos et al., "SliceGPT", 2024, arXiv 2401.15024.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxprune.arrays import tree
from jaxprune.arrays.console_progress import Progress
from jaxprune.lm.models import hf
from jaxprune.lm.models.loaded_model import LoadedModel
from jaxprune.lm.shrinking.channel_fit import ReportingNorm, fit_readers, norms_of

_ALIKE = 1.1  # greatest ratio of gains of channels that are mixed under a tied head
_LAST = "norm/scale"
_TINY = np.finfo(np.float32).tiny


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
      The smaller model; JSON-able: "kept" channels, the "scores" of all, and whether
      they are "principal" components, the first of which then stay.
    """
    hf.check_channels(model.config, range(remaining))
    principal = hf.can_rotate(model.config)
    whole = tied = model
    if principal:
        whole, tied, scores = principal_channels(model, tokens, batch=batch)
    else:
        with Progress(len(tokens), "scoring channels", leave=False) as progress:
            scores = channel_scores(
                model, tokens, batch=batch, progress=progress.update
            )
    # Of equal scores the first stays.
    kept = np.sort(np.argsort(-scores, kind="stable")[:remaining])
    small = model.reshaped(*hf.keep_channels(tied.config, tied.params, kept.tolist()))
    small = fit_readers(whole, small, kept, tokens, batch=batch)
    record = {"kept": kept.tolist(), "scores": scores.tolist(), "principal": principal}
    return small, record


class PrincipalChannels(NamedTuple):
    """A model whose channels are principal components of its residual stream.

    Attributes:
      whole: the model, exactly; its head is one of its own.
      tied: what the directory can say: `whole`, or where the head is the embedding, as
        near as the gains of the last norm come.
      scores: share of the variance of each channel, float64 (width,), descending.
    """

    whole: LoadedModel
    tied: LoadedModel
    scores: Float[np.ndarray, " width"]


def principal_channels(
    model: LoadedModel,
    tokens: Int[np.ndarray, "sequences length"],
    *,
    batch: int = 4,
) -> PrincipalChannels:
    """The model in the basis of the principal components of its residual stream.

    Args:
      model: model with its parameters in memory, of those that `hf.can_rotate`.
      tokens: sequences that show what the model is for.
      batch: number of sequences that the model sees at once.

    Returns:
      The model in the new basis, and the variances.

    Raises:
      ValueError: the stream cannot be rotated.
    """
    config, params = model.config, model.params
    # In the basis of before, with the gains in the matrices; let go once measured.
    folded = hf.rotate_channels(config, params, jnp.eye(config.width))
    moments = _moments(model.reshaped(*folded), tokens, batch)
    del folded
    gains = tree.named_leaves(params)[_LAST].astype(jnp.float32)
    gains = np.asarray(gains + (config.norm == "rms_plus_one"))
    mixed = _alike(gains) if config.tie_weights else [np.arange(config.width)]
    basis, variances = _principal_basis(moments, mixed)
    whole = model.reshaped(*hf.rotate_channels(config, params, jnp.asarray(basis)))
    tied = whole
    if config.tie_weights:
        # Where the gains of what is mixed are equal, these are exact.
        named = tree.named_leaves(whole.params)
        stored = (gains @ basis**2) - (config.norm == "rms_plus_one")
        named[_LAST] = jnp.asarray(stored, named[_LAST].dtype)
        structure = jax.tree.structure(params)
        leaves = [named[name] for name in tree.names(params)]
        tied = model._replace(params=jax.tree.unflatten(structure, leaves))
    return PrincipalChannels(whole, tied, variances / variances.sum())


def _moments(
    model: LoadedModel, tokens: Int[np.ndarray, "sequences length"], batch: int
) -> Float[np.ndarray, "width width"]:
    """The sums of x x^T over tokens and norms that read the stream, float64."""

    def product(x: Array) -> Array:
        x = x.astype(jnp.float32).reshape(-1, x.shape[-1])
        # Without the one gain of each norm, every token is of one size.
        x = x / jnp.sqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + _TINY)
        return jnp.matmul(x.T, x, precision="highest")

    total = np.zeros((model.config.width,) * 2)
    with Progress(len(tokens), "principal channels", leave=False) as progress:
        # Added up at once: as many matrices as norms would be gigabytes.
        for moments in _of_norms(
            model, tokens, batch, product, _sum_of, progress.update
        ):
            total += moments
    return total


def _sum_of(matrices: list[Array]) -> Array:
    return functools.reduce(jnp.add, matrices)


def _alike(gains: Float[np.ndarray, " width"]) -> list[Int[np.ndarray, " group"]]:
    """The channels in groups of about the same gain, each in one."""
    groups: list[list[int]] = []
    for channel in np.argsort(gains, kind="stable").tolist():
        first, gain = gains[groups[-1][0]] if groups else 0.0, gains[channel]
        low, high = sorted((abs(first), abs(gain)))
        if first * gain > 0 and high <= _ALIKE * low:
            groups[-1].append(channel)
        else:
            groups.append([channel])
    return [np.array(group) for group in groups]


def _principal_basis(
    moments: Float[np.ndarray, "width width"],
    groups: list[Int[np.ndarray, " group"]],
) -> tuple[Float[np.ndarray, "width width"], Float[np.ndarray, " width"]]:
    """An orthogonal basis that mixes within groups, and its variances, descending."""
    basis, variances = np.zeros_like(moments), np.zeros(len(moments))
    columns = np.split(
        np.arange(len(moments)), np.cumsum([len(g) for g in groups])[:-1]
    )
    for group, place in zip(groups, columns, strict=True):
        values, vectors = np.linalg.eigh(moments[np.ix_(group, group)])
        basis[np.ix_(group, place)] = vectors
        variances[place] = np.maximum(values, 0)  # rounding leaves some below
    order = np.argsort(-variances, kind="stable")
    return basis[:, order], variances[order]


def _of_norms(
    model: LoadedModel,
    tokens: Int[np.ndarray, "sequences length"],
    batch: int,
    summarise: Callable[[Array], Array],
    combine: Callable[[list[Array]], Array],
    progress: Callable[[int], None],
) -> Iterator[Float[np.ndarray, "..."]]:
    """Summaries of what the norms that read the stream give, batch by batch."""

    @jax.jit
    def summaries(params: Any, ids: Array) -> Float[Array, "..."]:
        decoder, outputs = nnx.merge(model.graphdef, params), []

        def report(x: Array) -> None:
            outputs.append(summarise(x))

        for layer in decoder.layers:
            for name in norms_of(layer):
                setattr(layer, name, ReportingNorm(getattr(layer, name), report))
        decoder.norm = ReportingNorm(decoder.norm, report)
        decoder.states(decoder.embed(ids))
        return combine(outputs)

    for i in range(0, len(tokens), batch):
        ids = tokens[i : i + batch]
        yield jax.device_get(summaries(model.params, ids))
        progress(len(ids))


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

    def squares(x: Array) -> Array:
        return jnp.sum(jnp.square(x.astype(jnp.float32)), axis=(0, 1))

    energies = np.zeros(1)
    for sums in _of_norms(model, tokens, batch, squares, jnp.stack, progress):
        energies = energies + sums.astype(np.float64)  # (norms, width)
    totals = np.maximum(energies.sum(axis=1, keepdims=True), np.finfo(np.float64).tiny)
    return np.sum(energies / totals, axis=0)
