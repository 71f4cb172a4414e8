"""Leaves that are joined to one array and cut apart again, each seen as itself.

Layers that are stored one by one may be stacked to be scanned over. A cut that falls
into one of the joined parts is a view of that part's leaf.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxprune.graph import weight_view
from jaxprune.graph.program import Fixed, Step
from jaxprune.graph.weight_view import WeightView


class Joined(NamedTuple):
    """Views one behind the other.

    Attributes:
      axis: along which they are joined.
      parts: the views, all of the joined array's axes.
    """

    axis: int
    parts: tuple[WeightView, ...]


def join(step: Step, views: Mapping[int, WeightView]) -> Joined | None:
    """What a step joins, if it joins views and nothing else."""
    name, params = step.primitive.name, step.params
    found = [views.get(x) if not isinstance(x, Fixed) else None for x in step.inputs]
    parts = [view for view in found if view is not None]
    if name not in ("concatenate", "stack") or len(parts) != len(found) or not parts:
        return None
    axis = params["dimension"] if name == "concatenate" else params["axis"]
    if name == "stack":
        one = list(parts[0].shape)
        one.insert(axis, 1)
        parts = [view.reshape(one) for view in parts]
    return Joined(axis, tuple(parts))


def cut(
    step: Step,
    joined: Joined,
    kinds: Sequence[Any],
    known: Callable[[int | Fixed], Any],
) -> WeightView | None:
    """The view that a step cuts out of what was joined, where it is of one part."""
    name, params = step.primitive.name, step.params
    sizes = tuple(kinds[step.outputs[0]].shape)
    if name == "dynamic_slice":
        starts = [known(x) for x in step.inputs[1:]]
        if any(start is None for start in starts):
            return None
        shape = list(joined.parts[0].shape)
        shape[joined.axis] = sum(part.shape[joined.axis] for part in joined.parts)
        starts = weight_view.clamped(starts, sizes, shape)
    elif name == "slice" and set(params["strides"] or (1,)) == {1}:
        starts = list(params["start_indices"])
    else:
        return None
    ends = itertools.accumulate(part.shape[joined.axis] for part in joined.parts)
    first = starts[joined.axis]
    for part, end in zip(joined.parts, ends, strict=True):
        begin = end - part.shape[joined.axis]
        if begin <= first and first + sizes[joined.axis] <= end:
            starts[joined.axis] = first - begin
            return part.slice(starts, sizes)
    return None
