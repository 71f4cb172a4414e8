"""Packed rows as dense ones, in JAX's own operations: on every platform, and exactly.

The position of a weight's value is its row's start and the number of kept weights
before it in the row.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxprune.sparse import encodings
from jaxprune.sparse.encodings import WORD


def expand(packed: Any, rows: jax.Array) -> jax.Array:
    """Some rows of a packed matrix, dense.

    Args:
      packed: `PackedMatrix`.
      rows: integers (count,), numbers of rows.

    Returns:
      (count, in): of the dtype in which values are stored, float32 for levels.

    Example:
      >>> import jax.numpy as jnp
      >>> import numpy as np
      >>> from jaxprune.sparse import expansion
      >>> from jaxprune.sparse.packed_matrix import pack_matrix
      >>> packed = pack_matrix(np.array([[0, 2.0], [1, 0]], np.float32))
      >>> expansion.expand(packed, jnp.array([1])).tolist()
      [[1.0, 0.0]]
    """
    inputs = packed.shape[-1]
    if packed.words is None:
        values = _whole_rows(packed, rows)
    else:
        places = jnp.arange(WORD, dtype=jnp.uint32)[None, None]
        bits = packed.words[rows][..., None] >> places & 1  # (count, words, 32)
        bits = bits.reshape(len(rows), -1)[:, :inputs].astype(jnp.int32)  # (count, in)
        before = jnp.cumsum(bits, axis=1) - bits
        positions = packed.starts[rows][:, None] + before
        values = encodings.load(packed.values, positions, packed.encoding)
        values = _zero_where(bits == 0, values)
    if packed.scales is None:
        return values
    # A scale for each weight of the row: groups lie along the inputs.
    groups = jnp.arange(inputs) // max(1, packed.group)  # (in,)
    return values * packed.scales[rows][:, groups]


def _whole_rows(packed: Any, rows: jax.Array) -> jax.Array:
    """Rows of which all weights are stored, (count, in)."""
    width = -(-packed.shape[-1] // WORD) * WORD  # rows are filled up
    stored = width // 2 if packed.encoding == "int4" else width
    table = encodings.as_bits(packed.values)
    parts = jax.vmap(
        lambda row: jax.lax.dynamic_slice(table, (row * stored,), (stored,))
    )
    return encodings.decode(parts(rows), packed.encoding)[:, : packed.shape[-1]]


def _zero_where(pruned: jax.Array, values: jax.Array) -> jax.Array:
    """The values with zeros at some places; others keep their bits, of NaN too."""
    # As integers, for the reason that `encodings.load` says.
    form = jnp.dtype(f"uint{8 * values.dtype.itemsize}")
    bits = jax.lax.bitcast_convert_type(values, form)
    bits = jnp.where(pruned, jnp.zeros_like(bits), bits)
    return jax.lax.bitcast_convert_type(bits, values.dtype)
