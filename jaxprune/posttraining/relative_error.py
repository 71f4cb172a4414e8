"""How far the outputs of a block are from those of the dense one, token by token."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

# This share of the usual token's squared norm is added to each token's squared norm,
# since a token of zeros has no relative error.
_FLOOR = 1e-3


def relative_error(
    results: Sequence[jax.Array],
    targets: Sequence[jax.Array],
    counted: jax.Array | None,
) -> Float[Array, ""]:
    """|y - target|^2 / (|target|^2 + floor), the mean over tokens, then over arrays.

    The floor is 1e-3 of the squared norm that tokens usually have.

    Args:
      results: arrays (tokens..., features).
      targets: arrays of the same shapes.
      counted: booleans; which tokens count in the arrays that begin with its shape.

    Returns:
      Float32 scalar.
    """
    errors = [_error(*own, counted) for own in zip(results, targets, strict=True)]
    return jnp.mean(jnp.stack(errors))


def _error(
    result: jax.Array, target: jax.Array, counted: jax.Array | None
) -> Float[Array, ""]:
    y, t = (jnp.atleast_1d(x).astype(np.float32) for x in (result, target))
    share: Any = np.float32(1)
    if counted is not None and y.shape[: counted.ndim] == counted.shape:
        # Selected, not multiplied: what does not count may be NaN.
        own = counted.reshape(counted.shape + (1,) * (y.ndim - counted.ndim))
        y, t = jnp.where(own, y, 0), jnp.where(own, t, 0)
        share = jnp.mean(counted, dtype=np.float32)
    apart, size = (jnp.sum(jnp.square(x), axis=-1) for x in (y - t, t))  # (tokens...)
    # By the fourth root of the square, which a few massive tokens do not move much; of
    # the tokens that count, the others being zeros here.
    usual = (jnp.mean(jnp.sqrt(jnp.sqrt(size))) / share) ** 4
    floor = _FLOOR * usual + np.finfo(np.float32).tiny
    return jnp.mean(apart / (size + floor)) / share
