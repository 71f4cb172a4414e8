"""Numbers added up exactly, past 2^32 too.

JAX has no 64-bit integers by default. What a uint32 may not hold is added up along the
last axes only, and the host adds the rest.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def parts(numbers: jax.Array, most: int) -> jax.Array:
    """Partial uint32 sums, for `whole` to add up, of a total that is at most `most`."""
    apart = 0  # number of leading axes whose sums stay apart
    while most >= 2**32 and apart < numbers.ndim:
        most = -(-most // max(numbers.shape[apart], 1))
        apart += 1
    return jnp.sum(numbers, tuple(range(apart, numbers.ndim)), dtype=np.uint32)


def whole(sums: jax.Array | np.ndarray) -> Any:
    """The sum of which `parts` made parts: a Python integer, float32 under `jit`."""
    if isinstance(sums, jax.core.Tracer):
        return jnp.sum(sums.astype(np.float32))
    return int(np.sum(np.asarray(sums), dtype=np.uint64))
