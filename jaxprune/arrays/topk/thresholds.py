"""The k highest of many scores, exactly, by counting.

The threshold is found by narrowing a bracket of positions in the order of the floats. A
sample says where to begin, exact counts decide. Nothing is sorted, joined or gathered,
so it works on any sharding; leaves are only read, a few times, and masks are made leaf
by leaf from a `Cut`. Ties keep the first by (leaf, flat index). NaN ranks lowest, under
minus infinity. Counts are Python integers of any size, or integers traced by `jit`: one
compiled program then serves every count.

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
from jaxprune.arrays.topk import count_search, float_order, sampling
from jaxprune.arrays.topk.count_search import Bracket, Count, Order
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


class _Level(NamedTuple):
    """One level of the search: where it begins, and the result of the level before."""

    place: UInt[Array, " rows"]  # the positions of the thresholds
    bound: UInt32[Array, " rows"]  # the flat index under which ties are kept
    target: Count  # how much counts enough: of all scores, then of each row's ties
    bracket: Bracket
    guess: UInt[Array, "2 rows"]
    joint: Bool[Array, ""]
    smooth: UInt[Array, ""]


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
        rows: Any = _numbers(len(leaves)) if traced else range(len(leaves))
        if by_row:
            size = [math.prod(leaves[0].shape[1:])] * len(leaves[0])
            rows = [None]
        sizes = np.array(size, np.uint32)  # (rows,)
        target = target.clipped(Count.of([sum(size)] if joint else size))
        apart = not traced and _are_apart(leaves)
        guess = None
        if not (by_row or apart):
            guess = sampling.guess(leaves, target, line, joint=joint)

        def search_level(level: _Level, ties: bool) -> _Level:
            def counts(candidates: jax.Array, unsettled: jax.Array) -> list[jax.Array]:
                leaf_counts = [
                    _count(leaf, row, level.place, candidates, unsettled, line, ties)
                    for leaf, row in zip(leaves, rows, strict=True)
                ]
                # Counts of pipeline stages, on several devices, meet on the host.
                return jax.device_get(leaf_counts) if apart else leaf_counts

            order = Order(counts, level.joint, level.smooth)
            start = level.target, level.bracket, level.guess
            bracket = count_search.search(order, *start, traced=traced)
            after = _next_level(level, bracket, sizes, ties, joint=joint)
            return _varying(after, leaves)

        level = _first_level(sizes, target, guess, line=line, joint=joint)
        level = _varying(level, leaves)
        # First the thresholds, then the flat indices among what is equal to them.
        level = search_level(search_level(level, False), True)
        return _as_cut(level, line)


def _are_apart(leaves: Sequence[Any]) -> bool:
    """Whether arrays lie on different devices; NumPy's lie on none."""
    arrays = [leaf for leaf in leaves if isinstance(leaf, jax.Array)]
    return len({placement.devices(leaf) for leaf in arrays}) > 1


def _varying(tree: Any, like: Sequence[Any]) -> Any:
    """The tree, inside of `shard_map`, as different on each device as these arrays."""

    def varying(x: Any) -> frozenset[Any]:
        return jax.typeof(x).manual_axis_type.varying

    def vary(x: jax.Array) -> jax.Array:
        missing = tuple(axes - varying(x))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    axes = frozenset().union(*map(varying, like))
    return jax.tree.map(vary, tree) if axes else tree


@functools.partial(jax.jit, static_argnames=("line", "joint"))
def _first_level(
    sizes: UInt32[Array, " rows"], target: Count, guess: Any, *, line: Line, joint: bool
) -> _Level:
    """The thresholds among the positions of floats."""
    unsigned = line.unsigned.type
    bracket = count_search.full_bracket(sizes, unsigned(line.top))
    target = jax.tree.map(lambda half: jnp.broadcast_to(half, sizes.shape), target)
    guess = jnp.broadcast_to(unsigned(0) if guess is None else guess, (2, sizes.size))
    rule = jnp.asarray(joint), jnp.asarray(unsigned(line.octave))
    return _Level(bracket.low, jnp.zeros_like(sizes), target, bracket, guess, *rule)


