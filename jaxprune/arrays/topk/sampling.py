"""Where a threshold probably lies, by a sample of the scores.

A sample can only save passes: exact counts decide, so any guess gives the same cut.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt

from jaxprune.arrays.topk import count_search, float_order
from jaxprune.arrays.topk.count_search import Count, Order
from jaxprune.arrays.topk.float_order import Line

# A sample saves passes where a ranking has at least this many scores. It holds about
# one score of 67, or fewer. Strides are odd, so that they reach every column of rows
# whose length is a power of two.
_SAMPLE_FROM = 1 << 17
_STRIDE = 67
# More does not narrow a bracket enough to be worth its memory.
_SAMPLE_MOST = 1 << 21


def guess(
    scores: Sequence[Float[Array, "..."]], kept: Count, line: Line, *, joint: bool
) -> UInt[Array, "2 rows"] | None:
    """Positions between which, by a sample, each threshold lies; one row if `joint`."""
    # None where rankings are short, and on several devices: there slices would travel.
    sizes = np.array([leaf.size for leaf in scores])
    mesh = [jax.typeof(leaf).sharding.mesh for leaf in scores]
    spread = any(math.prod(size for _, size in m.shape_tuple) > 1 for m in mesh)
    length = sizes.sum() if joint else sizes.sum() // len(sizes)
    if spread or length < _SAMPLE_FROM:
        return None
    if joint:
        strides = [max(_STRIDE, int(length) // _SAMPLE_MOST | 1)] * len(scores)
    else:
        most = int(length) // _STRIDE
        strides = [max(size // most, 1) | 1 for size in sizes.tolist()]
    rows = list(map(functools.partial(_sampled, line=line), scores, strides))
    # (1,) or (rows,): float32 is exact enough, since exact counts decide.
    total = np.array([sizes.sum()] if joint else sizes, np.float32)
    return _between_samples(rows, kept, total, line=line, joint=joint)


@functools.partial(jax.jit, static_argnames=("stride", "line"))
def _sampled(
    leaf: Float[Array, "..."], stride: int, *, line: Line
) -> Int[Array, " sampled"]:
    """The ranks of one score of so many."""
    sample = jax.lax.slice(leaf.ravel(), [0], [leaf.size], [stride])
    return float_order.of(sample, line.signed)


@functools.partial(jax.jit, static_argnames=("line", "joint"))
def _between_samples(
    rows: Sequence[Int[Array, " sampled"]],
    kept: Count,
    size: Float[Array, " rows"],
    *,
    line: Line,
    joint: bool,
) -> UInt[Array, "2 rows"]:
    """Positions that by the samples count a little more and a little less than kept."""
    sizes = [row.size for row in rows]
    if joint:
        sample = jnp.concatenate(rows)[None]  # (1, sampled)
    else:  # short rows are filled with what ranks lowest, as NaN does
        lowest, pads = np.iinfo(line.signed).min, [(0, max(sizes) - n) for n in sizes]
        pad = functools.partial(jnp.pad, constant_values=lowest)
        sample = jnp.stack(list(map(pad, rows, pads)))  # (rows, sampled)
    counted = np.array([sum(sizes)] if joint else sizes, np.uint32)

    def counts(candidates: jax.Array, unsettled: jax.Array) -> list[jax.Array]:
        least = line.rank(candidates)  # (rows, candidates)
        flags = [sample >= least[:, k, None] for k in range(least.shape[1])]
        return [jnp.stack(float_order.count_true(flags, (1,)), 1)]  # (rows, candidates)

    def position(target: jax.Array) -> jax.Array:
        goal = Count(jnp.zeros_like(target), target)
        return count_search.search(order, goal, start, traced=True).low

    unsigned = line.unsigned.type
    order = Order(counts, joint=False, smooth=unsigned(line.octave))
    start = count_search.full_bracket(jnp.asarray(counted), unsigned(line.top))
    # The share of a random sample over a quantile has this standard deviation; five of
    # them, and two whole scores where it vanishes, hold the threshold almost surely.
    share, sample_sizes = kept.real() / size, counted.astype(np.float32)
    slack = 5 * jnp.sqrt(share * (1 - share) / sample_sizes) + 2 / sample_sizes
    ends = [jnp.clip(share + off, 0, 1) * sample_sizes for off in (slack, -slack)]
    low, high = jax.lax.map(position, jnp.stack(ends).astype(np.uint32))
    # Many may rank lowest alike, as what is pruned does, and all others far above. If
    # the threshold is one of these others, the gap under them is no part of the guess.
    edge = jnp.min(sample, 1, keepdims=True)  # (rows, 1)
    others, none = sample > edge, np.iinfo(line.signed).max
    least = line.position(jnp.min(jnp.where(others, sample, none), 1))
    is_other = share * sample_sizes < jnp.sum(others, 1).astype(np.float32)
    above = jnp.maximum(low, jnp.minimum(least, high))
    return jnp.stack([jnp.where(is_other, above, low), high])
