"""The k highest of many scores, exactly, by counting.

The threshold is found by narrowing a bracket of positions in the order of the floats. A
sample says where to begin, exact counts decide. Nothing is sorted, joined or gathered,
so it works on any sharding; leaves are only read, a few times, and masks are made leaf
by leaf from a `Cut`. Ties keep the first by (leaf, flat index). NaN ranks lowest, under
minus infinity.
"""

import contextlib
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.arrays import low_bit
from jaxprune.topk import count_search, float_order
from jaxprune.topk.count_search import Bracket, Count, Order
from jaxprune.topk.float_order import Line

# A sample saves passes where a ranking has at least so many scores. One score of 67 is
# in it: a prime meets every column, whatever power of two the rows are long.
_SAMPLE_FROM = 1 << 17
_STRIDE = 67
# More does not narrow a bracket enough to be worth its memory.
_SAMPLE_MOST = 1 << 21


class Cut(NamedTuple):
    """Where a leaf is cut: kept is what ranks above the threshold, or early ties.

    Attributes:
      threshold: the rank of the lowest score that is kept, an integer scalar as wide as
        the floats of the ranking.
      bound: the flat index under which this leaf's ties are kept, uint32.
    """

    threshold: jax.Array
    bound: jax.Array


def cut_together(scores: Sequence[jax.Array], kept: int) -> list[Cut]:
    """Cuts that keep the `kept` highest scores of all leaves together.

    Args:
      scores: arrays of any shape and floating dtype; each has under 2^32 elements.
      kept: how many to keep, 0 to the number of scores.

    Returns:
      One cut a leaf; their masks are True exactly `kept` times.

    Raises:
      ValueError: `kept` is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxprune.topk import thresholds as select
      >>> scores = jnp.array([3.0, 1.0, 3.0])
      >>> [cut] = select.cut_together([scores], 1)
      >>> select.mask(scores, cut).tolist()
      [True, False, False]
    """
    _check(kept, sum(leaf.size for leaf in scores))
    return _cuts(list(scores), [kept], joint=True)


def cut_each(scores: Sequence[jax.Array], kept: Sequence[int]) -> list[Cut]:
    """Cuts that keep the highest scores of each leaf by itself.

    Args:
      scores: arrays of any shape and floating dtype; each has under 2^32 elements.
      kept: how many to keep of each, 0 to its size.

    Returns:
      One cut a leaf; its mask is True exactly so many times.

    Raises:
      ValueError: a number is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxprune.topk import thresholds as select
      >>> scores = [jnp.array([3.0, 1.0]), jnp.array([5.0, 7.0])]
      >>> cuts = select.cut_each(scores, [1, 1])
      >>> [select.mask(*pair).tolist() for pair in zip(scores, cuts)]
      [[True, False], [False, True]]
    """
    for leaf, number in zip(scores, kept, strict=True):
        _check(number, leaf.size)
    cuts: dict[int, Cut] = {}
    for dtype in dict.fromkeys(leaf.dtype for leaf in scores):
        own = [i for i, leaf in enumerate(scores) if leaf.dtype == dtype]
        found = _cuts([scores[i] for i in own], [kept[i] for i in own], joint=False)
        cuts.update(zip(own, found, strict=True))
    return [cuts[i] for i in range(len(scores))]


def mask(scores: jax.Array, cut: Cut) -> jax.Array:
    """The mask of one leaf.

    Args:
      scores: the leaf.
      cut: its cut.

    Returns:
      Booleans of the leaf's shape and sharding; True is kept.
    """
    own = float_order.of(scores, cut.threshold.dtype)
    early = low_bit.flat_index(scores.shape) < cut.bound
    return (own > cut.threshold) | ((own == cut.threshold) & early)


def at_once(leaves: Sequence[Any]) -> contextlib.AbstractContextManager[None]:
    """A context in which what is known is computed now, inside of `jit` too.

    Args:
      leaves: what will be computed with; nothing changes if one of them is traced.

    Returns:
      The context.
    """
    traced = any(isinstance(leaf, jax.core.Tracer) for leaf in leaves)
    if not traced and isinstance(jnp.zeros(()), jax.core.Tracer):
        return jax.ensure_compile_time_eval()
    return contextlib.nullcontext()


def _check(kept: int, size: int) -> None:
    if not 0 <= kept <= size:
        raise ValueError(f"kept must be 0 to {size}, the number of scores, got {kept}")


