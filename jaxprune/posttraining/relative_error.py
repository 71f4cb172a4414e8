"""How far outputs are from those of the dense model: of a weight, and of a block."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxprune.arrays import grouped_rows, placement
from jaxprune.graph.operands import Input

# This share of the usual token's squared norm is added to each token's squared norm,
# since a token of zeros has no relative error.
_FLOOR = 1e-3
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


def block_error(
    results: Sequence[jax.Array],
    targets: Sequence[jax.Array],
    counted: jax.Array | None,
) -> Float[Array, ""]:
    """|y - target|^2 / (|target|^2 + floor), the mean over tokens, then over arrays.

    The floor is 1e-3 of the squared norm that tokens usually have.

    Args:
      results: outputs of the pruned block, arrays (tokens..., features).
      targets: outputs of the dense block, arrays of the same shapes.
      counted: tokens that count, booleans, in the arrays that begin with its shape.

    Returns:
      Float32 scalar.
    """
    pairs = zip(results, targets, strict=True)
    errors = [_token_error(result, target, counted) for result, target in pairs]
    return jnp.mean(jnp.stack(errors))


def _token_error(
    result: jax.Array, target: jax.Array, counted: jax.Array | None
) -> Float[Array, ""]:
    y, t = (jnp.atleast_1d(x).astype(np.float32) for x in (result, target))
    share: Any = np.float32(1)
    if counted is not None and y.shape[: counted.ndim] == counted.shape:
        # Selected, not multiplied: what does not count may be NaN.
        # (tokens..., 1)
        mask = counted.reshape(counted.shape + (1,) * (y.ndim - counted.ndim))
        y, t = jnp.where(mask, y, 0), jnp.where(mask, t, 0)
        share = jnp.mean(counted, dtype=np.float32)
    apart, size = (jnp.sum(jnp.square(x), axis=-1) for x in (y - t, t))  # (tokens...)
    # By the fourth root of the square, which a few massive tokens do not move much; of
    # the tokens that count, the others being zeros here.
    usual = (jnp.mean(jnp.sqrt(jnp.sqrt(size))) / share) ** 4
    floor = _FLOOR * usual + np.finfo(np.float32).tiny
    return jnp.mean(apart / (size + floor)) / share
