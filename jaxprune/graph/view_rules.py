"""What primitives do to the view of a leaf: they move it, cast it, join it, or hide it.

A rule gives the views that a step's results are, or None where the step does more than
move a leaf. Layers that are stored one by one may be joined to be scanned over; a cut
that falls into one of the joined parts is a view of that part's leaf.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

from jaxprune.graph.equation import Equation
from jaxprune.graph.weight_view import WeightView


class Joined(NamedTuple):
    """Views one behind the other.

    Attributes:
      axis: the axis along which they are joined.
      parts: the views, all of the joined array's axes.
    """

    axis: int
    parts: tuple[WeightView, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the joined array."""
        shape = list(self.parts[0].shape)
        shape[self.axis] = sum(part.shape[self.axis] for part in self.parts)
        return tuple(shape)

    def slice(self, starts: Sequence[int], sizes: Sequence[int]) -> WeightView | None:
        """The view of a box of the joined array, where it lies in one part."""
        starts_in_part, first = list(starts), starts[self.axis]
        ends = itertools.accumulate(part.shape[self.axis] for part in self.parts)
        # A box across a seam would be of two leaves.
        for part, end in zip(self.parts, ends, strict=True):
            begin = end - part.shape[self.axis]
            if begin <= first and first + sizes[self.axis] <= end:
                starts_in_part[self.axis] = first - begin
                return part.slice(starts_in_part, sizes)
        return None


class ViewOperand(NamedTuple):
    """One operand of a step.

    Attributes:
      shape: shape of the operand.
      view: the view of a leaf that it is, or of leaves that are joined; or None.
      constant: function without arguments that computes a value which depends on
        neither parameters nor batch; of others it gives None.
    """

    shape: tuple[int, ...]
    view: WeightView | Joined | None
    constant: Callable[[], Any]


ViewEquation: TypeAlias = Equation[ViewOperand]
ViewRule: TypeAlias = Callable[[ViewEquation], Sequence[WeightView | Joined] | None]
"""A step to the views that its results are; None if it does more than move a leaf."""


def no_view(equation: ViewEquation) -> None:
    """The results are no views."""


def one_view(move: Callable[[WeightView, ViewEquation], list[WeightView]]) -> ViewRule:
    """The rule of a primitive that moves its only operand, or the first."""

    def rule(equation: ViewEquation) -> list[WeightView] | None:
        view = equation.operands[0].view
        return move(view, equation) if isinstance(view, WeightView) else None

    return rule


def same_views(equation: ViewEquation) -> list[WeightView] | None:
    """Each result is its operand."""
    views = _weight_views(equation)
    return views if len(views) == len(equation.operands) else None


def _weight_views(equation: ViewEquation) -> list[WeightView]:
    views = (operand.view for operand in equation.operands)
    return [view for view in views if isinstance(view, WeightView)]


def scale_view(equation: ViewEquation) -> list[WeightView] | None:
    """A leaf times one constant, which moves no score past another."""
    views = _weight_views(equation)
    if len(views) != 1:
        return None
    for operand in equation.operands:
        if operand.view is views[0]:
            continue
        if math.prod(operand.shape) != 1 or operand.constant() is None:
            return None
    # What is read and written is the leaf itself, without the constant.
    return [dataclasses.replace(views[0], cast=True)]


def divide_view(equation: ViewEquation) -> list[WeightView] | None:
    """A leaf divided by one constant; not a constant by a leaf."""
    is_dividend = isinstance(equation.operands[0].view, WeightView)
    return scale_view(equation) if is_dividend else None


def each_part(
    move: Callable[[WeightView | Joined, ViewEquation], list[WeightView | Joined]],
) -> ViewRule:
    """The rule of a primitive that moves joined views as it moves one."""

    def rule(equation: ViewEquation) -> list[WeightView | Joined] | None:
        view = equation.operands[0].view
        return None if view is None else move(view, equation)

    return rule


@each_part
def cast_view(
    view: WeightView | Joined, equation: ViewEquation
) -> list[WeightView | Joined]:
    """The same elements in another dtype."""
    if isinstance(view, WeightView):
        return [dataclasses.replace(view, cast=True)]
    parts = (dataclasses.replace(part, cast=True) for part in view.parts)
    return [Joined(view.axis, tuple(parts))]


@one_view
def reshape_view(view: WeightView, equation: ViewEquation) -> list[WeightView]:
    """The same elements in another shape, transposed first where it says so."""
    if (order := equation.params.get("dimensions")) is not None:
        view = view.transpose(order)
    return [view.reshape(equation.shapes[0])]


@one_view
def squeeze_view(view: WeightView, equation: ViewEquation) -> list[WeightView]:
    """The same elements without axes of length one."""
    return [view.reshape(equation.shapes[0])]


