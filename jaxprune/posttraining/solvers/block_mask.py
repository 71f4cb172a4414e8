"""Which weights of a block of inputs are kept, so that all blocks' counts add up."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.arrays.topk.thresholds import highest
from jaxprune.masking import matrix_mask, patterns
from jaxprune.typing import Pattern


def block_mask(
    scores: jax.Array,
    first: jax.Array,
    *,
    pruned: jax.Array,
    pattern: Pattern,
    inputs: int,
) -> jax.Array:
    """The mask of a block of inputs, which lose their share of what the weight loses.

    Args:
      scores: scores sqrt(w^2 / U_jj^2) of the block, (rows, out).
      first: number of the block's first input.
      pruned: number of units that the whole weight loses.
      pattern: pattern of the mask.
      inputs: number of inputs of the whole weight; those behind it are padding.

    Returns:
      (rows, out), True where kept.
    """
    rows, outputs = scores.shape
    if isinstance(pattern, patterns.NM):
        return matrix_mask.mask(scores, kept=0, pattern=pattern)
    last = first + rows
    if isinstance(pattern, patterns.Block):  # these rows are one row of tiles
        tall, wide = math.ceil(inputs / rows), math.ceil(outputs / pattern.columns)
        lost = _share(pruned, first // rows, last // rows, tall)
        return matrix_mask.mask(jnp.square(scores), kept=wide - lost, pattern=pattern)
    # NaN ranks lowest, so padding is never kept, and the counts do not include it.
    index = first + jnp.arange(rows)
    scores = jnp.where((index < inputs)[:, None], scores, jnp.nan)
    # How many of the block's rows are inputs; the last block is padded.
    whole = jnp.clip(inputs - first, 0, rows)
    if isinstance(pattern, patterns.PerOutput):
        lost = _share(matrix_mask.spread(pruned, outputs), first, last, inputs)
        return highest(scores, whole - lost, axis=0)
    return highest(scores, whole * outputs - _share(pruned, first, last, inputs))


def _share(total: jax.Array, first: Any, last: Any, parts: int) -> jax.Array:
    """What the parts from `first` to `last` lose of a total, which they sum up to."""
    # Not total * end / parts, which 32 bits do not hold; rest * end they do, of at most
    # 65535 parts.
    quotient, remainder = total // parts, (total % parts).astype(np.uint32)

    def until(end: Any) -> jax.Array:
        end = jnp.minimum(end, parts).astype(np.uint32)
        over = (remainder * end + np.uint32(parts // 2)) // np.uint32(parts)
        return quotient * end.astype(quotient.dtype) + over.astype(quotient.dtype)

    return until(last) - until(first)