def _cuts(scores: list[jax.Array], kept: Sequence[int], *, joint: bool) -> list[Cut]:
    """Cuts of one ranking of all leaves together, or of a ranking of each."""
    traced = any(isinstance(leaf, jax.core.Tracer) for leaf in scores)
    with at_once(scores):
        line = Line.of(jnp.result_type(*scores))
        sizes = np.array([leaf.size for leaf in scores], np.uint32)
        everything = _everything(len(kept), sizes, line)
        target = count_search.split(kept)
        guess = _guess(scores, target, line, joint=joint)

        def counts(candidates: jax.Array, wanted: jax.Array) -> list[jax.Array]:
            count = _count if traced else _count_jit
            return [
                count(leaf, candidates, wanted, 0 if joint else i, line)
                for i, leaf in enumerate(scores)
            ]

        order = Order(counts, joint, line.octave)
        found = count_search.search(order, target, everything, guess, traced=traced)
        place, want, have = _shares(found, target, joint=joint)
        bounds = _tie_bounds(scores, place, have, want, line, traced=traced)
        return _assembled(place, bounds, line=line)


def _count(
    leaf: jax.Array, candidates: jax.Array, wanted: jax.Array, group: Any, line: Line
) -> jax.Array:
    """One leaf's scores at or above its group's candidates, uint32 (candidates,)."""

    def count(leaf: jax.Array, candidates: jax.Array) -> Sequence[jax.Array]:
        own = float_order.of(leaf, line.signed)
        least = line.rank(candidates)
        return float_order.number([own >= rank for rank in least], range(leaf.ndim))

    return float_order.unless_settled(count, leaf, candidates[group], wanted[group])


def _everything(groups: int, sizes: np.ndarray, line: Line) -> Bracket:
    """The bracket that holds any threshold; all scores count at its low end."""
    low, high = (
        np.zeros(groups, line.unsigned),
        np.full(groups, line.top, line.unsigned),
    )
    return Bracket(*map(jnp.asarray, (low, high, sizes, np.zeros_like(sizes))))


@functools.partial(jax.jit, static_argnames="line")
def _assembled(place: jax.Array, bounds: jax.Array, *, line: Line) -> list[Cut]:
    thresholds = line.rank(place)
    return [Cut(thresholds[i], bounds[i]) for i in range(bounds.size)]


