"""Tensors whose values are integers times a scale that a group shares: int4, int8.

A directory holds such weights as plain floats. Here their scales are recovered, exactly
or not at all: level times scale must give every value, bit for bit. A scale is a
bfloat16, shared by `group` elements along the last or the second-last axis of the
tensor; a level is an integer of magnitude 2^(bits - 1) - 1 at most.
"""

import math
from typing import NamedTuple

import ml_dtypes
import numpy as np

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_PART = 1 << 20  # elements that are looked at together
_FIRST = 64  # rows that are tried before all of them


class Grid(NamedTuple):
    """How a tensor may have been rounded.

    Attributes:
      bits: number of bits of a level, 4 or 8.
      group: number of elements that share a scale.
    """

    bits: int
    group: int

    @property
    def most(self) -> int:
        """The highest level."""
        return 2 ** (self.bits - 1) - 1


class Scales(NamedTuple):
    """The scales of a tensor.

    Attributes:
      grid: bits and group.
      axis: along which groups lie, -1 or -2.
      shape: shape of the tensor.
      values: bfloat16, like the tensor with one element a group along that axis.
    """

    grid: Grid
    axis: int
    shape: tuple[int, ...]
    values: np.ndarray

    def spread(self) -> np.ndarray:
        """The scale of each element, float32 of the tensor's shape."""
        ends = tuple(map(slice, self.shape))
        scales = np.repeat(self.values, self.grid.group, self.axis)[ends]
        return scales.astype(np.float32)


