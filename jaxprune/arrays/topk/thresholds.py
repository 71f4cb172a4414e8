"""The k highest of many scores, exactly, by counting.

The threshold is found digit by digit in the order of the floats. Nothing is sorted,
joined or gathered, so it works on any sharding; leaves are only read, and masks are
made leaf by leaf from a `Cut`. Ties keep the first by (leaf, flat index). NaN ranks
lowest, under minus infinity. Counts are Python integers of any size, or integers traced
by `jit`: one compiled program then serves every count.

One search has two levels: the threshold among the positions of floats, then, of what is
equal to the threshold, the flat index under which ties are kept. A row, in the shapes
below, is what is ranked: a whole leaf, or a slice of a matrix.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Integer, UInt, UInt32

from jaxprune.arrays import low_bit, placement
from jaxprune.arrays.topk import count_search, float_order
from jaxprune.arrays.topk.count_search import Bracket, Count
from jaxprune.arrays.topk.float_order import Line


class Cut(NamedTuple):
    """Where a leaf is cut: kept is what ranks above the threshold, or early ties."""

    threshold: Int[Array, "*rows"]  # the rank of the lowest score that is kept
    bound: UInt32[Array, "*rows"]  # the flat index under which ties are kept


def cut_together(
    scores: Sequence[Float[Array, "..."]], kept: int | Integer[Array, ""] | Count
) -> list[Cut]:
    """Cuts that keep the `kept` highest scores of all leaves together.

    Args:
      scores: arrays of any shape and floating dtype; each has under 2^32 elements.
      kept: number to keep, 0 to the number of scores; an integer array or, for counts
        over 32 bits, a `Count` of shape (1,) may be traced, and out of range it counts
        as the nearest number in range.

    Returns:
      One cut a leaf; their masks are True exactly `kept` times.

    Raises:
      ValueError: `kept` is a Python integer out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxprune.arrays.topk import thresholds
      >>> scores = jnp.array([3.0, 1.0, 3.0])
      >>> [cut] = thresholds.cut_together([scores], 1)
      >>> thresholds.above_cut(scores, cut).tolist()
      [True, False, False]
    """
    size = sum(leaf.size for leaf in scores)
    if isinstance(kept, jax.Array):
        kept = Count.of(kept.reshape(1))
    elif not isinstance(kept, Count):
        kept = Count.of([_checked(kept, size)])
    return _by_leaf(_cut(scores, kept, joint=True), len(scores))


def cut_each(
    scores: Sequence[Float[Array, "..."]],
    kept: Sequence[int] | Integer[Array, " leaves"],
) -> list[Cut]:
    """Cuts that keep the highest scores of each leaf by itself.

    Args:
      scores: arrays of any shape and floating dtype; each has under 2^32 elements.
      kept: numbers to keep of each, 0 to its size; an integer array may be traced, and
        out of range it counts as the nearest number in range.

    Returns:
      One cut a leaf; its mask is True exactly so many times.

    Raises:
      ValueError: a Python integer is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxprune.arrays.topk import thresholds
      >>> scores = [jnp.array([3.0, 1.0]), jnp.array([5.0, 7.0])]
      >>> cuts = thresholds.cut_each(scores, [1, 1])
      >>> [thresholds.above_cut(*pair).tolist() for pair in zip(scores, cuts)]
      [[True, False], [False, True]]
    """
    if isinstance(kept, jax.Array):
        number = Count.of(kept)
    else:
        pairs = zip(kept, scores, strict=True)
        number = Count.of([_checked(count, leaf.size) for count, leaf in pairs])
    cuts: dict[int, Cut] = {}
    # Positions of one search have one width, so each dtype is searched by itself.
    for dtype in dict.fromkeys(leaf.dtype for leaf in scores):
        indices = [i for i, leaf in enumerate(scores) if leaf.dtype == dtype]
        leaves = [scores[i] for i in indices]
        target = jax.tree.map(
            lambda half, indices=indices: half[np.array(indices)], number
        )
        leaf_cuts = _by_leaf(_cut(leaves, target, joint=False), len(leaves))
        cuts.update(zip(indices, leaf_cuts, strict=True))
    return [cuts[i] for i in range(len(scores))]


def cut_rows(scores: Float[Array, "rows ..."], kept: int) -> Cut:
    """The cut that keeps the `kept` highest scores of each row by itself.

    Args:
      scores: floating array; each index of the first axis is a row of under 2^32.
      kept: number to keep of each row, 0 to its size.

    Returns:
      A cut with an axis of rows.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxprune.arrays.topk import thresholds
      >>> scores = jnp.array([[3.0, 1.0], [5.0, 7.0]])
      >>> thresholds.above_cut(scores, thresholds.cut_rows(scores, 1)).tolist()
      [[True, False], [False, True]]
    """
    rows, *row = scores.shape
    target = Count.of([_checked(kept, math.prod(row))] * rows)
    return _cut([scores], target, joint=False, by_row=True)


@functools.partial(jax.jit, static_argnames="axis")
def highest(
    scores: Float[Array, "..."], kept: Any, axis: int | None = None
) -> Bool[Array, "..."]:
    """The mask of exactly the `kept` highest scores.

    Args:
      scores: floats of any shape, under 2^32 of them.
      kept: number to keep, an integer, traced or not; of each slice along `axis` if one
        is given, and then also an array that broadcasts over the slices (the scores'
        shape without the axis). Out of range it counts as the nearest that is in range.
      axis: axis along which each slice is ranked by itself; None ranks the whole array.

    Returns:
      Booleans of the scores' shape; ties keep the first by flat index, or along the
      axis.

    Raises:
      TypeError: the scores are not floating, or `kept` is no integer.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxprune.arrays.topk.thresholds import highest
      >>> highest(jnp.array([2.0, 1.0, 2.0, 3.0]), 2).tolist()
      [True, False, False, True]
    """
    scores, kept = jnp.asarray(scores), jnp.asarray(kept)
    if not jnp.issubdtype(scores.dtype, jnp.floating):
        raise TypeError(f"highest needs floating scores, got {scores.dtype}")
    if not jnp.issubdtype(kept.dtype, jnp.integer):
        raise TypeError(f"highest needs an integer kept, got {kept.dtype}")
    if not scores.size:
        return jnp.zeros(scores.shape, bool)
    slices = scores.reshape(-1) if axis is None else jnp.moveaxis(scores, axis, -1)
    number = jnp.broadcast_to(kept, slices.shape[:-1]).ravel()  # (rows,)
    rows = slices.reshape(number.size, slices.shape[-1])  # (rows, length)
    kept_mask = above_cut(
        rows, _cut([rows], Count.of(number), joint=False, by_row=True)
    )
    if axis is None:
        return kept_mask.reshape(scores.shape)
    return jnp.moveaxis(kept_mask.reshape(slices.shape), -1, axis)


def above_cut(scores: Float[Array, "..."], cut: Cut) -> Bool[Array, "..."]:
    """The mask of a leaf, sharded like it; the cut's axes are the leaf's first ones."""
    rows = cut.bound.ndim
    across = cut.bound.shape + (1,) * (scores.ndim - rows)
    ranks, least = float_order.of(scores, cut.threshold.dtype), cut.threshold
    index = jnp.expand_dims(low_bit.flat_index(scores.shape[rows:]), range(rows))
    early, least = index < cut.bound.reshape(across), least.reshape(across)
    return (ranks > least) | ((ranks == least) & early)


@jax.jit
def keeps_any(scores: Float[Array, "..."], cut: Cut) -> Bool[Array, ""]:
    """Whether a leaf's cut keeps any of it; without a mask, which would take memory."""
    highest = float_order.of(jnp.max(scores, initial=-jnp.inf), cut.threshold.dtype)
    return (highest > cut.threshold) | ((highest == cut.threshold) & (cut.bound > 0))


