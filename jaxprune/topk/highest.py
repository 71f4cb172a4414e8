"""The highest scores of one matrix as a mask, inside a larger program.

The number kept is traced: one compiled program serves every sparsity. As in `select`
the threshold is found by counting, a few candidates a pass; ties keep the first and NaN
ranks lowest, under minus infinity.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.topk import count_search, float_order
from jaxprune.topk.count_search import Bracket, Count, Order
from jaxprune.topk.float_order import Line


def highest(scores: jax.Array, kept: Any, axis: int | None = None) -> jax.Array:
    """The mask of exactly the `kept` highest scores.

    Args:
      scores: floats of any shape, under 2^32 of them.
      kept: how many to keep, an integer, traced or not; of each slice along `axis` if
        one is given, and then also an array that broadcasts over the slices (the
        scores' shape without the axis). Out of range it counts as the nearest that is
        in range.
      axis: None ranks the whole array, an integer each slice along that axis.

    Returns:
      Booleans of the scores' shape; ties keep the first by flat index, or along the
      axis.

    Raises:
      TypeError: the scores are not floating, or `kept` is no integer.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxprune.topk.highest import highest
      >>> highest(jnp.array([2.0, 1.0, 2.0, 3.0]), 2).tolist()
      [True, False, False, True]
    """
    scores, kept = jnp.asarray(scores), jnp.asarray(kept)
    if not jnp.issubdtype(scores.dtype, jnp.floating):
        raise TypeError(f"highest needs floating scores, got {scores.dtype}")
    if not jnp.issubdtype(kept.dtype, jnp.integer):
        raise TypeError(f"highest needs an integer kept, got {kept.dtype}")
    if axis is None:
        return _of_rows(scores.reshape(1, -1), kept.reshape(1)).reshape(scores.shape)
    rows = jnp.moveaxis(scores, axis, -1)
    number = jnp.broadcast_to(kept, rows.shape[:-1]).ravel()
    found = _of_rows(rows.reshape(number.size, rows.shape[-1]), number)
    return jnp.moveaxis(found.reshape(rows.shape), -1, axis)


def _of_rows(rows: jax.Array, kept: jax.Array) -> jax.Array:
    """The mask of the highest of each row, (rows, columns)."""
    length = rows.shape[1]
    if not rows.size:
        return jnp.zeros(rows.shape, bool)
    line = Line.of(rows.dtype)
    own = float_order.of(rows, line.signed)
    target = jnp.clip(kept, 0, length).astype(np.uint32)
    found = _threshold(own, target, line)
    threshold = line.rank(found.low)[:, None]
    have, want = found.at - found.above, target - found.above
    index = jax.lax.broadcasted_iota(np.uint32, rows.shape, 1)
    early = index < _tie_bounds(own == threshold, index, have, want)[:, None]
    return (own > threshold) | ((own == threshold) & early)


def _threshold(own: jax.Array, target: jax.Array, line: Line) -> Bracket:
    """Each row's bracket, narrowed to the position of its lowest kept rank."""
    groups, length = own.shape

    def counts(candidates: jax.Array, wanted: jax.Array) -> jax.Array:
        least = line.rank(candidates)
        return _numbers([own >= least[:, k, None] for k in range(least.shape[1])])

    none = jnp.zeros(groups, np.uint32)
    start = Bracket(
        jnp.zeros(groups, line.unsigned),
        jnp.full(groups, line.top, line.unsigned),
        jnp.full(groups, length, np.uint32),
        none,
    )
    order = Order(counts, joint=False, smooth=line.octave)
    return count_search.search(order, Count(none, target), start, traced=True)


def _tie_bounds(
    tied: jax.Array, index: jax.Array, have: jax.Array, want: jax.Array
) -> jax.Array:
    """The index under which each row's ties are kept: a search from the end."""
    length = np.uint32(tied.shape[1])

    def counts(candidates: jax.Array, wanted: jax.Array) -> jax.Array:
        bounds = length - candidates
        place = jnp.where(tied, index, length)
        return _numbers([place < bounds[:, k, None] for k in range(bounds.shape[1])])

    none = jnp.zeros_like(have)
    # A row that keeps all its ties, or none, is settled.
    last = jnp.where((want > 0) & (want < have), length - np.uint32(1), none)
    order = Order(counts, joint=False, smooth=1 << 31)
    start = Bracket(none, last, have, none)
    found = count_search.search(order, Count(none, want), start, traced=True)
    return jnp.where(want > 0, length - found.low, np.uint32(0))


def _numbers(flags: Sequence[jax.Array]) -> jax.Array:
    return jnp.stack(float_order.number(flags, (1,)), 1)
