"""How far a weight's outputs are from those of the dense model."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxprune.arrays import grouped_rows, placement
from jaxprune.graph.operands import Input

# Samples that a weight's error is measured on.
_SAMPLES = 256


def weight_error(
    source: Input,
    value: Any,
    before: Float[Array, "batch in out"],
    after: Float[Array, "batch in out"],
    dense: Any = None,
    positions: Bool[Array, "..."] | None = None,
) -> float:
    """The relative squared error of a weight's output: |X (W - V)|^2 / |X W|^2.

    Args:
      source: input X, as it is read.
      value: activations that X is read from, for one batch. The first 256 samples are
        used; for a weight of several matrices, such as experts, up to 256 at equal
        steps.
      before: old weight W, (batch, in, out).
      after: new weight V, (batch, in, out).
      dense: activations that the dense model's input D is read from, or None. With them
        the error of a weight that is one matrix is |D W - X V|^2 / |D W|^2.
      positions: samples that count, None for all; the others are not measured.

    Returns:
      The error; 0 where the output is zero anyway.
    """
    measure = functools.partial(_weight_error, source=source)
    return float(placement.automatic(measure, value, before, after, dense, positions))


@functools.partial(jax.jit, static_argnames="source")
def _weight_error(
    value: Any,
    before: jax.Array,
    after: jax.Array,
    dense: Any,
    positions: Any,
    *,
    source: Input,
) -> jax.Array:
    old, new = before.astype(np.float32), after.astype(np.float32)
    # Rows of experts are not those that the dense model sends there: one X for both.
    if dense is None or source.grouped or source.shape[0] > 1:
        lost = _outputs(value, old - new, source, positions)
        target = _outputs(value, old, source, positions)
    else:
        target = _outputs(dense, old, source, positions)
        lost = target - _outputs(value, new, source, positions)
    total = jnp.sum(jnp.square(target))
    return jnp.sum(jnp.square(lost)) / jnp.where(total > 0, total, 1)


def _outputs(
    value: Any, weight: Float[Array, "batch in out"], source: Input, positions: Any
) -> Any:
    """The outputs (batch, samples, out) for some samples; of experts (samples, out)."""
    x = source.read(value)  # (batch, samples, in)
    if positions is not None:  # first those that count; the others, zero, are behind
        counts = jnp.ravel(positions)
        x = jnp.where(counts[None, :, None], x, jnp.zeros((), x.dtype))
        x = jnp.take(x, jnp.argsort(~counts, stable=True), axis=1)
    step = max(1, x.shape[1] // _SAMPLES) if source.shape[0] > 1 else 1
    x = x[:, ::step][:, :_SAMPLES].astype(np.float32)  # (batch, samples, in)
    if not source.grouped:
        return jnp.einsum("bsi,bio->bso", x, weight)
    # The matrix of each row, (samples,), and the number of rows of each, (batch,).
    of_rows = grouped_rows.of_rows(source.shape[1], value[1])[::step][:_SAMPLES]
    sizes = jnp.bincount(of_rows, length=source.shape[0])
    return grouped_rows.dot(x[0], weight, sizes)
