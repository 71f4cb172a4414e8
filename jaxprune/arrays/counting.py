"""Numbers added up exactly, past 2^32 too.

JAX has no 64-bit integers by default. What a uint32 may not hold is added up along all
axes but the first, and the host adds the rest.
"""

import jax
import jax.numpy as jnp
import numpy as np


def parts(numbers: jax.Array, most: int) -> jax.Array:
    """The sum of booleans or small numbers, which is `most` at most, for `whole`."""
    over = most >= 2**32
    axes = tuple(range(1, numbers.ndim)) if over else None
    return jnp.sum(numbers, axes, dtype=np.uint32)


def whole(sums: jax.Array | np.ndarray) -> int:
    """The sum of which `parts` made parts."""
    return int(np.sum(np.asarray(sums), dtype=np.uint64))
