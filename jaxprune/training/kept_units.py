"""Which units an event keeps and grows: arrays alone, one list entry a leaf.

A unit is what a pattern prunes together: a weight, a block, a channel. What was pruned
before ranks under all that is kept, unless it may be revived.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from jaxprune.arrays import placement
from jaxprune.arrays.axes import Axes
from jaxprune.arrays.topk import float_order, thresholds
from jaxprune.arrays.topk.count_search import Count, totals
from jaxprune.masking.patterns import NM, PerOutput, Unstructured
from jaxprune.training.event_table import PatternCounts, count_at
from jaxprune.training.grow import Grow
from jaxprune.typing import Pattern


def masks_at(
    event: Bool[Array, " events"],
    step: jax.Array,
    counts: PatternCounts,
    masks: Sequence[jax.Array],
    scores: Sequence[jax.Array],
    gradients: Sequence[jax.Array],
    *,
    grow: Grow | None,
    revive: bool,
) -> list[jax.Array]:
    """The masks that keep the highest scores, and what is grown.

    Args:
      event: one-hot vector of the event; without True nothing is kept.
      step: number of updates before this one, int32 scalar.
      counts: counts of the event's pattern.
      masks: boolean masks before the event.
      scores: floating scores of the masks' shapes, higher kept.
      gradients: gradients of the masks' shapes, whose placement the new masks get; any
        arrays like them where no growth reads them.
      grow: rule of what comes back, None for nothing.
      revive: whether a pruned weight is ranked by its score.

    Returns:
      The boolean masks after the event.
    """
    pattern, kept = counts.pattern, count_at(event, counts.kept)
    units = _unit_scores(counts, masks, scores, revive=revive)
    if grow is None and isinstance(pattern, NM):
        # Units are minus the ranks inside a group: there is nothing to search for.
        least, at_event = -pattern.n, jnp.any(event)
        kept_units = [(leaf > least) & at_event for leaf in units]
    elif grow is None:
        kept_units = _highest(units, kept, counts.together)
    else:
        kept_units = _grow(event, step, counts, units, gradients, grow)
    new_masks = [
        placement.placed(pattern.expand(bits, leaf.shape, axes), leaf)
        for bits, leaf, axes in zip(kept_units, gradients, counts.axes, strict=True)
    ]
    if grow is not None:
        return _unless_behind(event, counts, masks, new_masks)
    if not revive and pattern.sparsity is None:
        return _without_revived(event, counts, masks, new_masks)
    return new_masks


def _unit_scores(
    counts: PatternCounts,
    masks: Sequence[jax.Array],
    scores: Sequence[jax.Array],
    *,
    revive: bool,
) -> list[jax.Array]:
    """The scores of each leaf's units, of the pattern's own shapes."""
    pattern, units = counts.pattern, list[jax.Array]()
    for mask, score, axes in zip(masks, scores, counts.axes, strict=True):
        if units and isinstance(score, jax.core.Tracer) and not _is_single(pattern):
            # Pooling takes memory beside the scores, in which XLA would otherwise pool
            # all leaves at once: behind the barrier a leaf waits for the one before.
            behind = jax.lax.optimization_barrier((mask, score, units[-1]))
            mask, score, units[-1] = behind
        if not revive:
            score = _rank_pruned_last(pattern, mask, score, axes)
        units.append(pattern.units(score, axes))
    return units


def _grow(
    event: Bool[Array, " events"],
    step: jax.Array,
    counts: PatternCounts,
    units: Sequence[jax.Array],
    gradients: Sequence[jax.Array],
    grow: Grow,
) -> list[jax.Array]:
    """The units that are kept by score, fewer by the grown, and those that grow."""
    kept, grown = count_at(event, counts.kept), count_at(event, counts.grown)
    kept_units = _highest(units, kept.minus(grown), counts.together)
    leaves = zip(kept_units, gradients, counts.axes, strict=True)
    growth = [  # minus infinity where a unit is kept already
        jnp.where(
            bits,
            -jnp.inf,
            counts.pattern.units(grow.scores(gradient, step, number), axes),
        )
        for number, (bits, gradient, axes) in enumerate(leaves)
    ]
    grown_units = _highest(growth, grown, counts.together)
    return [a | b for a, b in zip(kept_units, grown_units, strict=True)]


def _highest(
    units: Sequence[jax.Array], kept: Count, together: bool
) -> list[jax.Array]:
    """Which units are kept, by one ranking of all leaves or by one of each."""
    if together:
        cuts = thresholds.cut_together(units, kept)
    else:
        # A leaf has fewer units than 2^32, so the low halves are the counts.
        cuts = thresholds.cut_each(units, kept.low)
    return [
        thresholds.above_cut(scores, cut)
        for scores, cut in zip(units, cuts, strict=True)
    ]


def _without_revived(
    event: Bool[Array, " events"],
    counts: PatternCounts,
    masks: Sequence[jax.Array],
    new_masks: Sequence[jax.Array],
) -> list[jax.Array]:
    """The new masks, without any weight that was pruned before.

    An event would keep such a weight only where fewer remain than its sparsity says:
    in a run that goes on from a model that was pruned further, or in other units.
    """
    if counts.together:
        return [new & old for new, old in zip(new_masks, masks, strict=True)]
    kept, previous = count_at(event, counts.kept), _previous(event, counts)
    result = []
    leaves = zip(masks, new_masks, counts.axes, strict=True)
    for number, (old, new, axes) in enumerate(leaves):
        units = _units_with_weights(counts.pattern, old, axes)
        # By rounding, an allocation such as ERK may keep one unit more than at the
        # event before: a leaf that is as that event left it may get one back.
        # Two counts: before a sum of one operand a CPU writes out what is added.
        flags = [units, ~units]
        remaining, absent = float_order.count_true(flags, range(units.ndim))
        rounded = kept.low[number] <= remaining + np.uint32(1)
        size = np.uint32(units.size)
        on_schedule = size - absent == previous.low[number]
        pruned = ~_spread(counts.pattern, units, old, axes)
        result.append(new & (old | (pruned & rounded & on_schedule)))
    return result


def _unless_behind(
    event: Bool[Array, " events"],
    counts: PatternCounts,
    masks: Sequence[jax.Array],
    new_masks: Sequence[jax.Array],
) -> list[jax.Array]:
    """The new masks, or those before where they keep fewer than the schedule does.

    So it is in a run that goes on from a model that was pruned further. Where it is the
    schedule that falls, they keep what the event before left.
    """
    remaining = []
    for mask, axes in zip(masks, counts.axes, strict=True):
        units = _units_with_weights(counts.pattern, mask, axes)
        flags = [units, ~units]  # two, as in `_without_revived`
        remaining.append(float_order.count_true(flags, range(units.ndim))[0])
    left = totals(jnp.stack(remaining), joint=counts.together)  # (leaves,)
    previous = _previous(event, counts)
    on_schedule = (left.low == previous.low) & (left.high == previous.high)
    follows = left.at_least(count_at(event, counts.kept)) | on_schedule
    leaves = zip(follows, new_masks, masks, strict=True)
    return [jnp.where(due, new, old) for due, new, old in leaves]


def _previous(event: Bool[Array, " events"], counts: PatternCounts) -> Count:
    """What the event before keeps; zero at the first."""
    return count_at(jnp.append(event[1:], False), counts.kept)


def _units_with_weights(pattern: Pattern, mask: jax.Array, axes: Axes) -> jax.Array:
    """The units of which a weight is kept."""
    if _is_single(pattern):
        return mask
    return pattern.units(mask.astype(jnp.float32), axes) > 0


def _spread(
    pattern: Pattern, units: jax.Array, mask: jax.Array, axes: Axes
) -> jax.Array:
    """All weights of the units that `_units_with_weights` gives."""
    if _is_single(pattern):
        return units
    return placement.placed(pattern.expand(units, mask.shape, axes), mask)


def _is_single(pattern: Pattern) -> bool:
    """Whether the units are single weights; of some patterns they are ranks."""
    return isinstance(pattern, Unstructured | NM | PerOutput)


def _rank_pruned_last(
    pattern: Pattern, mask: jax.Array, score: jax.Array, axes: Axes
) -> jax.Array:
    """The scores, so that units without a weight rank under all others."""
    # In a unit with kept weights, those that are pruned add nothing to its score.
    units = _units_with_weights(pattern, mask, axes)
    pruned = jnp.where(_spread(pattern, units, mask, axes), 0.0, -jnp.inf)
    return jnp.where(mask, _over_pruned(score), pruned)


def _over_pruned(score: jax.Array) -> jax.Array:
    """The score, or the least finite number for what ranks no higher than pruned."""
    # NaN ranks under minus infinity, so a pruned weight would take a kept one's place.
    least = jnp.asarray(jnp.finfo(score.dtype).min, score.dtype)
    return jnp.where(jnp.isnan(score), least, jnp.maximum(score, least))
