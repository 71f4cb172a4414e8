"""What primitives that only move values do to the dimensions of their axes.

Reshapes, slices, concatenations, gathers and their like. Each rule ties or freezes the
dimensions of its operands and gives the axes of each result. Beside each axis it is
kept whether the values are zero where a position is removed, that is, where all weights
that belong to it are zero.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

from jaxprune.graph.axis_dims import (
    Dim,
    as_product,
    as_sum,
    freeze,
    is_larger,
    new_dim,
    product_of,
    sum_of,
    unify,
)
from jaxprune.graph.equation import Equation

_PART = "is a part of another axis"
_DATA = "is indexed by data"


class ValueAxes(NamedTuple):
    """The axes of a value.

    Attributes:
      dims: dimension of each axis.
      zeros: whether the value is zero at the removed positions of each axis.
    """

    dims: tuple[Dim, ...]
    zeros: tuple[bool, ...]


class AxesOperand(NamedTuple):
    """One operand of a step.

    Attributes:
      shape: shape of the operand.
      axes: axes of the operand.
      scalar: the one number that it is known to hold everywhere, or None.
    """

    shape: tuple[int, ...]
    axes: ValueAxes
    scalar: float | None = None


AxesEquation: TypeAlias = Equation[AxesOperand]
DimsRule: TypeAlias = Callable[[AxesEquation], list[ValueAxes]]
"""A step to the axes of each result; ties and freezes those of its operands."""


def new_axes(shape: Sequence[int], why: str | None) -> ValueAxes:
    """Dimensions that nothing is tied to, frozen where there is a reason."""
    return ValueAxes(tuple(new_dim(size, why) for size in shape), (False,) * len(shape))


def select_axes(operand: AxesOperand, axes: Sequence[int]) -> ValueAxes:
    """Some axes of an operand, in another order."""
    dims, zeros = operand.axes
    return ValueAxes(tuple(dims[i] for i in axes), tuple(zeros[i] for i in axes))


def reshape_axes(equation: AxesEquation) -> list[ValueAxes]:
    """Axes of both sides, in groups of equal size, are factors of the same product."""
    operand, after = equation.operands[0], equation.shapes[0]
    if (order := equation.params.get("dimensions")) is not None:  # transposed first
        shape = tuple(operand.shape[i] for i in order)
        operand = AxesOperand(shape, select_axes(operand, order))
    # Without its axes of no length an empty value is reshaped as any other.
    sizes = [math.prod(filter(None, shape)) for shape in (operand.shape, after)]
    if 0 in after and sizes[0] != sizes[1]:
        for dim in operand.axes.dims:
            freeze(dim, "is reshaped in another order")
        return [new_axes(after, "is reshaped in another order")]
    pending_old = [i for i, size in enumerate(operand.shape) if size not in (0, 1)]
    pending_new = [i for i, size in enumerate(after) if size not in (0, 1)]
    dims, zeros = [new_dim(int(size != 0)) for size in after], [False] * len(after)
    while pending_new:
        # The side with the smaller size so far takes its next axis, until they agree.
        old, new = [pending_old.pop(0)], [pending_new.pop(0)]
        while (size_old := math.prod(operand.shape[i] for i in old)) != (
            size_new := math.prod(after[i] for i in new)
        ):
            if is_larger(size_new, size_old):
                old.append(pending_old.pop(0))
            else:
                new.append(pending_new.pop(0))
        factors = [operand.axes.dims[i] for i in old]
        parts = as_product(product_of(factors), [after[i] for i in new])
        if parts is None:
            for dim in factors:
                freeze(dim, "is reshaped across its parts")
            parts = [new_dim(after[i], "is reshaped across its parts") for i in new]
        zero_stays = all(operand.axes.zeros[i] for i in old)
        for axis, dim in zip(new, parts, strict=True):
            dims[axis], zeros[axis] = dim, zero_stays
    return [ValueAxes(tuple(dims), tuple(zeros))]


def transpose_axes(equation: AxesEquation) -> list[ValueAxes]:
    """The same axes in another order."""
    return [select_axes(equation.operands[0], equation.params["permutation"])]


def squeeze_axes(equation: AxesEquation) -> list[ValueAxes]:
    """All axes but some of length one."""
    rank = len(equation.operands[0].shape)
    dropped = {axis % rank for axis in equation.params["dimensions"]}
    axes = [i for i in range(rank) if i not in dropped]
    return [select_axes(equation.operands[0], axes)]


def broadcast_axes(equation: AxesEquation) -> list[ValueAxes]:
    """Axes that keep their size stay; those that are repeated or added are free."""
    operand, result = equation.operands[0], new_axes(equation.shapes[0], None)
    dims, zeros = list(result.dims), list(result.zeros)
    for axis, target in enumerate(equation.params["broadcast_dimensions"]):
        if operand.shape[axis] == equation.shapes[0][target]:
            dims[target] = operand.axes.dims[axis]
            zeros[target] = operand.axes.zeros[axis]
    return [ValueAxes(tuple(dims), tuple(zeros))]


def concatenate_axes(equation: AxesEquation) -> list[ValueAxes]:
    """One axis is the sum of the operands'; the others are the same in all."""
    dims, zeros = [], []
    for axis in range(len(equation.shapes[0])):
        summands = [operand.axes.dims[axis] for operand in equation.operands]
        if axis == equation.params["dimension"]:
            dims.append(sum_of(summands))
        else:
            for dim in summands[1:]:
                unify(summands[0], dim)
            dims.append(summands[0])
        zeros.append(all(operand.axes.zeros[axis] for operand in equation.operands))
    return [ValueAxes(tuple(dims), tuple(zeros))]


