"""Rows that lie group by group, times a packed matrix for each group: experts.

The rows are cut into blocks of one group each, as in `arrays.grouped_rows`. Of the
group's matrix only the bits are copied; its values are read where they lie.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero

from jaxprune.arrays import grouped_rows
from jaxprune.sparse import cpu_kernels
from jaxprune.sparse.encodings import SPARE, WORD
from jaxprune.sparse.matmul import check_undifferentiated, matmul
from jaxprune.sparse.packed_matrix import PackedMatrix


def grouped_matmul(
    rows: jax.Array, packed: PackedMatrix, sizes: jax.Array, *, precision: Any = None
) -> jax.Array:
    """`jax.lax.ragged_dot` with packed matrices.

    Args:
      rows: floating (rows, in), group by group; those behind the last belong to none.
      packed: matrices (groups, out, in).
      sizes: integers (groups,), number of rows of each group.
      precision: `precision` of the dense product, where no kernel runs.

    Returns:
      float32 (rows, out); zeros for rows of no group. It has a gradient by the rows,
      and no forward-mode derivative (`jax.jvp`).

    Example:
      >>> import numpy as np
      >>> from jaxprune.sparse.grouped import grouped_matmul
      >>> from jaxprune.sparse.packed_matrix import pack_matrix
      >>> packed = pack_matrix(np.array([[[2.0, 0]], [[0, 3.0]]], np.float32))
      >>> rows = jnp.ones((3, 2))
      >>> grouped_matmul(rows, packed, jnp.array([2, 1])).tolist()
      [[2.0], [2.0], [3.0]]
    """
    return _grouped(jnp.asarray(rows), packed, jnp.asarray(sizes), precision)


# The number of blocks is traced, and JAX does not differentiate such a loop.
@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _grouped(
    rows: jax.Array, packed: PackedMatrix, sizes: jax.Array, precision: Any
) -> jax.Array:
    def multiply(x: jax.Array, matrix: PackedMatrix) -> jax.Array:
        return matmul(x, matrix, precision=precision)

    return _by_blocks(multiply, rows, packed, sizes, packed.shape[1])


def _by_blocks(
    multiply: Callable[[jax.Array, PackedMatrix], jax.Array],
    rows: jax.Array,
    packed: PackedMatrix,
    sizes: jax.Array,
    width: int,
) -> jax.Array:
    """What each block of rows makes with its group's matrix, float32 (rows, width)."""
    count = len(rows)
    length = _block_length(count, packed.shape[0])
    # A block may reach behind the last row: `dynamic_slice` would move it back.
    padded = jnp.pad(rows, ((0, length), (0, 0)))  # (rows + length, in)

    def add(made: Any, group: Any, start: Any, in_group: Any) -> Any:
        x = jax.lax.dynamic_slice_in_dim(padded, start, length)  # (length, in)
        part = multiply(x, group_matrix(packed, group))
        # What lies behind the block's rows is written later, by its own block.
        part = jnp.where(in_group[:, None], part, 0.0)
        return jax.lax.dynamic_update_slice_in_dim(made, part, start, 0)

    made = jnp.zeros((count + length, width), jnp.float32)
    return grouped_rows.over_blocks(add, made, sizes, length)[:count]


def _forward(
    rows: Any, packed: PackedMatrix, sizes: Any, precision: Any
) -> tuple[jax.Array, Any]:
    check_undifferentiated(leaf.perturbed for leaf in jax.tree.leaves(packed))
    rows, packed, sizes = jax.tree.map(
        lambda leaf: leaf.value, (rows, packed, sizes), is_leaf=_is_primal
    )
    # The rows themselves are not needed, but their dtype is.
    kept = jnp.zeros((0, rows.shape[1]), rows.dtype), packed, sizes
    return _grouped(rows, packed, sizes, precision), kept


def _is_primal(leaf: Any) -> bool:
    return isinstance(leaf, CustomVJPPrimal)


def _backward(precision: Any, kept: Any, cotangent: Any) -> Any:
    empty, packed, sizes = kept
    inputs = empty.shape[1]

    def multiply(y: jax.Array, matrix: PackedMatrix) -> jax.Array:
        zeros = jnp.zeros((len(y), inputs), jnp.float32)
        product = functools.partial(matmul, packed=matrix, precision=precision)
        (part,) = jax.vjp(product, zeros)[1](y)
        return cast("jax.Array", part)

    if isinstance(cotangent, SymbolicZero):
        return None, None, None
    to_rows = _by_blocks(multiply, cotangent, packed, sizes, inputs)
    return to_rows.astype(empty.dtype), None, None


_grouped.defvjp(_forward, _backward, symbolic_zeros=True)


def _block_length(rows: int, groups: int) -> int:
    """Rows of a block: of few rows an expert gets one or two, as in decoding."""
    if rows <= groups:
        return 1
    most = cpu_kernels.MOST_VECTORS
    return most if rows <= most * groups else grouped_rows.block_length(rows, groups)


def group_matrix(packed: PackedMatrix, group: jax.Array) -> PackedMatrix:
    """The matrix of one group, whose number may be traced.

    Args:
      packed: matrices (groups, out, in).
      group: integer, number of the group.

    Returns:
      The matrix (out, in).
    """
    _, outputs, inputs = packed.shape

    def part(array: Any, size: int) -> Any:
        if array is None:
            return None
        return jax.lax.dynamic_slice_in_dim(array, group * outputs, size)

    values = packed.values
    if packed.words is None:
        count = outputs * -(-inputs // WORD) * WORD  # rows are filled up
        halves = 2 if packed.encoding == "int4" else 1
        start, size = group * (count // halves), (count + SPARE) // halves
        values = jax.lax.dynamic_slice_in_dim(values, start, size)
    return dataclasses.replace(
        packed,
        values=values,
        scales=part(packed.scales, outputs),
        words=part(packed.words, outputs),
        # Positions among the values of all groups.
        starts=part(packed.starts, outputs + 1),
        shape=packed.shape[1:],
    )
