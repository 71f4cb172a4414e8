"""Masks of one model, combined: a weight is kept where all of them keep it."""

from typing import Any

import jax

from jaxprune.arrays import placement, tree
from jaxprune.masking.checks import aligned_masks
from jaxprune.typing import Masks


def combine(first: Masks, second: Masks) -> Masks:
    """What both masks keep.

    Args:
      first: boolean masks.
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
    # None at a leaf's name excludes it, as None is no leaf for `jax.tree`.
    first = tree.with_nodes(first, tree.named_leaves(second))
    aligned_masks(first, first)
    second_leaves = aligned_masks(first, second)

    def both(a: Any, b: Any) -> Any:
        if tree.is_excluded(a) or tree.is_excluded(b):
            return b if tree.is_excluded(a) else a
        return a & placement.together(b, a)

    first_leaves = tree.named_leaves(first).values()
    leaves = [both(a, b) for a, b in zip(first_leaves, second_leaves, strict=True)]
    return jax.tree.unflatten(
        jax.tree.structure(first, is_leaf=tree.is_excluded), leaves
    )
