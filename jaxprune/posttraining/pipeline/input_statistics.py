"""What weights see: the second moments of an input, over the samples that count.

For each input feature the mean square, and on request the Hessian of the layer's
squared error, X^T X / n, in float32. Where the dense model runs beside the pruned one,
its input D is compared with X too: the drift, X^T (D - X) / n. Linear ops that share an
input share its statistics; `Sums` adds them up.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxprune.graph.segments import Segment


class InputStatistics(NamedTuple):
    """The second moments of one input.

    Attributes:
      samples: number of positions, float32 scalar.
      mean_square: mean of each feature's square, (batch, in) float32.
      hessian: X^T X / samples, (batch, in, in) float32; None where not asked for.
      reached: number of positions at which the input is not all zero, the tokens that
        an expert was given, (batch,) float32.
      drift: X^T (D - X) / samples, (1, in, in) float32, D the dense model's input. None
        where D was not given, and for a weight of several matrices, such as experts,
        since the dense model may send other samples to each of them.
    """

    samples: Float[Array, ""]
    mean_square: Float[Array, "batch in"]
    hessian: Float[Array, "batch in in"] | None
    reached: Float[Array, " batch"]
    drift: Float[Array, "1 in in"] | None = None


def sample_weights(
    segment: Segment, positions: jax.Array | None
) -> Float[Array, " samples"] | None:
    """Which samples of a segment's input count.

    Args:
      segment: the segment.
      positions: booleans of the samples' shape, or None for all.

    Returns:
      1 for samples that count, 0 for others; None for all.

    Raises:
      ValueError: the shapes differ.
      TypeError: they are no booleans.
    """
    if positions is None:
        return None
    # What is no array has no shape, and is refused by its dtype first.
    leading, shape = segment.source.leading, getattr(positions, "shape", ())
    dtype = str(getattr(positions, "dtype", type(positions).__name__))
    name = segment.linear_ops[0].name
    fits = math.prod(leading) == math.prod(shape) and leading[: len(shape)] == shape
    if dtype != "bool":
        raise TypeError(
            f"positions must be an array of booleans, got {dtype}; compare what they "
            "are made of, as in mask > 0"
        )
    if segment.source.grouped:
        raise ValueError(
            f"positions say which tokens count, but rows come to '{name}' group by "
            "group; leave such weights out with prunable=..., or positions"
        )
    if not fits:
        raise ValueError(
            "positions must have the shape of the samples of each input, but that of "
            f"'{name}' has samples {leading} and positions are {shape}; leave such "
            "weights out with prunable=..., or positions"
        )
    return as_weights(positions)


def as_weights(positions: jax.Array) -> Float[Array, " samples"]:
    """1 for samples that count, 0 for others."""
    return jnp.ravel(positions).astype(np.float32)
