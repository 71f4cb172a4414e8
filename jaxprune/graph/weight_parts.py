"""Which part of a leaf a linear op uses, in words: axes, indices of a stack, ranges."""

from collections.abc import Sequence

from jaxprune.arrays.axes import Axes
from jaxprune.graph.weight_view import Slice, WeightView


def inputs_and_outputs(view: WeightView) -> Axes | None:
    """The leaf's input and output axes, where each axis is wholly one or the other.

    Args:
      view: the view as (batch, in, out).

    Returns:
      The axes, or None where a reshape mixed them.
    """
    _, inputs, outputs = (set(axes) for axes in view.axes)
    if inputs & outputs:
        return None  # a reshape mixed them
    return Axes(tuple(sorted(inputs)), tuple(sorted(outputs)))


def index_and_part(
    view: WeightView, shape: Sequence[int]
) -> tuple[tuple[int, ...], str]:
    """The indices of a stacked leaf, and the part of the rest that is seen.

    Args:
      view: the view as (batch, in, out).
      shape: the leaf's shape.

    Returns:
      Indices, as (3,), and the part, as "[:,0:64]"; empty where all is seen.
    """
    if not view.sliced:
        return (), ""
    if view.box is None:
        moves = [m for m in view.moves if isinstance(m, Slice)]
        return (), "".join(f"[{m.starts}+{m.sizes}]" for m in moves)
    # An axis that is no part of the matrix and has one place is an index of a stack.
    used = {axis for axes in view.axes for axis in axes}
    index = tuple(
        places.start
        for axis, places in enumerate(view.box)
        if axis not in used and len(places) == 1 and shape[axis] > 1
    )
    parts = [
        ":" if len(places) == shape[axis] else _range_text(places)
        for axis, places in enumerate(view.box)
        if axis in used
    ]
    return index, "" if set(parts) <= {":"} else f"[{','.join(parts)}]"


def _range_text(places: range) -> str:
    step = f":{places.step}" if places.step > 1 else ""
    return f"{places.start}:{places.stop}{step}"
