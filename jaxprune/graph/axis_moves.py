"""What primitives that only move values do to the dimensions of their axes.

Reshapes, slices, concatenations, gathers and their like. Each rule takes the
primitive's parameters, its operands and the shapes of its results, ties or freezes
dimensions, and gives the axes of each result. Beside each axis it is kept whether the
values are zero where a position is removed, that is, where all weights that belong to
it are zero.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxprune.graph.axis_dims import (
    Dim,
    as_product,
    as_sum,
    freeze,
    new_dim,
    product_of,
    sum_of,
    unify,
)

_PART = "is a part of another axis"
_DATA = "is indexed by data"


class Axes(NamedTuple):
    """The axes of a value.

    Attributes:
      dims: the dimension of each.
      zeros: whether the value is zero at the removed positions of each.
    """

    dims: tuple[Dim, ...]
    zeros: tuple[bool, ...]


class Operand(NamedTuple):
    """One operand of a step.

    Attributes:
      shape: its shape.
      axes: its axes.
      scalar: the one number that it is known to hold everywhere, or None.
    """

    shape: tuple[int, ...]
    axes: Axes
    scalar: float | None = None


Params = Mapping[str, Any]
Shapes = Sequence[tuple[int, ...]]
Rule = Callable[[Params, Sequence[Operand], Shapes], list[Axes]]


def new_axes(shape: Sequence[int], why: str | None) -> Axes:
    """Dimensions that nothing is tied to, frozen where there is a reason."""
    return Axes(tuple(new_dim(size, why) for size in shape), (False,) * len(shape))


def picked(operand: Operand, axes: Sequence[int]) -> Axes:
    """Some axes of an operand, in another order."""
    dims, zeros = operand.axes
    return Axes(tuple(dims[i] for i in axes), tuple(zeros[i] for i in axes))


def _reshape(params: Params, operands: Sequence[Operand], shapes: Shapes) -> list[Axes]:
    operand, after = operands[0], shapes[0]
    if (order := params.get("dimensions")) is not None:  # transposed first
        shape = tuple(operand.shape[i] for i in order)
        operand = Operand(shape, picked(operand, order))
    # Without its axes of no length an empty value is reshaped as any other.
    sizes = [math.prod(filter(None, shape)) for shape in (operand.shape, after)]
    if 0 in after and sizes[0] != sizes[1]:
        for dim in operand.axes.dims:
            freeze(dim, "is reshaped in another order")
        return [new_axes(after, "is reshaped in another order")]
    before = [i for i, size in enumerate(operand.shape) if size > 1]
    pending = [i for i, size in enumerate(after) if size > 1]
    dims, zeros = [new_dim(min(size, 1)) for size in after], [False] * len(after)
    while pending:
        # Axes of both sides are taken until their sizes agree.
        old, new = [before.pop(0)], [pending.pop(0)]
        while (a := math.prod(operand.shape[i] for i in old)) != (
            b := math.prod(after[i] for i in new)
        ):
            if a < b:
                old.append(before.pop(0))
            else:
                new.append(pending.pop(0))
        own = [operand.axes.dims[i] for i in old]
        found = as_product(product_of(own), [after[i] for i in new])
        if found is None:
            for dim in own:
                freeze(dim, "is reshaped across its parts")
            found = [new_dim(after[i], "is reshaped across its parts") for i in new]
        stays = all(operand.axes.zeros[i] for i in old)
        for axis, dim in zip(new, found, strict=True):
            dims[axis], zeros[axis] = dim, stays
    return [Axes(tuple(dims), tuple(zeros))]


def _transpose(
    params: Params, operands: Sequence[Operand], shapes: Shapes
) -> list[Axes]:
    return [picked(operands[0], params["permutation"])]


def _squeeze(params: Params, operands: Sequence[Operand], shapes: Shapes) -> list[Axes]:
    rank = len(operands[0].shape)
    gone = {axis % rank for axis in params["dimensions"]}
    return [picked(operands[0], [i for i in range(rank) if i not in gone])]


def _broadcast(
    params: Params, operands: Sequence[Operand], shapes: Shapes
) -> list[Axes]:
    operand, result = operands[0], new_axes(shapes[0], None)
    dims, zeros = list(result.dims), list(result.zeros)
    for axis, target in enumerate(params["broadcast_dimensions"]):
        if operand.shape[axis] == shapes[0][target]:
            dims[target] = operand.axes.dims[axis]
            zeros[target] = operand.axes.zeros[axis]
    return [Axes(tuple(dims), tuple(zeros))]


def _concatenate(
    params: Params, operands: Sequence[Operand], shapes: Shapes
) -> list[Axes]:
    own, dims, zeros = params["dimension"], [], []
    for axis in range(len(shapes[0])):
        each = [operand.axes.dims[axis] for operand in operands]
        if axis != own:
            for other in each[1:]:
                unify(each[0], other)
        dims.append(sum_of(each) if axis == own else each[0])
        zeros.append(all(operand.axes.zeros[axis] for operand in operands))
    return [Axes(tuple(dims), tuple(zeros))]


def _stack(params: Params, operands: Sequence[Operand], shapes: Shapes) -> list[Axes]:
    """A new axis on which each operand is one position."""
    axis, first = params["axis"], operands[0].axes
    for operand in operands[1:]:
        for one, other in zip(first.dims, operand.axes.dims, strict=True):
            unify(one, other)
    zeros = [all(of) for of in zip(*(o.axes.zeros for o in operands), strict=True)]
    dims, new = list(first.dims), new_dim(len(operands), "is a stack of other values")
    dims.insert(axis, new)
    zeros.insert(axis, False)
    return [Axes(tuple(dims), tuple(zeros))]


def _tile(params: Params, operands: Sequence[Operand], shapes: Shapes) -> list[Axes]:
    """Copies one behind the other, which need not all stay."""
    dims, zeros = operands[0].axes
    copies = [new_dim(count) for count in params["reps"]]
    pairs = zip(copies, dims, params["reps"], zeros, strict=True)
    kept = tuple(zero and count == 1 for *_, count, zero in pairs)
    made = zip(copies, dims, strict=True)
    return [Axes(tuple(product_of([copy, dim]) for copy, dim in made), kept)]


def _taken(dim: Dim, size: int, start: int | None) -> Dim:
    """A range of a dimension; where it begins is not known for None."""
    pieces = (
        None if start is None else as_sum(dim, [start, size, dim.size - start - size])
    )
    if pieces is None:
        freeze(dim, "a part of it is taken that is no range of its units")
        return new_dim(size, _PART)
    return pieces[1 if start else 0]


def _slice(params: Params, operands: Sequence[Operand], shapes: Shapes) -> list[Axes]:
    operand = operands[0]
    strides = params["strides"] or (1,) * len(shapes[0])
    dims = [
        dim
        if size == whole
        else _taken(dim, size, start if stride == 1 and size else None)
        for dim, size, whole, start, stride in zip(
            operand.axes.dims,
            shapes[0],
            operand.shape,
            params["start_indices"],
            strides,
            strict=True,
        )
    ]
    return [Axes(tuple(dims), operand.axes.zeros)]


def _dynamic_slice(
    params: Params, operands: Sequence[Operand], shapes: Shapes
) -> list[Axes]:
    """Where it begins is an operand, so an axis that is cut keeps all its positions."""
    operand, dims = operands[0], []
    for dim, size, whole in zip(
        operand.axes.dims, shapes[0], operand.shape, strict=True
    ):
        if size != whole:
            freeze(dim, _DATA)
            dim = new_dim(size, _PART)
        dims.append(dim)
    return [Axes(tuple(dims), operand.axes.zeros)]


def _dynamic_update_slice(
    params: Params, operands: Sequence[Operand], shapes: Shapes
) -> list[Axes]:
    whole, part = operands[:2]
    for one, other in zip(whole.axes.dims, part.axes.dims, strict=True):
        if one.size == other.size:
            unify(one, other)
        else:
            freeze(one, _DATA)
            freeze(other, _PART)
    pairs = zip(whole.axes.zeros, part.axes.zeros, strict=True)
    return [Axes(whole.axes.dims, tuple(a and b for a, b in pairs))]


def _split(params: Params, operands: Sequence[Operand], shapes: Shapes) -> list[Axes]:
    (operand,), axis = operands, params["axis"]
    pieces = None
    sizes = [int(size) for size in params["sizes"]]  # NumPy's in jnp.split
    if 0 not in sizes:
        pieces = as_sum(operand.axes.dims[axis], sizes)
    if pieces is None:
        freeze(operand.axes.dims[axis], "is split across its units")
        pieces = [new_dim(size, _PART) for size in sizes]
    dims = operand.axes.dims
    return [
        Axes((*dims[:axis], piece, *dims[axis + 1 :]), operand.axes.zeros)
        for piece in pieces
    ]


def _unstack(params: Params, operands: Sequence[Operand], shapes: Shapes) -> list[Axes]:
    (operand,), axis = operands, params["axis"]
    freeze(operand.axes.dims[axis], "is taken apart, position by position")
    left = [i for i in range(len(operand.shape)) if i != axis]
    return [picked(operand, left) for _ in shapes]


def _pad(params: Params, operands: Sequence[Operand], shapes: Shapes) -> list[Axes]:
    operand, dims = operands[0], []
    for dim, (low, high, inner) in zip(
        operand.axes.dims, params["padding_config"], strict=True
    ):
        if inner or low < 0 or high < 0:
            freeze(dim, "is padded between its units")
            size = low + high + dim.size + inner * max(dim.size - 1, 0)
            dims.append(new_dim(size, "is padded between its units"))
        else:
            ends = [Dim(n, "is padding") for n in (low, high)]
            dims.append(sum_of([ends[0], dim, ends[1]]))
    # Where another axis is padded by what is not zero, a removed position is not zero.
    padded = {i for i, own in enumerate(params["padding_config"]) if max(own) > 0}
    blank = operands[1].scalar == 0
    zeros = [
        own and (blank or padded <= {axis})
        for axis, own in enumerate(operand.axes.zeros)
    ]
    return [Axes(tuple(dims), tuple(zeros))]


def _gather(params: Params, operands: Sequence[Operand], shapes: Shapes) -> list[Axes]:
    (operand, indices), numbers = operands[:2], params["dimension_numbers"]
    sizes, batching = params["slice_sizes"], numbers.operand_batching_dims
    gone = (*numbers.collapsed_slice_dims, *batching)
    window = [i for i in range(len(operand.shape)) if i not in gone]
    result = new_axes(shapes[0], _PART)
    dims, zeros = list(result.dims), [False] * len(result.dims)
    fill = params["fill_value"]
    # Filled with a number, a removed unit is not zero; NaN is NaN in every unit.
    stays = fill is None or fill == 0 or fill != fill
    for axis in gone:
        freeze(operand.axes.dims[axis], _DATA)
    for axis, target in zip(window, numbers.offset_dims, strict=True):
        if sizes[axis] == operand.shape[axis]:
            dims[target] = operand.axes.dims[axis]
            zeros[target] = stays and operand.axes.zeros[axis]
        else:
            freeze(operand.axes.dims[axis], _DATA)
    # The last axis of the indices holds the index itself.
    free = [i for i in range(len(shapes[0])) if i not in numbers.offset_dims]
    if batching:
        for dim in indices.axes.dims:
            freeze(dim, _DATA)
    for axis, target in enumerate(free):
        dims[target] = indices.axes.dims[axis]
    freeze(indices.axes.dims[-1], _DATA)
    return [Axes(tuple(dims), tuple(zeros))]


RULES: dict[str, Rule] = {
    "broadcast_in_dim": _broadcast,
    "concatenate": _concatenate,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update_slice,
    "gather": _gather,
    "pad": _pad,
    "reshape": _reshape,
    "slice": _slice,
    "split": _split,
    "squeeze": _squeeze,
    "stack": _stack,
    "tile": _tile,
    "transpose": _transpose,
    "unstack": _unstack,
}