@functools.partial(jax.jit, static_argnames="joint")
def _next_level(
    level: _Level,
    bracket: Bracket,
    sizes: UInt32[Array, " rows"],
    ties: bool,
    *,
    joint: bool,
) -> _Level:
    """A search's result and, after that of the thresholds, the level of ties."""
    spare = level.target.minus(count_search.totals(bracket.above, level.joint))
    tied = bracket.at - bracket.above  # (rows,) scores equal to the row's threshold

    def take(spare: Count, ties: jax.Array) -> tuple[Count, jax.Array]:
        taken_ties = spare.at_most(ties)
        return spare.minus(Count(jnp.zeros_like(taken_ties), taken_ties)), taken_ties

    ties_kept = spare.low
    if joint:  # the first leaves' ties first
        first = jax.tree.map(lambda half: half[0], spare)
        ties_kept = jax.lax.scan(take, first, tied)[1]
    # Ties lie at their places from the end, 1 to the size, so that counts fall as
    # positions rise. A row that keeps all its ties, or none, has nothing to look for.
    one, unsigned = np.uint32(1), bracket.low.dtype.type
    last = jnp.where((ties_kept > 0) & (ties_kept < tied), sizes, one).astype(unsigned)
    none = jnp.zeros_like(ties_kept)
    place = jnp.where(ties, level.place, bracket.low)
    bound = sizes + one - bracket.low.astype(np.uint32)
    return _Level(
        place=place,
        bound=jnp.where(level.target.low > 0, bound, none),
        target=Count(none, ties_kept),
        bracket=Bracket(jnp.ones_like(last), last, tied, none),
        guess=jnp.zeros_like(level.guess),
        joint=jnp.zeros_like(level.joint),
        smooth=jnp.asarray(unsigned(1 << 31)),
    )


# In a larger program too: leaves of a shape are traced and lowered once.
@functools.partial(jax.jit, static_argnames=("line", "ties"))
def _count(
    leaf: Float[Array, "..."],
    i: Any,
    place: UInt[Array, " rows"],
    candidates: UInt[Array, "rows candidates"],
    unsettled: Bool[Array, " rows"],
    line: Line,
    ties: bool,
) -> UInt32[Array, "some candidates"]:
    """How many of a leaf, row `i` or all rows (None), lie at or above candidates.

    Candidates are positions of scores or, if `ties`, places of those equal to `place`,
    from the row's end. Without an unsettled row the leaf is not read.
    """

    def row_of(values: jax.Array) -> jax.Array:
        if i is None:  # all rows are this leaf's
            return values
        return jax.lax.dynamic_index_in_dim(values, i, 0)  # (1, ...)

    def count(leaf: jax.Array, candidates: jax.Array) -> jax.Array:
        rows = leaf if i is None else leaf[None]  # (rows, ...)
        across = (len(rows),) + (1,) * (rows.ndim - 1)
        ranks, least = float_order.of(rows, line.signed), row_of(candidates)
        if ties:
            tied = ranks == line.rank(row_of(place)).reshape(across)
            length = np.uint32(math.prod(rows.shape[1:]))
            keys = length - low_bit.flat_index(rows.shape[1:])[None]  # 1 is the last
            keys = jnp.where(tied, keys, np.uint32(0)).astype(line.unsigned)
        else:
            keys, least = ranks, line.rank(least)
        flags = [keys >= least[:, k].reshape(across) for k in range(least.shape[1])]
        counts = jnp.stack(float_order.count_true(flags, range(1, rows.ndim)), 1)
        mesh = jax.typeof(counts).sharding.mesh
        if i is None and mesh.explicit_axes:  # few, and every device goes on with all
            return jax.sharding.reshard(counts, NamedSharding(mesh, PartitionSpec()))
        return counts

    def nothing(leaf: jax.Array, candidates: jax.Array) -> jax.Array:
        zeros = jnp.zeros(row_of(candidates).shape, np.uint32)
        return _varying(zeros, [leaf, candidates])

    # XLA would take what is made of the leaf alone out of the loop over passes, and
    # keep it in memory; behind the barrier it depends on the pass.
    operands = jax.lax.optimization_barrier((leaf, candidates))
    return jax.lax.cond(jnp.any(row_of(unsettled)), count, nothing, *operands)


@functools.partial(jax.jit, static_argnames="line")
def _as_cut(level: _Level, line: Line) -> Cut:
    return Cut(line.rank(level.place), level.bound)


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