def _checked(kept: int, size: int) -> int:
    if not 0 <= kept <= size:
        raise ValueError(f"kept must be 0 to {size}, the number of scores, got {kept}")
    return kept


_PASSES_AT_ONCE = 3  # between two moments at which the host waits


class _State(NamedTuple):
    """A bracket, where to count next, and which rows need it."""

    bracket: Bracket
    candidates: UInt[Array, "rows candidates"]
    unsettled: Bool[Array, " rows"]


def _cut(
    leaves: Sequence[jax.Array], target: Count, *, joint: bool, by_row: bool = False
) -> Cut:
    """The cuts (rows,) of one ranking of all leaves together, or of one of each row.

    A row is a leaf or, `by_row`, a row of the only leaf. Targets (rows,), or (1,) if
    joint, are clipped to the range.
    """
    traced = any(isinstance(x, jax.core.Tracer) for x in [*leaves, *target])
    with placement.at_once([*leaves, *target]):
        line = Line.of(*(leaf.dtype for leaf in leaves))
        size = [leaf.size for leaf in leaves]
        numbers: Any = _numbers(len(leaves)) if traced else range(len(leaves))
        if by_row:
            size = [math.prod(leaves[0].shape[1:])] * len(leaves[0])
            numbers = [None]
        sizes = np.array(size, np.uint32)  # (rows,)
        target = target.clipped(Count.of([sum(size)] if joint else size))
        # Counts of pipeline stages, on several devices, meet on the host.
        arrays = [leaf for leaf in leaves if placement.is_concrete(leaf)]
        apart = len({placement.devices(leaf) for leaf in arrays}) > 1

        def search(state: _State, target: Count, joint: bool, tied: Any) -> Bracket:
            def narrow(state: _State) -> _State:
                counts = [
                    _count(leaf, i, state.candidates, state.unsettled, tied, line)
                    for i, leaf in zip(numbers, leaves, strict=True)
                ]
                counts = jax.device_get(counts) if apart else counts
                return _narrowed(state, counts, target, joint=joint)

            def narrow_apart(state: _State) -> _State:
                # The candidates are sorted already. But XLA compiles a loop without a
                # sort as one function on a CPU: twice as long for 100 leaves.
                state = narrow(state)
                return state._replace(candidates=jnp.sort(state.candidates, 1))

            def goes_on(state: _State) -> Bool[Array, ""]:
                return jnp.any(state.unsettled)

            state = placement.varying(state, leaves)
            if traced:
                return jax.lax.while_loop(goes_on, narrow_apart, state).bracket
            while np.asarray(state.unsettled).any():
                # A pass too many costs little: settled rows are not read again.
                for _ in range(_PASSES_AT_ONCE):
                    state = narrow(state)
            return state.bracket

        # First the thresholds, then the flat indices among what is equal to them.
        start, target = _first(sizes, target, line=line, joint=joint)
        found = search(start, target, joint, None)
        start, ties = _ties(found, target, sizes, joint=joint)
        return _as_cut(found, search(start, ties, False, found.low), ties, sizes, line)


