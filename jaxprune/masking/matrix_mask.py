"""The mask of one matrix under a pattern, inside a larger program.

The number kept is traced, so one compiled program serves every sparsity.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Integer

from jaxprune.arrays.axes import Axes
from jaxprune.arrays.topk.thresholds import highest
from jaxprune.masking import patterns
from jaxprune.masking.counts import kept_units
from jaxprune.typing import Pattern


def mask(
    scores: Float[Array, "in out"], kept: Any, pattern: Pattern
) -> Bool[Array, "in out"]:
    """The mask that `masks.make` makes of one matrix, for a traced count.

    Args:
      scores: floating array (in, out); higher is kept.
      kept: number of the pattern's units that are kept, traced or not. A pattern that
        fixes its sparsity does not look at it.
      pattern: which weights are pruned together.

    Returns:
      Booleans (in, out). The removed of `PerOutput` are spread evenly; the first
      outputs take the remainder.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxprune as jp
      >>> from jaxprune.masking import matrix_mask
      >>> scores = jnp.array([[4.0, 1.0], [2.0, 3.0]])
      >>> matrix_mask.mask(scores, 3, jp.patterns.Unstructured()).tolist()
      [[True, False], [True, True]]
    """
    axes, kept = Axes(), jnp.asarray(kept)
    if isinstance(pattern, patterns.PerOutput):
        inputs, outputs = scores.shape
        removed = scores.size - kept
        # (out,): how many each output keeps of its inputs.
        return highest(scores, inputs - spread(removed, outputs), axis=0)
    # From here on one cut serves all units, so one count is all that is needed.
    units = pattern.units(scores, axes)
    if isinstance(pattern, patterns.NM):  # units are minus the rank inside the group
        return units > -pattern.n
    if pattern.sparsity is not None:
        kept = jnp.asarray(kept_units(pattern.sparsity, units.size))
    return pattern.expand(highest(units, kept), scores.shape, axes)


def spread(total: Integer[Array, ""], parts: int) -> Integer[Array, " parts"]:
    """What `counts.split_evenly` makes of a total, of one that is traced."""
    share, larger = total // max(parts, 1), total % max(parts, 1)
    return share + (jnp.arange(parts) < larger).astype(share.dtype)  # (parts,)
