"""Finds the k-th largest of many values digit by digit, by exact counts.

Each pass counts, in one read, how many values lie at or above seven candidates that cut
the bracket into eight parts, and keeps the part in which the k-th largest lies: a digit
to the base of eight. An order of 2^32 positions takes eleven passes, and fewer where a
candidate counts exactly k. Counts have 64 bits without x64.

Shapes: a row is what a bracket belongs to. Rows are ranked each by itself, or jointly,
and then all have the same bracket.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Integer, UInt, UInt32

# One read of float32 costs the same for up to about so many counts.
CANDIDATES = 7


class Count(NamedTuple):
    """A 64-bit count in its upper and lower half; x64 need not be enabled."""

    high: UInt32[Any, "..."]  # of JAX or NumPy
    low: UInt32[Any, "..."]

    @classmethod
    def of(cls, counts: "Sequence[int] | Integer[Array, ' rows'] | Count") -> "Count":
        """Integers as counts (rows,); in an array, all below zero counts as zero."""
        if isinstance(counts, Count):
            return counts
        if isinstance(counts, jax.Array):
            counts = jnp.maximum(counts, 0)
            wide = counts.dtype.itemsize == 8
            high = counts >> 32 if wide else jnp.zeros_like(counts)
            return cls(high.astype(np.uint32), counts.astype(np.uint32))
        # NumPy's, because under `jit` an array of JAX's would be traced.
        return cls(
            np.array([count >> 32 for count in counts], np.uint32),
            np.array([count & 0xFFFFFFFF for count in counts], np.uint32),
        )

    def minus(self, other: "Count") -> "Count":
        """The difference of a count and one that is no larger."""
        borrow = (self.low < other.low).astype(np.uint32)
        return Count(self.high - other.high - borrow, self.low - other.low)

    def at_least(self, other: "Count") -> Bool[Array, "..."]:
        """Whether it is as large as the other."""
        return (self.high > other.high) | (
            (self.high == other.high) & (self.low >= other.low)
        )

    def at_most(self, other: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
        """The smaller of it and a uint32, as uint32."""
        return jnp.where(self.high > 0, other, jnp.minimum(self.low, other))

    def clipped(self, most: "Count") -> "Count":
        """It, or the other where that is smaller."""
        over = self.at_least(most)
        select = jnp.where if isinstance(over, jax.Array) else np.where
        return jax.tree.map(lambda a, b: select(over, b, a), self, most)


class Bracket(NamedTuple):
    """Positions between which each row's answer lies, and the counts at its ends."""

    low: UInt[Array, " rows"]  # the highest position known to count enough
    high: UInt[Array, " rows"]  # the highest position not known to count too few
    at: UInt32[Array, " rows"]  # the row's own count at `low`
    above: UInt32[Array, " rows"]  # the row's own count at `high` + 1

    def unsettled(self, target: Count, joint: bool) -> Bool[Array, " rows"]:
        """Rows that need another pass."""
        at = totals(self.at, joint)
        exact = (at.high == target.high) & (at.low == target.low)
        return (self.low < self.high) & ~exact


def candidates(bracket: Bracket) -> UInt[Array, "rows candidates"]:
    """Where to count next: ascending, over `low`, at most `high`, evenly."""
    low, width = bracket.low[:, None], (bracket.high - bracket.low)[:, None]
    place = jnp.arange(1, CANDIDATES + 1, dtype=low.dtype)[None]  # (1, candidates)
    # width * place / parts, rounded up, in an order that cannot overflow.
    parts = low.dtype.type(CANDIDATES + 1)
    remainder = (width % parts * place + parts - low.dtype.type(1)) // parts
    return low + width // parts * place + remainder


def narrowed(
    bracket: Bracket,
    places: UInt[Array, "rows candidates"],
    counts: UInt32[Array, "rows candidates"],
    target: Count,
    joint: bool,
) -> Bracket:
    """The bracket between two neighbouring candidates, or between one and an end."""
    goal = Count(target.high[:, None], target.low[:, None])
    enough = totals(counts, joint).at_least(goal)  # (rows, candidates)
    # Counts fall as candidates rise, so minima and maxima pick the neighbours.
    low, high, at, above = (end[:, None] for end in bracket)
    below = places - places.dtype.type(1)
    after = Bracket(
        jnp.max(jnp.where(enough, places, low), 1),
        jnp.min(jnp.where(enough, high, below), 1),
        jnp.min(jnp.where(enough, counts, at), 1),
        jnp.max(jnp.where(enough, above, counts), 1),
    )
    # The counts of a settled row may be zeros that were never counted.
    moves = bracket.unsettled(target, joint)
    return jax.tree.map(lambda x, y: jnp.where(moves, x, y), after, bracket)


def totals(counts: UInt32[Array, "rows ..."], joint: bool) -> Count:
    """What each row's target is compared with: its own count, or that of all rows."""
    if not joint:
        return Count(jnp.zeros_like(counts), counts)
    # Sums of 16-bit halves do not overflow for up to 2^16 rows.
    low = jnp.sum(counts & np.uint32(0xFFFF), 0, dtype=np.uint32, keepdims=True)
    high = jnp.sum(counts >> np.uint32(16), 0, dtype=np.uint32, keepdims=True)
    whole = (high << np.uint32(16)) + low
    high = (high >> np.uint32(16)) + (whole < low).astype(np.uint32)  # with the carry
    return Count(*(jnp.broadcast_to(half, counts.shape) for half in (high, whole)))
