"""How the arrays of a model lie on devices.

On a mesh with Explicit axes JAX asks how the result of a contraction or a look-up is
sharded; elsewhere the compiler decides and these functions give None, or the array as
it is. Activations are split along the axes of their rows (batch, time) only.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int


def row_sharding(x: Array, rows: int) -> jax.P | None:
    """How the first `rows` axes are split, and one more that is whole; or None."""
    sharding = jax.typeof(x).sharding
    if not sharding.mesh.explicit_axes:
        return None
    return jax.P(*sharding.spec[:rows], None)


def sharding_of(x: Array) -> jax.sharding.Sharding | None:
    """How an array is split, or None where the compiler decides."""
    sharding = jax.typeof(x).sharding
    return sharding if sharding.mesh.explicit_axes else None


def broadcast(array: Float[Array, "..."], x: Array) -> Array:
    """With as many axes as `x`, (1, ..., 1, width) say, whole on every device."""
    if sharding_of(array) is not None:
        array = jax.sharding.reshard(array, jax.P(*([None] * array.ndim)))
    return jnp.expand_dims(array, tuple(range(x.ndim - array.ndim)))


def look_up(table: nnx.Embed, rows: Int[Array, "..."]) -> Float[Array, "... width"]:
    """Rows of an embedding, sharded like the array of their indices."""
    return table(rows, out_sharding=row_sharding(rows, rows.ndim))
