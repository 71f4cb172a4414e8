"""Rows that lie group by group, and a matrix for each group: the experts of a mixture.

On a CPU, XLA compiles `jax.lax.ragged_dot` to the product of all rows with every
group's matrix, with the rows of other groups set to zero. That multiplies memory and
work by the number of groups. Here the rows are cut into blocks of one group each, and
each block is multiplied by the matrix of its group. The price: forward-mode
differentiation (`jax.jvp`) is not defined through this product.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num

_LONGEST = 256  # rows of a block; fewer where groups are smaller on average
_SHORTEST = 16


def dot(
    rows: Float[Array, "rows in"],
    weight: Float[Array, "groups in out"],
    sizes: Int[Array, " groups"],
    precision: Any = None,
    dtype: Any = None,
) -> Float[Array, "rows out"]:
    """`jax.lax.ragged_dot`, block by block on one device that is no TPU.

    TPU has an instruction for it. Arrays that are spread over devices, and what is
    traced without being compiled, get the primitive itself: XLA can split that over
    devices, and the trace of a model can read it.

    Args:
      rows: inputs, group by group; rows behind the last group belong to none.
      weight: matrix of each group.
      sizes: number of rows of each group.
      precision: precision of the products, as in `jax.lax.dot`.
      dtype: dtype of the results; None for that of rows and matrices.

    Returns:
      The products; zeros for rows of no group.
    """
    # What is traced without being compiled is traced to be read: to the primitive.
    settings: Any = jax.config
    if settings.jax_disable_jit or any(map(_is_spread, (rows, weight, sizes))):
        return _primitive(rows, weight, sizes, precision, dtype)
    return _by_platform(rows, weight, sizes, precision, dtype)


def _is_spread(x: Array) -> bool:
    """Whether an array may lie on several devices, or differs between them.

    The latter inside of a `shard_map` that keeps track of it.
    """
    abstract: Any = jax.typeof(x)
    mesh = abstract.sharding.mesh
    over_mesh = mesh.size > 1 and len(mesh.manual_axes) < len(mesh.axis_names)
    return bool(over_mesh or abstract.manual_axis_type.varying)


def _primitive(
    rows: Array, weight: Array, sizes: Array, precision: Any, dtype: Any
) -> Array:
    return jax.lax.ragged_dot(
        rows, weight, sizes, precision=precision, preferred_element_type=dtype
    )


# Compiled, or a call outside of `jit` would compile its branches each time.
@functools.partial(jax.jit, static_argnums=(3, 4))
def _by_platform(
    rows: Array, weight: Array, sizes: Array, precision: Any, dtype: Any
) -> Array:
    def tpu(rows: Array, weight: Array, sizes: Array) -> Array:
        return _primitive(rows, weight, sizes, precision, dtype)

    def other(rows: Array, weight: Array, sizes: Array) -> Array:
        return _by_blocks(rows, weight, sizes, precision, dtype)

    return jax.lax.platform_dependent(rows, weight, sizes, tpu=tpu, default=other)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _by_blocks(
    rows: Array, weight: Array, sizes: Array, precision: Any, dtype: Any
) -> Array:
    return _product(rows, weight, sizes, 1, precision, dtype)


def add_outer(
    initial: Float[Array, "groups i j"],
    left_rows: Float[Array, "rows i"],
    right_rows: Float[Array, "rows j"],
    sizes: Int[Array, " groups"],
    precision: Any = "highest",
) -> Float[Array, "groups i j"]:
    """For each group, left^T right over its rows, added to initial sums.

    Args:
      initial: sums to add to.
      left_rows: rows, group by group.
      right_rows: second rows, as many and in the same groups.
      sizes: number of rows of each group.
      precision: precision of the products, as in `jax.lax.dot`.

    Returns:
      The sums.
    """

    def add(made: Array, group: Array, start: Array, in_group: Array) -> Array:
        blocks = [jax.lax.dynamic_slice_in_dim(x, start, length) for x in padded]
        a, b = (  # (length, i), (length, j), zero behind the group's rows
            jnp.where(in_group[:, None], block, jnp.zeros((), block.dtype))
            for block in blocks
        )
        term = jax.lax.dot(
            a.T, b, precision=precision, preferred_element_type=initial.dtype
        )
        return made.at[group].add(term)

    length = block_length(left_rows.shape[0], sizes.size)
    padded = [jnp.pad(x, ((0, length), (0, 0))) for x in (left_rows, right_rows)]
    return over_blocks(add, initial, sizes, length)


def sums(
    rows: Num[Array, "rows n"], sizes: Int[Array, " groups"]
) -> Num[Array, "groups n"]:
    """The sum over each group's rows."""
    return jax.ops.segment_sum(
        rows, of_rows(rows.shape[0], sizes), sizes.size, indices_are_sorted=True
    )


