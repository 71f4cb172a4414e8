"""Products with packed matrices: x @ W^T, accumulated in float32.

On CPU a kernel reads only the kept weights, where `jaxprune-kernels` is installed.
Everywhere else rows are expanded tile by tile and multiplied densely, which saves
memory and no time. The derivative by x is that of the dense product.
"""

import functools
import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from jaxprune.sparse import cpu_kernels, expansion
from jaxprune.sparse.packed_matrix import PackedMatrix

_TILE = 1 << 22  # weights that are dense at once


def matmul(x: jax.Array, packed: PackedMatrix, *, precision: Any = None) -> jax.Array:
    """The product of vectors with a packed matrix.

    Args:
      x: floating (..., in); with a batch of matrices (batch, ..., in).
      packed: matrix (out, in), or matrices (batch, out, in).
      precision: `precision` of the dense product, where no kernel runs.

    Returns:
      float32 (..., out), or (batch, ..., out): x @ W^T, to float32 rounding.

    Raises:
      ValueError: the shapes do not fit.
      TypeError: it is differentiated with respect to the packed matrix.

    Example:
      >>> import jax.numpy as jnp
      >>> import numpy as np
      >>> from jaxprune.sparse.matmul import matmul
      >>> from jaxprune.sparse.packed_matrix import pack_matrix
      >>> packed = pack_matrix(np.array([[0, 2.0], [1, 0]], np.float32))
      >>> matmul(jnp.array([[3.0, 4.0]]), packed).tolist()
      [[8.0, 3.0]]
    """
    if not (x.shape and x.shape[-1] == packed.shape[-1]):
        raise ValueError(
            f"a product with a packed matrix needs vectors of its {packed.shape[-1]} "
            f"inputs, got {x.shape}"
        )
    if len(packed.shape) != 2 and x.shape[:1] != packed.shape[:1]:
        raise ValueError(
            f"a product with packed matrices {packed.shape} needs their batch as the "
            f"first axis, got {x.shape}"
        )
    *batch, outputs, inputs = packed.shape
    samples = math.prod(x.shape[len(batch) : -1])
    # (batch, samples, in), a single matrix being a batch of one
    rows = x.reshape(*(batch or [1]), samples, inputs)
    result = _product(rows, packed, precision)  # (batch, samples, out)
    return result.reshape(*x.shape[:-1], outputs)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _product(x: jax.Array, packed: PackedMatrix, precision: Any) -> jax.Array:
    """The products of each matrix, (batch, samples, out)."""
    x = x.astype(jnp.float32)
    if not x.size or not packed.size:
        return jnp.zeros((*x.shape[:2], packed.shape[-2]), jnp.float32)
    if not cpu_kernels.runs(packed):
        return _dense(x, packed, precision)
    return jax.lax.platform_dependent(
        x,
        packed,
        cpu=_by_kernels,
        default=functools.partial(_dense, precision=precision),
    )


@functools.partial(_product.defjvp, symbolic_zeros=True)
def _product_jvp(precision: Any, primals: Any, tangents: Any) -> Any:
    x, packed = primals
    change, of_packed = tangents
    check_undifferentiated(not _is_zero(leaf) for leaf in jax.tree.leaves(of_packed))
    product = _product(x, packed, precision)
    if _is_zero(change):
        return product, jnp.zeros_like(product)
    # Dense, since it is linear in x to JAX and can be transposed.
    return product, _dense(change.astype(jnp.float32), packed, precision)


def check_undifferentiated(leaves: Iterable[bool]) -> None:
    """Refuses a derivative by a packed matrix.

    Args:
      leaves: whether each leaf of the matrix is differentiated.

    Raises:
      TypeError: one of them is.
    """
    if any(leaves):
        raise TypeError(
            "packed weights have no gradients; differentiate by other arguments, or "
            "train the unpacked parameters and pack again"
        )


def _is_zero(tangent: Any) -> bool:
    return isinstance(tangent, SymbolicZero) or tangent.dtype == jax.dtypes.float0


def _by_kernels(x: jax.Array, packed: PackedMatrix) -> jax.Array:
    samples, outputs = x.shape[1], packed.shape[-2]
    # The number of an exported function's samples may be a symbol.
    if not (isinstance(samples, int) and samples <= cpu_kernels.MOST_VECTORS):
        expand = functools.partial(_expand_by_kernel, packed)
        return _tiled(x, packed, expand, None)
    products = [
        cpu_kernels.multiply(vectors, packed, i * outputs, outputs)
        for i, vectors in enumerate(x)
    ]
    return jnp.stack(products)


def _expand_by_kernel(packed: PackedMatrix, first: int, count: int) -> jax.Array:
    return cpu_kernels.expand(packed, first, count)


def _dense(x: jax.Array, packed: PackedMatrix, precision: Any) -> jax.Array:
    def expand(first: int, count: int) -> jax.Array:
        rows = expansion.expand(packed, first + jnp.arange(count))
        return rows.astype(jnp.float32)

    return _tiled(x, packed, expand, precision)


def _tiled(
    x: jax.Array, packed: PackedMatrix, expand: Any, precision: Any
) -> jax.Array:
    """The products, with a few rows dense at a time."""
    *_, outputs, inputs = packed.shape
    height = max(1, _TILE // max(1, inputs))  # rows of a tile
    products = []
    for i, vectors in enumerate(x):  # (samples, in)
        parts = []
        for start in range(0, outputs, height):
            count = min(height, outputs - start)
            tile = expand(i * outputs + start, count)  # (count, in)
            parts.append(jnp.matmul(vectors, tile.T, precision=precision))
        products.append(jnp.concatenate(parts, axis=1))
    return jnp.stack(products)
