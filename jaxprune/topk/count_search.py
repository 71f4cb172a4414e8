"""The highest position of an order that counts enough, by a few exact counts at a time.

Each pass counts what lies at or above seven candidates, in one read, and keeps the two
between which the answer lies. Interpolation chooses the candidates where the last pass
went well, an even grid where it did not, so an order of 2^32 positions never takes more
than about twenty passes and usually takes four. Counts are 64 bits without x64.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# One read of float32 costs the same for up to about so many counts.
CANDIDATES = 7
_PASSES_AT_ONCE = 3


class Count(NamedTuple):
    """A 64-bit count in two uint32 halves; x64 need not be enabled.

    Attributes:
      high: the upper half.
      low: the lower half.
    """

    high: jax.Array
    low: jax.Array

    def minus(self, other: "Count") -> "Count":
        """The difference of a count and one that is no larger."""
        borrow = (self.low < other.low).astype(np.uint32)
        return Count(self.high - other.high - borrow, self.low - other.low)

    def at_least(self, other: "Count") -> jax.Array:
        """Whether it is as large as the other."""
        return (self.high > other.high) | (
            (self.high == other.high) & (self.low >= other.low)
        )

    def at_most(self, other: jax.Array) -> jax.Array:
        """The smaller of it and a uint32, as uint32."""
        return jnp.where(self.high > 0, other, jnp.minimum(self.low, other))

    def real(self) -> jax.Array:
        """About the same, as float32."""
        high = self.high.astype(np.float32) * np.float32(2.0**32)
        return high + self.low.astype(np.float32)


def split(counts: Sequence[int]) -> Count:
    """Python integers as 64-bit counts, (len(counts),)."""
    return Count(
        jnp.array([count >> 32 for count in counts], np.uint32),
        jnp.array([count & 0xFFFFFFFF for count in counts], np.uint32),
    )


class Order(NamedTuple):
    """How to count what lies at or above positions.

    A group is what is ranked together: one leaf, or all leaves, and then its axis has
    length 1 and broadcasts against the leaves'.

    Attributes:
      counts: candidates (groups, `CANDIDATES`), ascending, and which groups still look
        for their answer (groups,), to the leaves' counts, each uint32 (`CANDIDATES`,).
      joint: whether all leaves are one group.
      smooth: the widest bracket in which counts are taken to fall about evenly.
    """

    counts: Callable[[jax.Array, jax.Array], Sequence[jax.Array] | jax.Array]
    joint: bool
    smooth: int


class Bracket(NamedTuple):
    """What is known of where each group's answer lies.

    Attributes:
      low: the highest position known to count enough, (groups,).
      high: the highest position not known to count too few, (groups,).
      at: the leaves' counts at `low`, uint32 (leaves,).
      above: the leaves' counts at `high` + 1, uint32 (leaves,).
    """

    low: jax.Array
    high: jax.Array
    at: jax.Array
    above: jax.Array


class _State(NamedTuple):
    """A bracket, where to count next, and for which groups there is a need."""

    bracket: Bracket
    candidates: jax.Array
    wanted: jax.Array


def search(
    order: Order,
    target: Count,
    bracket: Bracket,
    guess: jax.Array | None = None,
    *,
    traced: bool,
) -> Bracket:
    """Narrows each group's bracket to the highest position that counts enough.

    Args:
      order: counts at or above positions.
      target: what is enough, (groups,).
      bracket: what is known.
      guess: two positions, (2, groups), between which the answers probably are; it can
        only change the number of passes.
      traced: whether this is part of a larger program. If not, every count may be a
        program of its own; the host waits once in a few passes.

    Returns:
      Brackets whose `low` counts exactly the target, or is equal to `high`.
    """
    fixed = {"joint": order.joint, "smooth": order.smooth}

    def narrow(state: _State) -> _State:
        counts = order.counts(state.candidates, state.wanted)
        return _narrowed(state, counts, target, **fixed)

    state = _begun(bracket, target, guess, **fixed)
    if traced:
        return jax.lax.while_loop(lambda s: jnp.any(s.wanted), narrow, state).bracket
    while np.any(state.wanted):
        for _ in range(_PASSES_AT_ONCE):
            state = narrow(state)
    return state.bracket


def totals(counts: jax.Array, *, joint: bool) -> Count:
    """Counts of leaves (leaves, ...) as those of groups (groups, ...), 64 bits."""
    if not joint:
        return Count(jnp.zeros_like(counts), counts)
    low = jnp.sum(counts & np.uint32(0xFFFF), 0, dtype=np.uint32, keepdims=True)
    high = jnp.sum(counts >> np.uint32(16), 0, dtype=np.uint32, keepdims=True)
    whole = (high << np.uint32(16)) + low
    carry = (whole < low).astype(np.uint32)
    return Count((high >> np.uint32(16)) + carry, whole)


@functools.partial(jax.jit, static_argnames=("joint", "smooth"))
def _begun(
    bracket: Bracket,
    target: Count,
    guess: jax.Array | None,
    *,
    joint: bool,
    smooth: int,
) -> _State:
    if guess is not None:
        candidates = _about(guess, bracket)
    else:
        quick = jnp.ones(bracket.low.shape, bool)
        candidates = _next(bracket, target, quick, joint=joint, smooth=smooth)
    return _State(bracket, candidates, _unsettled(bracket, target, joint=joint))


@functools.partial(jax.jit, static_argnames=("joint", "smooth"))
def _narrowed(
    state: _State,
    counts: Sequence[jax.Array] | jax.Array,
    target: Count,
    *,
    joint: bool,
    smooth: int,
) -> _State:
    """The state after a pass.

    The next candidates are part of it: computed here once, not by each leaf's count.
    """
    bracket, stacked = state.bracket, jnp.stack(counts)
    goal = Count(target.high[:, None], target.low[:, None])
    enough = totals(stacked, joint=joint).at_least(goal)
    found = _between(bracket, state.candidates, stacked, enough)
    found = jax.tree.map(lambda x, y: jnp.where(state.wanted, x, y), found, bracket)
    quick = found.high - found.low <= (bracket.high - bracket.low) // 4
    candidates = _next(found, target, quick, joint=joint, smooth=smooth)
    return _State(found, candidates, _unsettled(found, target, joint=joint))


def _unsettled(bracket: Bracket, target: Count, *, joint: bool) -> jax.Array:
    at = totals(bracket.at, joint=joint)
    exact = (at.high == target.high) & (at.low == target.low)
    return (bracket.low < bracket.high) & ~exact


def _next(
    bracket: Bracket, target: Count, quick: jax.Array, *, joint: bool, smooth: int
) -> jax.Array:
    """Where to count next, over `low`, (groups, candidates), ascending."""
    low, width = bracket.low[:, None], (bracket.high - bracket.low)[:, None]
    place = jnp.arange(1, CANDIDATES + 1, dtype=low.dtype)[None]
    parts = low.dtype.type(CANDIDATES + 1)
    rest = (width % parts * place + parts - low.dtype.type(1)) // parts
    even = width // parts * place + rest

    at, above = totals(bracket.at, joint=joint), totals(bracket.above, joint=joint)
    inside = jnp.maximum(at.minus(above).real(), np.float32(1))
    share = jnp.minimum(at.minus(target).real() / inside, np.float32(1))
    # What the counts leave open inside the bracket, and that they may fall on a curve.
    real = width[:, 0].astype(np.float32)
    error = 1.5 * jnp.sqrt(share * (1 - share) / inside)
    step = jnp.round(real * (error + real / np.float32(16 * smooth))) + np.float32(1)
    offset = place.astype(np.float32) - np.float32((CANDIDATES + 1) // 2)
    near = jnp.round(share * real)[:, None] + offset * step[:, None]
    near = jnp.clip(near, np.float32(1), real[:, None]).astype(low.dtype)
    near = jnp.minimum(near, width)  # float32 may have rounded the width up

    useful = quick & (np.float32(CANDIDATES + 1) * step < real)
    useful &= width[:, 0] <= low.dtype.type(smooth)
    return low + jnp.where(useful[:, None], near, even)


def _about(guess: jax.Array, bracket: Bracket) -> jax.Array:
    """Candidates in and around a guess, (groups, candidates), ascending."""
    kind = guess.dtype.type
    low, high = bracket.low + kind(1), jnp.maximum(bracket.high, bracket.low + kind(1))
    left, right = jnp.clip(guess[0], low, high), jnp.clip(guess[1], low, high)
    unit, middle = (right - left) // kind(4) + kind(1), left + (right - left) // kind(2)
    unit = jnp.minimum(unit, kind(np.iinfo(guess.dtype).max // 8))
    down = [middle - jnp.minimum(unit * kind(n), middle - low) for n in (8, 2, 1)]
    up = [middle + jnp.minimum(unit * kind(n), high - middle) for n in (1, 2, 8)]
    return jnp.stack([*down, middle, *up], 1)


def _between(
    bracket: Bracket, candidates: jax.Array, counts: jax.Array, enough: jax.Array
) -> Bracket:
    """The bracket between two neighbouring candidates, or between one and an end.

    Counts fall as candidates rise, so minima and maxima pick the neighbours.
    """
    low, high = bracket.low[:, None], bracket.high[:, None]
    at, above = bracket.at[:, None], bracket.above[:, None]
    below = candidates - candidates.dtype.type(1)
    return Bracket(
        jnp.max(jnp.where(enough, candidates, low), 1),
        jnp.min(jnp.where(enough, high, below), 1),
        jnp.min(jnp.where(enough, counts, at), 1),
        jnp.max(jnp.where(enough, above, counts), 1),
    )