def _state(bracket: Bracket, target: Count, joint: bool) -> _State:
    unsettled = bracket.unsettled(target, joint)
    return _State(bracket, count_search.candidates(bracket), unsettled)


@functools.partial(jax.jit, static_argnames=("line", "joint"))
def _first(
    sizes: UInt32[Array, " rows"], target: Count, *, line: Line, joint: bool
) -> tuple[_State, Count]:
    """The search of thresholds: all scores count at position 0, none at the top."""
    target = jax.tree.map(lambda half: jnp.broadcast_to(half, sizes.shape), target)
    low = jnp.zeros(sizes.shape, line.unsigned)
    high = jnp.full_like(low, line.unsigned.type(line.top))
    bracket = Bracket(low, high, sizes, jnp.zeros_like(sizes))
    return _state(bracket, target, joint), target


@functools.partial(jax.jit, static_argnames="joint")
def _narrowed(
    state: _State, counts: Sequence[jax.Array], target: Count, *, joint: bool
) -> _State:
    """The state after a pass; next candidates are made here, once for all leaves."""
    counted = jnp.concatenate(counts)  # (rows, candidates)
    bracket = count_search.narrowed(
        state.bracket, state.candidates, counted, target, joint
    )
    return _state(bracket, target, joint)


@functools.partial(jax.jit, static_argnames="joint")
def _ties(
    bracket: Bracket, target: Count, sizes: UInt32[Array, " rows"], *, joint: bool
) -> tuple[_State, Count]:
    """The search among scores equal to the thresholds, and how many of them are kept.

    Their positions are places from the end, 1 to the size, so that counts fall as
    positions rise.
    """
    spare = target.minus(count_search.totals(bracket.above, joint))
    tied = bracket.at - bracket.above  # (rows,) scores equal to the row's threshold

    def take(spare: Count, ties: jax.Array) -> tuple[Count, jax.Array]:
        taken_ties = spare.at_most(ties)
        return spare.minus(Count(jnp.zeros_like(taken_ties), taken_ties)), taken_ties

    ties_kept = spare.low
    if joint:  # the first leaves' ties first
        first = jax.tree.map(lambda half: half[0], spare)
        ties_kept = jax.lax.scan(take, first, tied)[1]
    # A row that keeps all its ties, or none, has nothing to look for.
    none, one = jnp.zeros_like(tied), jnp.ones_like(bracket.low)
    last = jnp.where((ties_kept > 0) & (ties_kept < tied), sizes, np.uint32(1))
    kept = Count(none, ties_kept)
    return _state(Bracket(one, last.astype(one.dtype), tied, none), kept, False), kept