@functools.partial(jax.jit, static_argnames="joint")
def _shares(
    found: Bracket, kept: Count, *, joint: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """For each leaf, its threshold's position, the ties to keep, the ties it has."""
    spare = kept.minus(count_search.totals(found.above, joint=joint))
    have = found.at - found.above
    place = jnp.broadcast_to(found.low, have.shape)
    if not joint:
        return place, spare.low, have

    def take(spare: Count, ties: jax.Array) -> tuple[Count, jax.Array]:
        taken = spare.at_most(ties)
        return spare.minus(Count(jnp.zeros_like(taken), taken)), taken

    # The first leaves' ties first.
    want = jax.lax.scan(take, jax.tree.map(lambda x: x[0], spare), have)[1]
    return place, want, have


def _guess(
    scores: Sequence[jax.Array], kept: Count, line: Line, *, joint: bool
) -> jax.Array | None:
    """Positions between which a sample sees the thresholds, (2, groups).

    None where rankings are short, and on several devices: there slices would travel.
    """
    sizes = np.array([leaf.size for leaf in scores])
    mesh = [jax.typeof(leaf).sharding.mesh for leaf in scores]
    spread = any(math.prod(size for _, size in m.shape_tuple) > 1 for m in mesh)
    length = sizes.sum() if joint else sizes.sum() // len(sizes)
    if spread or length < _SAMPLE_FROM:
        return None
    most = int(length) // _STRIDE
    strides = [max(size // most, 1) | 1 for size in sizes.tolist()]
    if joint:
        strides = [max(_STRIDE, int(length) // _SAMPLE_MOST | 1)] * len(scores)
    rows = [
        _sampled(leaf, stride, line=line)
        for leaf, stride in zip(scores, strides, strict=True)
    ]
    total = np.array([sizes.sum()] if joint else sizes, np.float32)
    return _between_samples(rows, kept, total, line=line, joint=joint)


@functools.partial(jax.jit, static_argnames=("stride", "line"))
def _sampled(leaf: jax.Array, stride: int, *, line: Line) -> jax.Array:
    """The ranks of one score of so many."""
    return float_order.of(
        jax.lax.slice(leaf.ravel(), [0], [leaf.size], [stride]), line.signed
    )


@functools.partial(jax.jit, static_argnames=("line", "joint"))
def _between_samples(
    rows: Sequence[jax.Array],
    kept: Count,
    size: jax.Array,
    *,
    line: Line,
    joint: bool,
) -> jax.Array:
    """Positions that by the samples count a little more and a little less than kept."""
    lowest = np.iinfo(line.signed).min
    longest = max(row.size for row in rows)
    padded = [
        jnp.pad(row, (0, longest - row.size), constant_values=lowest) for row in rows
    ]
    sample = jnp.concatenate(rows)[None] if joint else jnp.stack(padded)
    sizes = [row.size for row in rows]
    have = np.array([sum(sizes)] if joint else sizes, np.uint32)

    def counts(candidates: jax.Array, wanted: jax.Array) -> jax.Array:
        least = line.rank(candidates)
        flags = [sample >= least[:, k, None] for k in range(least.shape[1])]
        return jnp.stack(float_order.number(flags, (1,)), 1)

    def position(target: jax.Array) -> jax.Array:
        goal = Count(jnp.zeros_like(target), target)
        return count_search.search(order, goal, start, traced=True).low

    order = Order(counts, joint=False, smooth=line.octave)
    start = _everything(have.size, have, line)
    share, taken = kept.real() / size, have.astype(np.float32)
    slack = 5 * jnp.sqrt(share * (1 - share) / taken) + 2 / taken
    ends = [jnp.clip(share + off, 0, 1) * taken for off in (slack, -slack)]
    return jax.lax.map(position, jnp.stack(ends).astype(np.uint32))


def _tie_bounds(
    scores: Sequence[jax.Array],
    place: jax.Array,
    have: jax.Array,
    want: jax.Array,
    line: Line,
    *,
    traced: bool,
) -> jax.Array:
    """For each leaf, the flat index under which its ties are kept.

    A search by position from the end. Only leaves whose ties are kept in part are read.
    """
    sizes = np.array([leaf.size for leaf in scores], np.uint32)

    def counts(candidates: jax.Array, wanted: jax.Array) -> list[jax.Array]:
        count = _count_ties if traced else _count_ties_jit
        return [
            count(leaf, place, candidates, wanted, i, line)
            for i, leaf in enumerate(scores)
        ]

    start, target = _ties_begun(sizes, have, want)
    order = Order(counts, joint=False, smooth=1 << 31)
    found = count_search.search(order, target, start, traced=traced)
    return _ties_done(sizes, have, want, found.low)


@jax.jit
def _ties_begun(
    sizes: jax.Array, have: jax.Array, want: jax.Array
) -> tuple[Bracket, Count]:
    none = jnp.zeros_like(have)
    last = jnp.where((want > 0) & (want < have), sizes - np.uint32(1), none)
    # A leaf that keeps all its ties, or none, is settled.
    return Bracket(none, last, have, none), Count(none, want)


@jax.jit
def _ties_done(
    sizes: jax.Array, have: jax.Array, want: jax.Array, found: jax.Array
) -> jax.Array:
    return jnp.where(want > 0, sizes - found, np.uint32(0))


def _count_ties(
    leaf: jax.Array,
    place: jax.Array,
    candidates: jax.Array,
    wanted: jax.Array,
    i: Any,
    line: Line,
) -> jax.Array:
    """One leaf's ties under flat indices, which candidates give from the end."""
    threshold = line.rank(place[i])

    def count(leaf: jax.Array, left_out: jax.Array) -> Sequence[jax.Array]:
        tied = float_order.of(leaf, line.signed) == threshold
        index = jnp.where(tied, low_bit.flat_index(leaf.shape), np.uint32(0xFFFFFFFF))
        bounds = np.uint32(leaf.size) - left_out
        return float_order.number([index < bound for bound in bounds], range(leaf.ndim))

    return float_order.unless_settled(count, leaf, candidates[i], wanted[i])


_count_jit = jax.jit(_count, static_argnames="line")
_count_ties_jit = jax.jit(_count_ties, static_argnames="line")
