"""Sums whose bits depend on no order, so on no sharding and no compiler's choice.

A float sum differs in its last bits from one order of the terms to another, and equal
sums no longer tie. Here each term is cut into integers of a few bits, counted in a unit
that the largest term fixes; integers add up exactly in any order.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32

from jaxprune.arrays import low_bit


@functools.partial(jax.jit, static_argnames="axis")
def total(
    terms: Float[Array, "*shape"], axis: int | None = None
) -> Float32[Array, "*summed"]:
    """The sum along an axis, in any order the same.

    It is as exact as a float32 sum: every term is rounded to a multiple of at most
    2^-24 / n times the largest of the n terms.

    Args:
      terms: floating array of at most 2^27 along each axis; read as float32.
      axis: axis that is summed, None for all, one after the other.

    Returns:
      float32; the axis stays, with length 1. NaN and infinity as in any sum.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxprune.arrays import exact_sum
      >>> exact_sum.total(jnp.array([0.5, 0.25, 2.0])).tolist()
      [2.75]
    """
    if axis is None:
        terms = terms.astype(jnp.float32)  # of no axes it is its own sum
        # One after the other: a sum over all axes could need more than 2^27 terms.
        for index in range(terms.ndim):
            terms = total(terms, index)
        return terms
    # All is rounded, so there is no gradient; and such a reduction has no rule for one.
    terms, count = jax.lax.stop_gradient(terms.astype(jnp.float32)), terms.shape[axis]
    if not count:
        return jnp.sum(terms, axis, keepdims=True)
    # `count` integers of under 2^(bits + 2) add up in an int32.
    digits = max(count - 1, 1).bit_length()
    bits = 28 - digits
    highest, lowest, nan = _extremes(terms, axis)
    largest = jnp.maximum(jnp.abs(highest), jnp.abs(lowest))
    finite = (largest < jnp.inf) & ~nan
    exponent = jnp.where(finite, _exponent(largest), 0)
    scaled = terms * low_bit.power_of_two(-exponent)  # in (-4, 4)
    remainder = jnp.where(finite, scaled, 0)
    wholes = []
    for _ in range(-(-(24 + digits) // bits)):
        whole = jnp.round(remainder * 2.0**bits)
        remainder = remainder * 2.0**bits - whole
        wholes.append(whole.astype(np.int32))
    zeros = [np.int32(0)] * len(wholes)
    result = jnp.zeros_like(largest)
    for part in reversed(_reduced(wholes, zeros, [jnp.add] * len(wholes), axis)):
        # Scaling by a power of two is exact.
        result = (result + part.astype(jnp.float32)) * 2.0**-bits
    special = jnp.where(nan, jnp.nan, highest + lowest)
    return jnp.where(finite, result * low_bit.power_of_two(exponent), special)


def _extremes(
    terms: Float32[Array, "*shape"], axis: int
) -> tuple[
    Float32[Array, "*summed"], Float32[Array, "*summed"], Bool[Array, "*summed"]
]:
    """The highest and the lowest along an axis, and whether there is a NaN."""
    operands = [terms, terms, jnp.isnan(terms)]
    starts = [np.float32(-np.inf), np.float32(np.inf), np.False_]
    # On a CPU, XLA's maximum does not hand NaN on.
    functions = [jnp.maximum, jnp.minimum, jnp.logical_or]
    highest, lowest, nan = _reduced(operands, starts, functions, axis)
    return highest, lowest, nan


def _reduced(
    operands: Sequence[jax.Array],
    starts: Sequence[Any],
    functions: Sequence[Callable[..., jax.Array]],
    axis: int,
) -> list[jax.Array]:
    """Each operand reduced along an axis, which stays with length 1."""

    def combine(a: Sequence[jax.Array], b: Sequence[jax.Array]) -> list[jax.Array]:
        return [f(x, y) for f, x, y in zip(functions, a, b, strict=True)]

    if axis == operands[0].ndim - 1:
        # A reduction of several operands is fused with what makes them. Before one of a
        # single operand XLA writes it out on a CPU: as much memory as the terms.
        results = jax.lax.reduce(tuple(operands), tuple(starts), combine, (axis,))
    else:
        # Down columns the fused one is scalar code: two to four times as slow.
        triples = zip(operands, starts, functions, strict=True)
        results = [jax.lax.reduce(x, start, f, (axis,)) for x, start, f in triples]
    return [jnp.expand_dims(result, axis) for result in results]


def _exponent(values: jax.Array) -> jax.Array:
    """floor(log2 |x|), at most one off so that its inverse is a normal number too."""
    stored = jax.lax.bitcast_convert_type(jnp.abs(values), np.int32) >> 23
    return jnp.clip(stored - 127, -126, 126)
