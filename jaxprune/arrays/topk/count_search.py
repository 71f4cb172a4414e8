"""Finds the k-th largest of many values by bisection on exact counts.

Each pass counts, in one read, how many values lie at or above seven candidates, and
keeps the two candidates between which the k-th largest lies. Interpolation places the
candidates where the last pass went well, an even grid where it did not. So an order of
2^32 positions takes about twenty passes at the most and usually four. Counts have 64
bits without x64.

Shapes: a row is what a bracket belongs to. Rows are ranked each by itself, or jointly,
and then all have the same bracket.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Integer, UInt, UInt32

# One read of float32 costs the same for up to about so many counts.
CANDIDATES = 7
_PASSES_AT_ONCE = 3


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

    def real(self) -> Float[Array, "..."]:
        """The nearest float32, or one next to it."""
        high = self.high.astype(np.float32) * np.float32(2.0**32)
        return high + self.low.astype(np.float32)


class Order(NamedTuple):
    """How to count what lies at or above positions of an order.

    `counts` takes candidates (rows, `CANDIDATES`), ascending, and which rows still need
    a count (rows,), to the rows' counts: parts of uint32 (rows, `CANDIDATES`).
    """

    counts: Callable[[jax.Array, jax.Array], Sequence[jax.Array]]
    joint: Any  # whether the rows are ranked together, a bool scalar
    smooth: Any  # the widest bracket in which counts are taken to fall about evenly


class Bracket(NamedTuple):
    """What is known of where each row's answer lies."""

    low: UInt[Array, " rows"]  # the highest position known to count enough
    high: UInt[Array, " rows"]  # the highest position not known to count too few
    at: UInt32[Array, " rows"]  # the row's own count at `low`
    above: UInt32[Array, " rows"]  # the row's own count at `high` + 1


class _State(NamedTuple):
    """A bracket, where to count next, and which rows need it."""

    bracket: Bracket
    candidates: UInt[Array, "rows candidates"]
    unsettled: Bool[Array, " rows"]


def search(
    order: Order,
    target: Count,
    bracket: Bracket,
    guess: UInt[Array, "2 rows"] | None = None,
    *,
    traced: bool,
) -> Bracket:
    """Narrows each row's bracket to the highest position that counts enough.

    Args:
      order: counting of what lies at or above positions.
      target: count that is enough, (rows,); equal for all rows where they are joint.
      bracket: positions between which each row's answer is known to lie.
      guess: positions between which the answers probably lie, 0 where nothing is known.
      traced: whether this is part of a larger program. If not, every count may be a
        program of its own; the host waits once in a few passes.

    Returns:
      Brackets whose `low` counts exactly the target, or is equal to `high`.
    """
    rule = order.joint, order.smooth

    def narrow(state: _State) -> _State:
        counts = order.counts(state.candidates, state.unsettled)
        return _narrowed(state, counts, target, *rule)

    state = _begun(bracket, target, guess, *rule)
    if traced:

        def narrow_apart(state: _State) -> _State:
            # The candidates are sorted already. But XLA compiles a loop without a sort
            # as one function on a CPU, which takes it twice as long for 100 leaves.
            state = narrow(state)
            return state._replace(candidates=jnp.sort(state.candidates, 1))

        return jax.lax.while_loop(_any_unsettled, narrow_apart, state).bracket
    while np.asarray(state.unsettled).any():
        # A pass too many costs little: settled rows are not read again.
        for _ in range(_PASSES_AT_ONCE):
            state = narrow(state)
    return state.bracket


def full_bracket(sizes: UInt32[Array, " rows"], top: Any) -> Bracket:
    """The bracket that holds any answer: all count at 0, none at the top."""
    low, high = jnp.zeros(sizes.shape, top.dtype), jnp.full(sizes.shape, top)  # (rows,)
    return Bracket(low, high, sizes, jnp.zeros_like(sizes))


def _any_unsettled(state: _State) -> Bool[Array, ""]:
    return jnp.any(state.unsettled)


def totals(counts: UInt32[Array, "rows ..."], joint: Any) -> Count:
    """What each row's target is compared with: its own count, or that of all rows."""
    # Sums of 16-bit halves do not overflow for up to 2^16 rows.
    low = jnp.sum(counts & np.uint32(0xFFFF), 0, dtype=np.uint32, keepdims=True)
    high = jnp.sum(counts >> np.uint32(16), 0, dtype=np.uint32, keepdims=True)
    whole = (high << np.uint32(16)) + low
    carry = (whole < low).astype(np.uint32)
    high = jnp.where(joint, (high >> np.uint32(16)) + carry, np.uint32(0) * counts)
    return Count(high, jnp.where(joint, whole, counts))


@jax.jit
def _begun(
    bracket: Bracket, target: Count, guess: Any, joint: Any, smooth: Any
) -> _State:
    quick = jnp.ones(bracket.low.shape, bool)
    candidates = _next(bracket, target, quick, joint, smooth)
    if guess is not None:
        known = guess[1, :, None] > 0
        candidates = jnp.where(known, _about(guess, bracket), candidates)
    return _State(bracket, candidates, _unsettled(bracket, target, joint))