def stack_axes(equation: AxesEquation) -> list[ValueAxes]:
    """A new axis on which each operand is one position."""
    operands, first = equation.operands, equation.operands[0].axes
    for operand in operands[1:]:
        for a, b in zip(first.dims, operand.axes.dims, strict=True):
            unify(a, b)
    columns = zip(*(operand.axes.zeros for operand in operands), strict=True)
    zeros = [all(column) for column in columns]
    dims, new = list(first.dims), new_dim(len(operands), "is a stack of other values")
    dims.insert(equation.params["axis"], new)
    zeros.insert(equation.params["axis"], False)
    return [ValueAxes(tuple(dims), tuple(zeros))]


def tile_axes(equation: AxesEquation) -> list[ValueAxes]:
    """Copies one behind the other, which need not all stay."""
    (dims, zeros), counts = equation.operands[0].axes, equation.params["reps"]
    # Copies are the outer factor: an axis of 2 copies of 3 is (2, 3).
    tiled = [
        product_of([new_dim(count), dim])
        for count, dim in zip(counts, dims, strict=True)
    ]
    pairs = zip(counts, zeros, strict=True)
    return [ValueAxes(tuple(tiled), tuple(zero and n == 1 for n, zero in pairs))]


def _range_of(dim: Dim, size: int, start: int | None) -> Dim:
    """A range of a dimension; where it begins is not known for None."""
    pieces = None
    if start is not None:
        pieces = as_sum(dim, [start, size, dim.size - start - size])
    if pieces is None:
        freeze(dim, "a part of it is taken that is no range of its units")
        return new_dim(size, _PART)
    return pieces[1 if start else 0]  # a size of none is left out of the pieces


def slice_axes(equation: AxesEquation) -> list[ValueAxes]:
    """An axis of which a range is taken is a sum; steps freeze it."""
    operand, after = equation.operands[0], equation.shapes[0]
    strides = equation.params["strides"] or (1,) * len(after)
    dims = []
    for axis, (dim, size) in enumerate(zip(operand.axes.dims, after, strict=True)):
        if size != operand.shape[axis]:
            is_range = strides[axis] == 1 and size
            start = equation.params["start_indices"][axis] if is_range else None
            dim = _range_of(dim, size, start)
        dims.append(dim)
    return [ValueAxes(tuple(dims), operand.axes.zeros)]


def dynamic_slice_axes(equation: AxesEquation) -> list[ValueAxes]:
    """Where it begins is an operand, so an axis that is cut keeps all its positions."""
    operand, dims = equation.operands[0], []
    for dim, size, size_before in zip(
        operand.axes.dims, equation.shapes[0], operand.shape, strict=True
    ):
        if size != size_before:
            freeze(dim, _DATA)
            dim = new_dim(size, _PART)
        dims.append(dim)
    return [ValueAxes(tuple(dims), operand.axes.zeros)]


