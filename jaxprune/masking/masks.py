"""Masks: made from scores, applied, combined, packed to bits, found in a state.

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
from jaxprune.arrays.rules import is_between
from jaxprune.arrays.topk import float_order
from jaxprune.arrays.topk.float_order import Line
from jaxprune.masking import patterns, selection
from jaxprune.masking.checks import (
    aligned_masks,
    floating_scores,
    warn_of_parameters,
)
from jaxprune.masking.combine import combine as combine
from jaxprune.masking.counts import Allocation
from jaxprune.masking.find_masks import get as get
from jaxprune.masking.find_masks import replace as replace
from jaxprune.masking.packed_mask import PackedMask as PackedMask
from jaxprune.masking.packing import pack as pack
from jaxprune.masking.packing import unpack as unpack
from jaxprune.masking.sparsity import overlap as overlap
from jaxprune.typing import Masks, Params, Pattern, Scores

__all__ = [
    "PackedMask",
    "above",
    "apply",
    "combine",
    "get",
    "make",
    "overlap",
    "pack",
    "replace",
    "unpack",
]


def __dir__() -> list[str]:
    return __all__


def make(
    scores: Scores,
    sparsity: float | Mapping[str, float] | None = None,
    *,
    allocation: Allocation = "global",
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
      allocation: rule that shares it out between leaves; see `jp.prune`.
      pattern: which weights are pruned together; see `jp.prune`.
      axes: which axes are input and output, for patterns that care; one for all leaves
        or {glob: Axes}; Flax's [..., in, out] by default.

    Returns:
      Masks like `scores`, boolean, with the scores' sharding. Ties keep the first by
      (leaf, flat index).

    Raises:
      ValueError: a sparsity, pattern or rule does not fit, or a score is NaN; the
        sentence names the leaves.
      TypeError: scores are not floating.

    Warns:
      UserWarning: what is ranked looks like parameters: it is negative in leaves that
        no criterion prunes by default. Or one ranking leaves nothing of a leaf. Not
        under `jit`.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxprune as jp
      >>> scores = {"w": jnp.array([[4.0, 1.0], [2.0, 3.0]])}
      >>> jp.masks.make(scores, sparsity=0.5)["w"].tolist()
      [[True, False], [False, True]]
    """
    pattern = patterns.parse(pattern)
    selections = selection.select(
        scores, sparsity, rule=allocation, pattern=pattern, axes=axes
    )
    warn_of_parameters(scores)
    # A leaf at a time, each placed as its scores are: nothing is gathered.
    bits = [
        placement.placed(selection.selected_mask(selected, pattern, leaf.shape), leaf)
        for selected, leaf in zip(selections, jax.tree.leaves(scores), strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(scores), bits)


def above(scores: Scores, threshold: float) -> Masks:
    """Keeps every score above a threshold, in any number.

    Args:
      scores: a tree of floating arrays.
      threshold: score at or under which a weight is pruned; finite and at least 0; the
        rate, for `scores.threshold`. Under `jit` it may be traced, and one program then
        serves every rate.

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
    floating_scores(scores)
    is_traced = isinstance(threshold, jax.core.Tracer)
    if not is_traced and not (
        is_between(threshold, 0, math.inf) and threshold < math.inf
    ):
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
    aligned = aligned_masks(params, masks)
    leaves = [
        leaf if tree.is_excluded(mask) else _applied(mask, leaf)
        for leaf, mask in zip(tree.named_leaves(params).values(), aligned, strict=True)
    ]
    return jax.tree.unflatten(
        jax.tree.structure(params, is_leaf=tree.is_excluded), leaves
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
