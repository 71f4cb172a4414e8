"""Masks: made from scores, applied to parameters, combined, packed to bits.

A mask is True where a weight is kept. A pruned weight becomes +0 by selection, never
by multiplication, so NaN, infinity and -0 become +0 too.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.arrays import lazy, low_bit, placement, tree
from jaxprune.arrays.axes import Axes
from jaxprune.arrays.topk import float_order
from jaxprune.arrays.topk.float_order import Line
from jaxprune.masking import patterns, selection
from jaxprune.masking.checks import checked, floating
from jaxprune.masking.counts import Allocation
from jaxprune.masking.packed_mask import PackedMask as PackedMask
from jaxprune.masking.packing import pack as pack
from jaxprune.masking.packing import unpack as unpack
from jaxprune.typing import Masks, Params, Pattern, Scores


def make(
    scores: Scores,
    sparsity: float | Mapping[str, float] | None = None,
    *,
    allocation: Allocation = "layer",
    pattern: Pattern | str = "unstructured",
    axes: Axes | Mapping[str, Axes] | None = None,
) -> Masks:
    """Keeps the highest scores, exactly as many as the sparsity says.

    Args:
      scores: a tree of floating arrays; higher is kept. Under `jit`, where nothing can
        be raised, a NaN ranks lowest.
      sparsity: the share to remove, in [0, 1), or {glob on the path name: share}, of
        which the first match counts (unmatched leaves keep all). None where the pattern
        fixes it. Static under `jit`.
      allocation: how it is shared out between leaves, as for `jp.prune`.
      pattern: which weights are pruned together, as for `jp.prune`.
      axes: which axes are input and output, for patterns that care; one for all leaves
        or {glob: Axes}; Flax's [..., in, out] by default.

    Returns:
      Masks like `scores`, boolean, with the scores' sharding. Ties keep the first by
      (leaf, flat index).

    Raises:
      ValueError: a sparsity, pattern or rule does not fit, or a score is NaN; the
        sentence names the leaves.
      TypeError: scores are not floating.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxprune as jp
      >>> scores = {"w": jnp.array([[4.0, 1.0], [2.0, 3.0]])}
      >>> jp.masks.make(scores, sparsity=0.5)["w"].tolist()
      [[True, False], [False, True]]
    """
    pattern = patterns.named(pattern)
    selections = selection.select(
        scores, sparsity, rule=allocation, pattern=pattern, axes=axes
    )
    bits = [
        placement.placed(selection.mask(selected, pattern, leaf.shape), leaf)
        for selected, leaf in zip(selections, jax.tree.leaves(scores), strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(scores), bits)


def above(scores: Scores, threshold: float) -> Masks:
    """Keeps every score above a threshold, in any number.

    Args:
      scores: a tree of floating arrays.
      threshold: what is at or under it is pruned; finite and at least 0; the rate, for
        `scores.threshold`. Under `jit` it may be traced, and one program then serves
        every rate.

    Returns:
      Masks like `scores`; under `jit` a NaN is pruned.

    Raises:
      ValueError: the threshold is out of range, or a score is NaN.
      TypeError: scores are not floating.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxprune as jp
      >>> jp.masks.above({"w": jnp.array([0.5, 2.0])}, 1.0)["w"].tolist()
      [False, True]
    """
    floating(scores)
    traced = isinstance(threshold, jax.core.Tracer)
    if not traced and not 0 <= float(threshold) < math.inf:
        raise ValueError(f"threshold must be finite and at least 0, got {threshold}")
    return jax.tree.map(lambda x: _is_above(jnp.asarray(x), threshold), scores)


def apply(params: Params, masks: Masks) -> Params:
    """The parameters with +0 where the masks are False.

    Args:
      params: the parameters.
      masks: masks of these parameters, in any container; an excluded leaf
        (`optax.MaskedNode()`, None or True) comes back as the same object.

    Returns:
      Parameters of the same structure, dtypes and sharding.

    Raises:
      ValueError: the masks are another model's.
      TypeError: the masks are not boolean.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxprune as jp
      >>> jp.masks.apply({"w": jnp.ones(2)}, {"w": jnp.array([True, False])})
      {'w': Array([1., 0.], dtype=float32)}
    """
    aligned = checked(params, masks)
    leaves = [
        leaf if tree.is_excluded(mask) else _applied(mask, leaf)
        for leaf, mask in zip(tree.named_leaves(params).values(), aligned, strict=True)
    ]
    return jax.tree.unflatten(
        jax.tree.structure(params, is_leaf=tree.is_excluded), leaves
    )


def combine(first: Masks, second: Masks) -> Masks:
    """What both masks keep.

    Args:
      first: masks.
      second: masks of the same parameters; where one of the two excludes a leaf, the
        other alone decides.

    Returns:
      Masks like `first`.

    Raises:
      ValueError: the two are of different models.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxprune as jp
      >>> a, b = jnp.array([True, True]), jnp.array([True, False])
      >>> jp.masks.combine({"w": a}, {"w": b})["w"].tolist()
      [True, False]
    """
    first = tree.with_nodes(first, tree.named_leaves(second))
    checked(first, first)
    second_leaves = checked(first, second)

    def both(a: Any, b: Any) -> Any:
        if tree.is_excluded(a) or tree.is_excluded(b):
            return b if tree.is_excluded(a) else a
        return a & placement.together(b, a)

    first_leaves = tree.named_leaves(first).values()
    leaves = [both(a, b) for a, b in zip(first_leaves, second_leaves, strict=True)]
    return jax.tree.unflatten(
        jax.tree.structure(first, is_leaf=tree.is_excluded), leaves
    )


def _is_above(score: jax.Array, threshold: Any) -> jax.Array:
    # Not in a narrow dtype, which would round the threshold onto scores above it; and
    # as integers, since a CPU takes subnormal floats for zeros when it compares them.
    wide = np.dtype("float64" if score.dtype == np.float64 else "float32")
    rank = Line.of(wide).signed
    least = jnp.asarray(threshold, wide)
    return float_order.of(score, rank) > float_order.of(least, rank)


def _applied(mask: Any, leaf: Any) -> jax.Array:
    leaf = lazy.array(leaf)
    return _where(placement.together(mask, leaf), leaf)


@jax.jit
def _where(mask: jax.Array, leaf: jax.Array) -> jax.Array:
    return placement.masked(leaf, low_bit.on_device(mask))
