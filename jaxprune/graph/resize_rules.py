"""The sizes that are written into a step, once units are removed.

The steps of a smaller program are those of the dense one; only parameters that hold a
size change: of reshapes, broadcasts, slices and groups of convolutions. A rule gives
the parameters that change.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from jaxprune.graph.axis_dims import Dim, kept_positions, root
from jaxprune.graph.equation import Equation

Dims: TypeAlias = tuple[Dim, ...]


class KeptPositions:
    """Which positions of dimensions are kept.

    Args:
      masks: booleans (units,) of each atom that loses units; others keep all.
    """

    def __init__(self, masks: Mapping[Dim, np.ndarray]) -> None:
        """Keeps the masks of the atoms."""
        self._atoms = masks
        self._cache: dict[Dim, np.ndarray] = {}

    def mask(self, dim: Dim) -> np.ndarray:
        """Booleans (size,): which positions of a dimension are kept."""
        dim = root(dim)
        if dim not in self._cache:
            self._cache[dim] = kept_positions(dim, self._atoms)
        return self._cache[dim]

    def size(self, dim: Dim) -> int:
        """How many positions of a dimension are kept; symbolic where the size is."""
        dim = root(dim)
        if dim.is_atom:
            return int(self._atoms[dim].sum()) if dim in self._atoms else dim.size
        sizes = map(self.size, dim.parts)
        return sum(sizes) if dim.is_sum else math.prod(sizes)

    def shape(self, dims: Sequence[Dim]) -> tuple[int, ...]:
        """How many positions of each dimension are kept."""
        return tuple(map(self.size, dims))


DimsEquation: TypeAlias = Equation[Dims]
ResizeRule: TypeAlias = Callable[
    [DimsEquation, Sequence[Dims], KeptPositions], dict[str, Any]
]
"""A step, the dimensions of its results and what is kept, to parameters that change.

The dimensions of an operand are none where it is a stacked leaf or a literal.
"""


def same_sizes(
    equation: DimsEquation, results: Sequence[Dims], kept: KeptPositions
) -> dict[str, Any]:
    """No parameter holds a size."""
    return {}


def result_shape(name: str) -> ResizeRule:
    """The rule of a primitive one of whose parameters is the shape of its result."""
    return lambda equation, results, kept: {name: kept.shape(results[0])}


def resize_split(
    equation: DimsEquation, results: Sequence[Dims], kept: KeptPositions
) -> dict[str, Any]:
    """The length of each piece."""
    axis = equation.params["axis"]
    return {"sizes": tuple(kept.size(dims[axis]) for dims in results)}


def resize_tile(
    equation: DimsEquation, results: Sequence[Dims], kept: KeptPositions
) -> dict[str, Any]:
    """The number of copies, which need not all stay."""
    pairs = zip(results[0], equation.operands[0], strict=True)
    # An empty axis has no size to divide by.
    sizes = ((kept.size(made), kept.size(dim)) for made, dim in pairs)
    copies = (made if size == 0 else made // size for made, size in sizes)
    return {"reps": tuple(copies)}


def resize_slice(
    equation: DimsEquation, results: Sequence[Dims], kept: KeptPositions
) -> dict[str, Any]:
    """Where a range begins and ends."""
    params, dims = equation.params, equation.operands[0]
    starts, sizes = params["start_indices"], kept.shape(results[0])
    strides = params["strides"] or (1,) * len(starts)
    # An axis that is taken in steps is frozen, and its limit need not be at a step.
    spans = zip(starts, params["limit_indices"], strides, sizes, strict=True)
    lengths = [n if step == 1 else stop - start for start, stop, step, n in spans]
    if dims:
        # What is kept in front of a range moves to its beginning.
        pairs = zip(dims, starts, strict=True)
        starts = tuple(
            int(kept.mask(dim)[:start].sum()) if start else 0 for dim, start in pairs
        )
    limits = (start + length for start, length in zip(starts, lengths, strict=True))
    return {"start_indices": tuple(starts), "limit_indices": tuple(limits)}


def resize_gather(
    equation: DimsEquation, results: Sequence[Dims], kept: KeptPositions
) -> dict[str, Any]:
    """The size of each slice: that of the result's axis which it becomes."""
    numbers = equation.params["dimension_numbers"]
    indexed = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    # By the result, since a stacked leaf has no dimensions of its own.
    windows = (kept.size(results[0][axis]) for axis in numbers.offset_dims)
    sizes = (
        size if axis in indexed else next(windows)
        for axis, size in enumerate(equation.params["slice_sizes"])
    )
    return {"slice_sizes": tuple(sizes)}


def resize_convolution(
    equation: DimsEquation, results: Sequence[Dims], kept: KeptPositions
) -> dict[str, Any]:
    """The number of groups that are left."""
    numbers, (value, kernel) = equation.params["dimension_numbers"], equation.operands
    inputs, inputs_of_group = value[numbers.lhs_spec[1]], kernel[numbers.rhs_spec[1]]
    return {"feature_group_count": kept.size(inputs) // kept.size(inputs_of_group)}