@each_part
def transpose_view(
    view: WeightView | Joined, equation: ViewEquation
) -> list[WeightView | Joined]:
    """The axes in another order."""
    order = equation.params["permutation"]
    if isinstance(view, WeightView):
        return [view.transpose(order)]
    parts = (part.transpose(order) for part in view.parts)
    return [Joined(order.index(view.axis), tuple(parts))]


@one_view
def reverse_view(view: WeightView, equation: ViewEquation) -> list[WeightView]:
    """Last first along some axes."""
    return [view.reverse(equation.params["dimensions"])]


def broadcast_view(equation: ViewEquation) -> list[WeightView] | None:
    """New axes of length one; a leaf that is repeated is no view."""
    (shape,), view = equation.shapes, equation.operands[0].view
    if not isinstance(view, WeightView) or math.prod(shape) != math.prod(view.shape):
        return None
    return [view.reshape(shape)]


def slice_view(equation: ViewEquation) -> list[WeightView] | None:
    """A box, or every n-th element of one."""
    view, (shape,) = equation.operands[0].view, equation.shapes
    starts = equation.params["start_indices"]
    steps = equation.params["strides"] or (1,) * len(shape)
    if isinstance(view, Joined):
        part = view.slice(starts, shape) if set(steps) == {1} else None
        return None if part is None else [part]
    # From the first element to the last, those between included.
    pairs = zip(shape, steps, strict=True)
    sizes = [1 + (size - 1) * step if size else 0 for size, step in pairs]
    return None if view is None else [view.slice(starts, sizes).in_steps(steps)]


def dynamic_slice_view(equation: ViewEquation) -> list[WeightView] | None:
    """A box that begins at operands, where these are constants."""
    (array, *indices), (sizes,) = equation.operands, equation.shapes
    if array.view is None:
        return None
    starts = [index.constant() for index in indices]
    if any(start is None for start in starts):
        return None
    part = array.view.slice(_clamp(starts, sizes, array.view.shape), sizes)
    return None if part is None else [part]


def gather_view(equation: ViewEquation) -> list[WeightView] | None:
    """One box of a leaf, as `jnp.take` of one constant index; no lookup of several."""
    array, index = equation.operands
    if array.view is None or len(index.shape) != 1:
        return None
    if (starts := index.constant()) is None:
        return None
    sizes, shape = equation.params["slice_sizes"], array.view.shape
    place = [0] * len(shape)
    for axis, start in zip(
        equation.params["dimension_numbers"].start_index_map, starts, strict=True
    ):
        place[axis] = int(start)
    # What is outside depends on the mode: NaN, or the nearest box.
    if place != _clamp(place, sizes, shape):
        return None
    part = array.view.slice(place, sizes)
    return None if part is None else [part.reshape(equation.shapes[0])]


def _clamp(
    starts: Sequence[Any], sizes: Sequence[int], shape: Sequence[int]
) -> list[int]:
    """Where a dynamic slice begins: moved until it fits, as XLA does."""
    triples = zip(starts, sizes, shape, strict=True)
    return [min(max(int(start), 0), end - size) for start, size, end in triples]


@one_view
def split_view(view: WeightView, equation: ViewEquation) -> list[WeightView]:
    """Pieces along an axis."""
    axis = equation.params["axis"]
    sizes = [shape[axis] for shape in equation.shapes]
    return _views_of_pieces(view, axis, sizes)


@one_view
def unstack_view(view: WeightView, equation: ViewEquation) -> list[WeightView]:
    """Pieces of length one along an axis, without the axis."""
    pieces = _views_of_pieces(view, equation.params["axis"], [1] * len(equation.shapes))
    pairs = zip(pieces, equation.shapes, strict=True)
    return [piece.reshape(shape) for piece, shape in pairs]


def _views_of_pieces(
    view: WeightView, axis: int, lengths: Sequence[int]
) -> list[WeightView]:
    starts, sizes, pieces = [0] * len(view.shape), list(view.shape), []
    for length in lengths:
        sizes[axis] = length
        pieces.append(view.slice(tuple(starts), tuple(sizes)))
        starts[axis] += length
    return pieces


def concatenate_views(equation: ViewEquation) -> list[Joined] | None:
    """Views one behind the other, if all operands are views."""
    views = _weight_views(equation)
    if not views or len(views) < len(equation.operands):
        return None
    return [Joined(equation.params["dimension"], tuple(views))]


def stack_views(equation: ViewEquation) -> list[Joined] | None:
    """Views one behind the other along a new axis, if all operands are views."""
    views = _weight_views(equation)
    if not views or len(views) < len(equation.operands):
        return None
    axis, shape = equation.params["axis"], list(views[0].shape)
    shape.insert(axis, 1)
    return [Joined(axis, tuple(view.reshape(shape) for view in views))]