def dynamic_update_slice_axes(equation: AxesEquation) -> list[ValueAxes]:
    """Axes that the update covers are the same; the others keep all positions."""
    array, update = equation.operands[:2]
    for a, b in zip(array.axes.dims, update.axes.dims, strict=True):
        if a.size == b.size:
            unify(a, b)
        else:
            freeze(a, _DATA)
            freeze(b, _PART)
    pairs = zip(array.axes.zeros, update.axes.zeros, strict=True)
    return [ValueAxes(array.axes.dims, tuple(a and b for a, b in pairs))]


def split_axes(equation: AxesEquation) -> list[ValueAxes]:
    """The axis is the sum of its pieces."""
    (operand,), axis = equation.operands, equation.params["axis"]
    pieces = None
    sizes = [int(size) for size in equation.params["sizes"]]  # NumPy's in jnp.split
    if 0 not in sizes:
        pieces = as_sum(operand.axes.dims[axis], sizes)
    if pieces is None:
        freeze(operand.axes.dims[axis], "is split across its units")
        pieces = [new_dim(size, _PART) for size in sizes]
    dims = operand.axes.dims
    return [
        ValueAxes((*dims[:axis], piece, *dims[axis + 1 :]), operand.axes.zeros)
        for piece in pieces
    ]


def unstack_axes(equation: AxesEquation) -> list[ValueAxes]:
    """One result for each position of an axis, which keeps them all."""
    (operand,), axis = equation.operands, equation.params["axis"]
    freeze(operand.axes.dims[axis], "is taken apart, position by position")
    others = [i for i in range(len(operand.shape)) if i != axis]
    return [select_axes(operand, others) for _ in equation.shapes]


def pad_axes(equation: AxesEquation) -> list[ValueAxes]:
    """Padding is a summand that stays; between units it freezes them."""
    operand, config = equation.operands[0], equation.params["padding_config"]
    dims = []
    for dim, (low, high, inner) in zip(operand.axes.dims, config, strict=True):
        if inner or low < 0 or high < 0:
            freeze(dim, "is padded between its units")
            size = low + high + dim.size + inner * max(dim.size - 1, 0)
            dims.append(new_dim(size, "is padded between its units"))
        else:
            before, after = (Dim(size, "is padding") for size in (low, high))
            dims.append(sum_of([before, dim, after]))
    # Where another axis is padded by what is not zero, a removed position is not zero.
    padded = {i for i, widths in enumerate(config) if max(widths) > 0}
    with_zeros = equation.operands[1].scalar == 0
    zeros = [
        zero and (with_zeros or padded <= {axis})
        for axis, zero in enumerate(operand.axes.zeros)
    ]
    return [ValueAxes(tuple(dims), tuple(zeros))]


def gather_axes(equation: AxesEquation) -> list[ValueAxes]:
    """Axes that are taken in full stay; those that are indexed keep all positions."""
    operand, indices = equation.operands[:2]
    numbers = equation.params["dimension_numbers"]
    indexed = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    window = [i for i in range(len(operand.shape)) if i not in indexed]
    # Frozen but for what is set below.
    result = new_axes(equation.shapes[0], _PART)
    dims, zeros = list(result.dims), [False] * len(result.dims)
    fill = equation.params["fill_value"]
    # Filled with a number, a removed unit is not zero; NaN is NaN in every unit.
    zero_stays = fill is None or fill == 0 or fill != fill
    for axis in indexed:
        freeze(operand.axes.dims[axis], _DATA)
    for axis, target in zip(window, numbers.offset_dims, strict=True):
        if equation.params["slice_sizes"][axis] == operand.shape[axis]:
            dims[target] = operand.axes.dims[axis]
            zeros[target] = zero_stays and operand.axes.zeros[axis]
        else:
            freeze(operand.axes.dims[axis], _DATA)
    if numbers.operand_batching_dims:
        for dim in indices.axes.dims:
            freeze(dim, _DATA)
    # The last axis of the indices holds the index itself.
    free = [i for i in range(len(dims)) if i not in numbers.offset_dims]
    for axis, target in enumerate(free):
        dims[target] = indices.axes.dims[axis]
    freeze(indices.axes.dims[-1], _DATA)
    return [ValueAxes(tuple(dims), tuple(zeros))]
