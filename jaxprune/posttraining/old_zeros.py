"""Zeros that a matrix had before it was pruned.

Corrections fill them, and so do solvers that look for the best support anew. Where
there are more of them than are to go, as in a matrix that an allocation leaves alone,
they stay.
"""

from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt32

from jaxprune.arrays import placement
from jaxprune.graph.linear_ops import LinearOp
from jaxprune.masking.patterns import PerOutput, Unstructured
from jaxprune.posttraining.plan import Plan

Pruned: TypeAlias = tuple[jax.Array, jax.Array, jax.Array]
"""A new matrix (1, in, out), its number of zeros, and the damping used."""


def hold(
    plan: Plan,
    op: LinearOp,
    number: int,
    weight: Float[Array, "batch in out"],
    pruned: Pruned,
) -> Pruned:
    """A pruned matrix, with the zeros that it had where these are more than are to go.

    Args:
      plan: how many units each matrix keeps.
      op: linear op of the weight.
      number: which of the weight's matrices it is.
      weight: the weight before.
      pruned: the matrix after, which lies where the weight does.

    Returns:
      The matrix, its zeros counted anew, and the same damping.
    """
    if isinstance(plan.pattern, Unstructured | PerOutput):
        removed = op.size // op.shape[0] - plan.kept[op.name][number]
    elif plan.removed[op.name]:
        return pruned  # their units are of several weights
    else:
        removed = 0
    after, _, damping = pruned
    after, zeros = placement.automatic(
        _held, weight, after, np.int32(number), np.uint32(removed)
    )
    return after, zeros, damping


@jax.jit
def _held(
    weight: Float[Array, "batch in out"],
    after: Float[Array, "1 in out"],
    i: jax.Array,
    removed: jax.Array,
) -> tuple[Float[Array, "1 in out"], UInt32[Array, ""]]:
    before = weight[i] == 0  # (in, out)
    held = before & (jnp.sum(before, dtype=np.uint32) > removed)
    after = jnp.where(held[None], jnp.zeros_like(after), after)
    return after, jnp.sum(after == 0, dtype=np.uint32)
