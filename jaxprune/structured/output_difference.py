"""How far the outputs of a smaller model are from those of the zeroed one."""

import math
from typing import Any

import jax
import numpy as np


def relative_difference(results: Any, reference: Any) -> float:
    """The largest difference of two trees of arrays, relative to the largest entry.

    Args:
      results: pytree of arrays.
      reference: pytree of arrays, whose leaves are in the same order.

    Returns:
      The largest over the leaves; infinite where numbers of leaves or shapes differ, or
      entries that are not finite.

    Example:
      >>> import numpy as np
      >>> relative_difference([np.array([1.0, 3.0])], [np.array([1.0, 4.0])])
      0.25
    """
    leaves: list[Any] = [jax.tree.leaves(x) for x in (results, reference)]
    if [np.shape(x) for x in leaves[0]] != [np.shape(x) for x in leaves[1]]:
        return math.inf
    return max(map(_leaf_difference, *leaves), default=0.0)


def _leaf_difference(result: Any, expected: Any) -> float:
    dtype = np.complex128 if np.iscomplexobj(expected) else np.float64
    first, second = (np.asarray(x).astype(dtype) for x in (result, expected))
    # Masked logits are minus infinity in both, rows that are masked whole NaN.
    unequal = (first != second) & ~(np.isnan(first) & np.isnan(second))
    # Relative to the leaf: logits and pooled states differ in size.
    scale = np.abs(second[np.isfinite(second)]).max(initial=1e-30)
    gap = float(np.abs(first[unequal] - second[unequal]).max(initial=0) / scale)
    return gap if math.isfinite(gap) else math.inf