@jax.jit
def _narrowed(
    state: _State,
    counts: Sequence[UInt32[Array, "some candidates"]],
    target: Count,
    joint: Any,
    smooth: Any,
) -> _State:
    """The state after a pass; next candidates are made here, once for all leaves."""
    bracket, counted = state.bracket, jnp.concatenate(counts)  # (rows, candidates)
    goal = Count(target.high[:, None], target.low[:, None])
    enough = totals(counted, joint).at_least(goal)  # (rows, candidates)
    narrowed = _between(bracket, state.candidates, counted, enough)
    # A settled row was not read in this pass: its counts are zeros.
    narrowed = jax.tree.map(
        lambda x, y: jnp.where(state.unsettled, x, y), narrowed, bracket
    )
    # A pass by interpolation that leaves over a quarter is followed by an even grid,
    # which leaves an eighth: two passes narrow a bracket by eight whatever the scores.
    quick = narrowed.high - narrowed.low <= (bracket.high - bracket.low) // 4
    candidates = _next(narrowed, target, quick, joint, smooth)
    return _State(narrowed, candidates, _unsettled(narrowed, target, joint))


def _unsettled(bracket: Bracket, target: Count, joint: Any) -> Bool[Array, " rows"]:
    at = totals(bracket.at, joint)
    exact = (at.high == target.high) & (at.low == target.low)
    return (bracket.low < bracket.high) & ~exact


def _next(
    bracket: Bracket,
    target: Count,
    quick: Bool[Array, " rows"],
    joint: Any,
    smooth: Any,
) -> UInt[Array, "rows candidates"]:
    """Where to count next: ascending, over `low`, at most `high`."""
    low, width = bracket.low[:, None], (bracket.high - bracket.low)[:, None]
    place = jnp.arange(1, CANDIDATES + 1, dtype=low.dtype)[None]  # (1, candidates)
    # An even grid: width * place / parts, rounded up, in an order that cannot overflow.
    parts = low.dtype.type(CANDIDATES + 1)
    remainder = (width % parts * place + parts - low.dtype.type(1)) // parts
    even = width // parts * place + remainder  # (rows, candidates)

    # Interpolation: inside the bracket the count falls from `at` to `above`. If it fell
    # on a line, the target would be reached after this share of the width.
    at, above = totals(bracket.at, joint), totals(bracket.above, joint)
    inside = jnp.maximum(at.minus(above).real(), np.float32(1))  # (rows,)
    share = jnp.minimum(at.minus(target).real() / inside, np.float32(1))
    # How far off that may be, as a share of the width: 1.5 standard deviations of the
    # quantile of so many values that are drawn evenly, and, where the density changes
    # along the bracket, a part that grows with the width (it halves within `smooth`).
    real = width[:, 0].astype(np.float32)
    error = 1.5 * jnp.sqrt(share * (1 - share) / inside)
    curve = real / (np.float32(16) * jnp.asarray(smooth).astype(np.float32))
    step = jnp.round(real * (error + curve)) + np.float32(1)
    # The candidates are one such step apart, the middle one at the share.
    offset = place.astype(np.float32) - np.float32((CANDIDATES + 1) // 2)
    near = jnp.round(share * real)[:, None] + offset * step[:, None]
    near = jnp.clip(near, np.float32(1), real[:, None]).astype(low.dtype)
    near = jnp.minimum(near, width)  # float32 may have rounded the width up

    # Steps as wide as the grid's promise no more than the grid.
    useful = quick & (np.float32(CANDIDATES + 1) * step < real)
    useful &= width[:, 0] <= smooth
    return low + jnp.where(useful[:, None], near, even)


def _about(
    guess: UInt[Array, "2 rows"], bracket: Bracket
) -> UInt[Array, "rows candidates"]:
    """Candidates in and around a guess, ascending; the outer ones for a bad guess."""
    unsigned = guess.dtype.type
    low, high = (
        bracket.low + unsigned(1),
        jnp.maximum(bracket.high, bracket.low + unsigned(1)),
    )
    lower, upper = jnp.clip(guess[0], low, high), jnp.clip(guess[1], low, high)
    unit, middle = (
        (upper - lower) // unsigned(4) + unsigned(1),
        lower + (upper - lower) // unsigned(2),
    )
    unit = jnp.minimum(unit, unsigned(np.iinfo(guess.dtype).max // 8))
    down = [middle - jnp.minimum(unit * unsigned(n), middle - low) for n in (8, 2, 1)]
    up = [middle + jnp.minimum(unit * unsigned(n), high - middle) for n in (1, 2, 8)]
    return jnp.stack([*down, middle, *up], 1)


def _between(
    bracket: Bracket,
    candidates: UInt[Array, "rows candidates"],
    counts: UInt32[Array, "rows candidates"],
    enough: Bool[Array, "rows candidates"],
) -> Bracket:
    """The bracket between two neighbouring candidates, or between one and an end."""
    # Counts fall as candidates rise, so minima and maxima pick the neighbours.
    low, high = bracket.low[:, None], bracket.high[:, None]
    at, above = bracket.at[:, None], bracket.above[:, None]
    below = candidates - candidates.dtype.type(1)
    return Bracket(
        jnp.max(jnp.where(enough, candidates, low), 1),
        jnp.min(jnp.where(enough, high, below), 1),
        jnp.min(jnp.where(enough, counts, at), 1),
        jnp.max(jnp.where(enough, above, counts), 1),
    )