def scales_shape(shape: tuple[int, ...], grid: Grid, axis: int) -> tuple[int, ...]:
    """The shape of a tensor's scales."""
    counts = list(shape)
    counts[axis] = -(-shape[axis] // grid.group)
    return tuple(counts)


def find_scales(tensor: np.ndarray, grid: Grid) -> Scales | None:
    """The scales that a tensor's values are whole numbers of, or None.

    Args:
      tensor: array, at least a matrix of float16, bfloat16 or float32; others have no
        scales.
      grid: bits and group to look for.

    Returns:
      The scales, by which `to_levels` and `from_levels` give the tensor back, or None.

    Example:
      >>> import numpy as np
      >>> from jaxprune.lm.checkpoints import levels
      >>> tensor = np.array([[7, 0, -3, 1], [0, 0, 7, 2]], "f4") * 0.5
      >>> found = levels.find_scales(tensor, levels.Grid(bits=4, group=4))
      >>> found.values.ravel().tolist()
      [0.5, 0.5]
    """
    kinds = (np.float16, np.float32, BFLOAT16)
    if tensor.ndim < 2 or not tensor.size or tensor.dtype not in kinds:
        return None
    stack = tensor.reshape(-1, *tensor.shape[-2:])  # a stack of matrices
    for axis in (-1, -2):
        matrices = stack if axis == -1 else stack.swapaxes(1, 2)
        count, size = matrices.shape[1:]  # rows of (size,) have the groups
        step = max(1, _PART // size)
        starts = [(m, i) for m in range(len(stack)) for i in range(0, count, step)]
        parts = [(m, slice(i, i + step)) for m, i in starts]
        scales = np.empty((len(stack), count, -(-size // grid.group)), BFLOAT16)
        # Most tensors that were not rounded fail at their first few rows.
        for number, rows in [(0, slice(_FIRST)), *parts]:
            row_scales = _scales(matrices[number, rows], grid)
            if row_scales is None:
                break
            scales[number, rows] = row_scales
        else:
            values = scales if axis == -1 else scales.swapaxes(1, 2)
            values = np.ascontiguousarray(values)
            shape = scales_shape(tensor.shape, grid, axis)
            return Scales(grid, axis, tensor.shape, values.reshape(shape))
    return None


def split_levels(
    tensor: np.ndarray, grid: Grid
) -> tuple[np.ndarray, np.ndarray] | None:
    """A rounded tensor as whole numbers and scales, as `qwix.QArray` takes them.

    Args:
      tensor: tensor; see `find_scales`.
      grid: bits and group; the group must divide the axis for qwix.

    Returns:
      The levels, int8 of the tensor's shape, and the bfloat16 scales, with one element
      a group along one axis; None where it was not rounded so.

    Example:
      >>> import numpy as np
      >>> from jaxprune.lm.checkpoints import levels
      >>> tensor = np.array([[7, 0, -3, 1], [0, 0, 7, 2]], "f4") * 0.5
      >>> whole, scales = levels.split_levels(tensor, levels.Grid(bits=4, group=4))
      >>> whole.tolist(), scales.shape
      ([[7, 0, -3, 1], [0, 0, 7, 2]], (2, 1))
    """
    scales = find_scales(tensor, grid)
    if scales is None:
        return None
    return to_levels(tensor, scales.spread()), scales.values


def to_levels(values: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The levels of some values, int8, by the scale of each."""
    return np.rint(values.astype(np.float32) / scales).astype(np.int8)


def from_levels(levels: np.ndarray, scales: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The values of some levels, by the scale of each."""
    with np.errstate(all="ignore"):  # a damaged file may hold any scale
        return (levels.astype(np.float32) * scales).astype(dtype)


def pack_levels(levels: np.ndarray, bits: int) -> np.ndarray:
    """Levels as bytes; of 4 bits two a byte, the first in the low half."""
    if bits == 8:
        return levels.view(np.uint8)
    # Two's complement of 4 bits.
    nibbles = np.pad(levels.view(np.uint8) & 15, (0, levels.size % 2))
    return nibbles[0::2] | nibbles[1::2] << 4


def unpack_levels(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """The first `count` levels of their bytes, int8."""
    if bits == 8:
        return packed.view(np.int8)
    nibbles = np.stack([packed & 15, packed >> 4], axis=1).reshape(-1)
    levels = nibbles[:count].view(np.int8)
    return np.where(levels > 7, levels - 16, levels)  # the sign bit is the fourth


def _scales(rows: np.ndarray, grid: Grid) -> np.ndarray | None:
    """The scale of each group of each row, (rows, groups), or None."""
    count, size = rows.shape
    padded = np.pad(rows, ((0, 0), (0, -size % grid.group)))  # zeros fit any scale
    groups = padded.reshape(-1, grid.group)  # (rows * groups, group)
    bits = groups.view(f"u{groups.dtype.itemsize}")
    largest = np.max(np.abs(groups.astype(np.float32)), axis=1)  # (rows * groups,)
    scales = np.ones(len(groups), BFLOAT16)  # a scale each
    open_groups = np.flatnonzero((bits != 0).any(axis=1))
    # The largest weight's level is the highest, or not much below it.
    for level in range(grid.most, 0, -1):
        # A scale's last bit may have been lost where its weights were stored.
        for step in np.array([0, 1, -1], np.int16):
            if not open_groups.size:
                return scales.reshape(count, -1)
            with np.errstate(all="ignore"):
                near = (largest[open_groups] / level).astype(BFLOAT16).view(
                    np.int16
                ) + step
                candidate = near.view(BFLOAT16)
                scale32 = candidate.astype(np.float32)[:, None]
                # (left, group)
                levels = np.rint(groups[open_groups].astype(np.float32) / scale32)
                product = (levels * scale32).astype(groups.dtype).view(bits.dtype)
            # Minus zero is no level, and NaN is none either.
            same = (product == bits[open_groups]) & (
                (levels != 0) | (bits[open_groups] == 0)
            )
            good = np.all(same & (np.abs(levels) <= grid.most), axis=1)
            scales[open_groups[good]] = candidate[good]
            open_groups = open_groups[~good]
    return None if open_groups.size else scales.reshape(count, -1)


def levels_bytes(shape: tuple[int, ...], nonzero: int, grid: Grid) -> int:
    """About the bytes of a tensor: a bit a weight, levels, scales."""
    size = math.prod(shape)
    return -(-size // 8) - (-nonzero * grid.bits // 8) + 2 * -(-size // grid.group)