# In a larger program too: leaves of a shape are traced and lowered once.
@functools.partial(jax.jit, static_argnames="line")
def _count(
    leaf: Float[Array, "..."],
    i: Any,
    candidates: UInt[Array, "rows candidates"],
    unsettled: Bool[Array, " rows"],
    tied: UInt[Array, " rows"] | None,
    line: Line,
) -> UInt32[Array, "some candidates"]:
    """How many of a leaf, row `i` or all rows (None), lie at or above candidates.

    Candidates are positions of scores or, of those at the position `tied`, places from
    the row's end. Without an unsettled row the leaf is not read.
    """

    def row_of(values: jax.Array) -> jax.Array:
        if i is None:  # all rows are this leaf's
            return values
        return jax.lax.dynamic_index_in_dim(values, i, 0)  # (1, ...)

    def count(leaf: jax.Array, candidates: jax.Array) -> jax.Array:
        rows = leaf if i is None else leaf[None]  # (rows, ...)
        across = (len(rows),) + (1,) * (rows.ndim - 1)
        keys, least = float_order.of(rows, line.signed), row_of(candidates)
        if tied is None:
            least = line.rank(least)
        else:
            is_tied = keys == line.rank(row_of(tied)).reshape(across)
            length = np.uint32(math.prod(rows.shape[1:]))
            keys = length - low_bit.flat_index(rows.shape[1:])[None]  # 1 is the last
            keys = jnp.where(is_tied, keys, np.uint32(0)).astype(line.unsigned)
        flags = [keys >= least[:, k].reshape(across) for k in range(least.shape[1])]
        counts = jnp.stack(float_order.count_true(flags, range(1, rows.ndim)), 1)
        mesh = jax.typeof(counts).sharding.mesh
        if i is None and mesh.explicit_axes:  # few, and every device goes on with all
            return jax.sharding.reshard(counts, NamedSharding(mesh, PartitionSpec()))
        return counts

    def nothing(leaf: jax.Array, candidates: jax.Array) -> jax.Array:
        zeros = jnp.zeros(row_of(candidates).shape, np.uint32)
        return placement.varying(zeros, [leaf, candidates])

    # XLA would take what is made of the leaf alone out of the loop over passes, and
    # keep it in memory; behind the barrier it depends on the pass.
    operands = jax.lax.optimization_barrier((leaf, candidates))
    return jax.lax.cond(jnp.any(row_of(unsettled)), count, nothing, *operands)


@functools.partial(jax.jit, static_argnames="line")
def _as_cut(
    found: Bracket, last: Bracket, ties: Count, sizes: jax.Array, line: Line
) -> Cut:
    bound = sizes + np.uint32(1) - last.low.astype(np.uint32)
    return Cut(line.rank(found.low), jnp.where(ties.low > 0, bound, np.uint32(0)))


@functools.partial(jax.jit, static_argnames="size")
def _by_leaf(cut: Cut, size: int) -> list[Cut]:
    """A cut with axes as one cut for each of so many leaves."""
    take = functools.partial(jax.lax.dynamic_index_in_dim, axis=0, keepdims=False)
    return [Cut(*(take(x, row) for x in cut)) for row in _numbers(size)]


def _numbers(size: int) -> list[jax.Array]:
    """0, 1, 2, ..., hidden from XLA."""
    # It compiles equal pieces of a program once; what it does for one leaf and for
    # another of its shape would differ by a constant.
    return jax.lax.optimization_barrier([np.uint32(n) for n in range(size)])
