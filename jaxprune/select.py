"""The k highest of many scores, exactly, by counting.

Floats of one width are ordered by their bits, so the k-th highest is found by bisection
over bit patterns: each pass counts, in every leaf, the scores at or above a candidate.
Nothing is sorted, concatenated or gathered, so it works on any sharding and needs no
memory beside the masks. Ties keep the first by (leaf, flat index). NaN ranks lowest,
under minus infinity.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class _Count(NamedTuple):
    """A 64-bit count in two uint32 halves; x64 need not be enabled."""

    high: jax.Array
    low: jax.Array

    def plus(self, count: jax.Array) -> "_Count":
        low = self.low + count
        return _Count(self.high + (low < count).astype(np.uint32), low)

    def minus(self, count: jax.Array) -> "_Count":
        borrow = (self.low < count).astype(np.uint32)
        return _Count(self.high - borrow, self.low - count)

    def at_least(self, other: "_Count") -> jax.Array:
        return (self.high > other.high) | (
            (self.high == other.high) & (self.low >= other.low)
        )

    def at_most(self, count: jax.Array) -> jax.Array:
        """The smaller of the two, as uint32."""
        return jnp.where(self.high > 0, count, jnp.minimum(self.low, count))


def top(scores: Sequence[jax.Array], kept: int) -> list[jax.Array]:
    """Masks of the `kept` highest scores over all leaves together.

    Args:
      scores: arrays of any shape and floating dtype; each has under 2^32 elements.
      kept: how many to keep, 0 to the number of scores.

    Returns:
      Boolean arrays of the scores' shapes; exactly `kept` of them are True.

    Raises:
      ValueError: `kept` is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxprune import select
      >>> [mask.tolist() for mask in select.top([jnp.array([3.0, 1.0, 3.0])], 1)]
      [[True, False, False]]
    """
    size = sum(leaf.size for leaf in scores)
    if not 0 <= kept <= size:
        raise ValueError(f"kept must be 0 to {size}, the number of scores, got {kept}")
    return _top(list(scores), _split(kept))


def _split(count: int) -> _Count:
    return _Count(jnp.uint32(count >> 32), jnp.uint32(count & 0xFFFFFFFF))


@jax.jit
def _top(scores: list[jax.Array], kept: _Count) -> list[jax.Array]:
    dtype = jnp.result_type(*scores)
    scores = [leaf.astype(dtype) for leaf in scores]
    threshold, into_nan = _threshold(scores, kept, dtype)

    def above(leaf: jax.Array) -> jax.Array:
        return jnp.where(into_nan, ~jnp.isnan(leaf), leaf > threshold)

    def tied(leaf: jax.Array) -> jax.Array:
        return jnp.where(into_nan, jnp.isnan(leaf), leaf == threshold)

    spare = kept
    for leaf in scores:
        spare = spare.minus(_number(above(leaf)))
    ties, allowed = [], []
    for leaf in scores:
        ties.append(_number(tied(leaf)))
        allowed.append(spare.at_most(ties[-1]))
        spare = spare.minus(allowed[-1])
    bounds = _tie_bounds(scores, tied, ties, allowed)
    return [
        above(leaf) | (tied(leaf) & (_flat_index(leaf) < bound))
        for leaf, bound in zip(scores, bounds, strict=True)
    ]


def _number(flags: jax.Array) -> jax.Array:
    return jnp.sum(flags, dtype=np.uint32)


def _threshold(
    scores: list[jax.Array], kept: _Count, dtype: np.dtype
) -> tuple[jax.Array, jax.Array]:
    """The highest value with at least `kept` scores at or above it.

    Above infinity, where bit patterns are NaN and nothing counts, if `kept` is 0. The
    second result tells that all numbers together are too few, so that NaN are kept too.
    """
    unsigned = np.dtype(f"uint{jnp.finfo(dtype).bits}")
    infinity = jax.lax.bitcast_convert_type(jnp.array(jnp.inf, dtype), unsigned)
    sign = unsigned.type(1 << (jnp.finfo(dtype).bits - 1))

    def value(position: jax.Array) -> jax.Array:
        """The float at a position of the order, in which `sign` is +0."""
        bits = jnp.where(position >= sign, position ^ sign, ~position)
        return jax.lax.bitcast_convert_type(bits, dtype)

    def enough(position: jax.Array) -> jax.Array:
        count = _Count(jnp.uint32(0), jnp.uint32(0))
        for leaf in scores:
            count = count.plus(_number(leaf >= value(position)))
        return count.at_least(kept)

    def narrow(bracket: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bracket
        middle = high - (high - low) // unsigned.type(2)
        found = enough(middle)
        return (
            jnp.where(found, middle, low),
            jnp.where(found, high, middle - unsigned.type(1)),
        )

    lowest, above = ~(infinity | sign), (infinity | sign) + unsigned.type(1)
    bracket = jax.lax.while_loop(lambda b: b[0] < b[1], narrow, (lowest, above))
    return value(bracket[0]), ~enough(lowest)


def _tie_bounds(
    scores: list[jax.Array],
    tied: Callable[[jax.Array], jax.Array],
    ties: list[jax.Array],
    allowed: list[jax.Array],
) -> jax.Array:
    """For each leaf, the flat index under which its ties are kept.

    Bisection over the index; no pass at all where every tie or none is kept.
    """
    sizes = jnp.array([leaf.size for leaf in scores], np.uint32)
    want, have = jnp.stack(allowed), jnp.stack(ties)
    whole = jnp.where(want == have, sizes, 0)

    def narrow(bracket: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bracket
        middle = low + (high - low) // np.uint32(2)
        found = jnp.stack(
            [
                _number(tied(leaf) & (_flat_index(leaf) < middle[i]))
                for i, leaf in enumerate(scores)
            ]
        )
        enough = found >= want
        return (
            jnp.where(enough, low, jnp.minimum(middle + np.uint32(1), high)),
            jnp.where(enough, middle, high),
        )

    cut = (want > 0) & (want < have)
    start = (jnp.where(cut, 0, whole), jnp.where(cut, sizes, whole))
    return jax.lax.while_loop(lambda b: jnp.any(b[0] < b[1]), narrow, start)[0]


def _flat_index(leaf: jax.Array) -> jax.Array:
    """Each element's row-major position, uint32, like the leaf."""
    index, stride = jnp.zeros((), np.uint32), 1
    for axis in reversed(range(leaf.ndim)):
        iota = jax.lax.broadcasted_iota(np.uint32, leaf.shape, axis)
        index = index + iota * np.uint32(stride)
        stride *= leaf.shape[axis]
    return index