def of_rows(rows: int, sizes: Int[Array, " groups"]) -> Int[Array, " rows"]:
    """The group of each row; the number of groups for rows of none."""
    ends = jnp.cumsum(sizes.astype(np.int32))
    return jnp.searchsorted(ends, jnp.arange(rows), side="right")


def _product(
    rows: Array,
    weight: Array,
    sizes: Array,
    contracted: int,
    precision: Any,
    dtype: Any,
) -> Array:
    """Each row times its group's matrix, summed over one of the matrix's axes."""
    length = block_length(rows.shape[0], sizes.size)
    # A block may reach behind the last row: `dynamic_slice` would move it back.
    padded = jnp.pad(rows, ((0, length), (0, 0)))  # (rows + length, in)
    outputs = weight.shape[3 - contracted]
    dtype = dtype or jnp.result_type(rows, weight)

    def add(made: Array, group: Array, start: Array, in_group: Array) -> Array:
        x = jax.lax.dynamic_slice_in_dim(padded, start, length)  # (length, in)
        part = jax.lax.dot_general(
            x,
            weight[group],
            (((1,), (contracted - 1,)), ((), ())),
            precision=precision,
            preferred_element_type=dtype,
        )
        # What lies behind the block's rows is written later, by its own block.
        part = jnp.where(in_group[:, None], part, jnp.zeros((), dtype))
        return jax.lax.dynamic_update_slice_in_dim(made, part, start, 0)

    made = jnp.zeros((rows.shape[0] + length, outputs), dtype)
    return over_blocks(add, made, sizes, length)[: rows.shape[0]]


def block_length(rows: int, groups: int) -> int:
    """How many rows a block has."""
    return min(_LONGEST, max(_SHORTEST, rows // max(groups, 1)))


def over_blocks(
    add: Callable[[Array, Array, Array, Array], Array],
    made: Array,
    sizes: Int[Array, " groups"],
    length: int,
) -> Array:
    """What blocks of one group each make, in order of the rows.

    Args:
      add: function of the result so far, the group of a block, its first row, and
        booleans (length,) that say which rows belong to it; returns the new result.
      made: result to begin with.
      sizes: number of rows of each group.
      length: number of rows of a block; the last one of a group has fewer.

    Returns:
      What the last block makes.
    """
    if not sizes.size:
        return made
    sizes = sizes.astype(np.int32)
    blocks = -(-sizes // length)  # (groups,)
    last, end = jnp.cumsum(blocks), jnp.cumsum(sizes)  # (groups,) both

    def body(number: Array, result: Array) -> Array:
        group = jnp.searchsorted(last, number, side="right")
        done = (number - (last - blocks)[group]) * length  # rows of the group
        start = (end - sizes)[group] + done
        in_group = jnp.arange(length) < sizes[group] - done
        return add(result, group, start, in_group)

    return jax.lax.fori_loop(0, last[-1], body, made)


def _forward(
    rows: Array, weight: Array, sizes: Array, precision: Any, dtype: Any
) -> tuple[Array, Any]:
    return _product(rows, weight, sizes, 1, precision, dtype), (rows, weight, sizes)


def _backward(precision: Any, dtype: Any, kept: Any, cotangent: Array) -> Any:
    rows, weight, sizes = kept
    to_rows = _product(cotangent, weight, sizes, 2, precision, rows.dtype)
    # Narrow sums over many rows would lose their low bits.
    wide = jnp.zeros(weight.shape, jnp.promote_types(weight.dtype, np.float32))
    to_weight = add_outer(wide, rows, cotangent, sizes, precision).astype(weight.dtype)
    return to_rows, to_weight, np.zeros(sizes.shape, jax.dtypes.float0)


_by_blocks.defvjp(_forward, _backward)
