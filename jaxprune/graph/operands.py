"""The two operands of a linear op: its weight as (batch, in, out), its input.

A matmul's axes are sorted into batch, inputs and outputs. A convolution is the matmul
of its kernel with the patches of its input.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.graph.program import Fixed, Step, is_grouped
from jaxprune.graph.view_rules import Joined
from jaxprune.graph.weight_view import Reshape, Slice, Steps, Transpose, WeightView


@dataclasses.dataclass(frozen=True)
class Input:
    """How an activation meets weights: what `read` makes of a value.

    Rows that lie group by group, as an expert's do, are two values: the rows, and how
    many of them each group has. All groups' samples are then read as one.

    Attributes:
      value: the number of the value in the program; inputs of equal layers are equal.
      order: the axes of the value, batch first, samples, inputs last.
      shape: (batch, samples, in).
      leading: the shape of the samples, before they are one axis.
      patches: arguments of `jax.lax.conv_general_dilated_patches` for a convolution, as
        pairs; otherwise empty.
      grouped: whether rows lie group by group; compared, unlike the numbers.
      sizes: the number of the value that says how many rows each group has, or None.
    """

    value: int = dataclasses.field(compare=False)
    order: tuple[int, ...]
    shape: tuple[int, int, int]
    leading: tuple[int, ...]
    patches: tuple[tuple[str, Any], ...] = ()
    grouped: bool = False
    sizes: int | None = dataclasses.field(default=None, compare=False)

    @property
    def values(self) -> tuple[int, ...]:
        """The numbers of all values that it is read from."""
        return (self.value,) if self.sizes is None else (self.value, self.sizes)

    def of(self, known: Mapping[int, Any]) -> Any:
        """What `read` takes, from values by number: an array, or rows and sizes."""
        return (
            known[self.value]
            if self.sizes is None
            else (known[self.value], known[self.sizes])
        )

    def read(self, value: Any) -> jax.Array:
        """The activation as (batch, samples, in); patches of it for a convolution.

        Rows in groups are (1, samples, in).
        """
        if self.grouped:
            return value[0][None]  # (rows, in) before
        if self.patches:
            value = jax.lax.conv_general_dilated_patches(
                value, precision=jax.lax.Precision.HIGHEST, **dict(self.patches)
            )
        moved = jnp.transpose(value, self.order)
        if self.patches:  # (samples..., batch x in) so far
            batch, samples, inputs = self.shape
            return jnp.swapaxes(moved.reshape(samples, batch, inputs), 0, 1)
        return moved.reshape(self.shape)


class WeightUse(NamedTuple):
    """A step one of whose first two operands is a weight, the other an activation.

    Attributes:
      step: the step.
      side: number of the operand that is the weight, 0 or 1.
      view: the view of the leaf that the weight is.
      value: the number of the activation.
      avals: shape and dtype of each value of the program.
    """

    step: Step
    side: int
    view: WeightView
    value: int
    avals: Sequence[Any]


class Product(NamedTuple):
    """How a primitive multiplies a weight with an activation.

    Attributes:
      operands: rule that gives the weight as (batch, in, out) and its input as (batch,
        samples, in); None for a use that is no linear op.
      summed: function of the parameters to the number of an operand, and its axes over
        which each number of the result is summed.
    """

    operands: Callable[[WeightUse], tuple[WeightView, Input] | None]
    summed: Callable[[Mapping[str, Any]], tuple[int, Sequence[int]]]


def dot_operands(use: WeightUse) -> tuple[WeightView, Input]:
    """The operands of a `dot_general`."""
    view, side = use.view, use.side
    contracted, batched = use.step.params["dimension_numbers"]
    # In the leaf's order: an einsum may contract (size, heads), and four consecutive
    # inputs are those that lie side by side in the leaf.
    pairs = sorted(
        zip(contracted[side], contracted[1 - side], strict=True),
        key=lambda pair: _position_in_leaf(view, pair[0]),
        reverse=True,
    )
    inputs, batch = tuple(axis for axis, _ in pairs), tuple(batched[side])
    free = tuple(a for a in range(len(view.shape)) if a not in inputs + batch)
    # Grouped by axis before it is flattened, so that `axes` can tell them apart.
    # (batch, in, out)
    matrix = view.transpose(batch + inputs + free).matrix(len(batch), len(inputs))
    # The activation's axes likewise: batch, samples, inputs in the weight's order.
    last, first = tuple(axis for _, axis in pairs), tuple(batched[1 - side])
    shape = use.avals[use.value].shape
    samples = tuple(a for a in range(len(shape)) if a not in first + last)
    leading = tuple(shape[a] for a in samples)
    source = Input(
        value=use.value,
        order=first + samples + last,
        shape=(matrix.shape[0], math.prod(leading), matrix.shape[1]),
        leading=leading,
    )
    return matrix, source


def output_parts(step: Step, side: int, joined: Joined) -> tuple[WeightView, ...]:
    """The views that are joined along a matmul's outputs, each a weight by itself.

    Args:
      step: the step.
      side: number of the operand that is joined.
      joined: the views.

    Returns:
      The views; none where they are joined along inputs or batch axes, where a leaf is
      in it twice, or where the step is no `dot_general`.
    """
    if step.primitive.name != "dot_general":
        return ()
    contracted, batched = step.params["dimension_numbers"]
    outputs = joined.axis not in (*contracted[side], *batched[side])
    # A leaf that is joined with itself would be pruned twice.
    distinct = len(set(joined.parts)) == len(joined.parts)
    return joined.parts if outputs and distinct else ()


def dot_summed(params: Mapping[str, Any]) -> tuple[int, Sequence[int]]:
    """The contracted axes of the first operand of a `dot_general`."""
    (contracted, _), _ = params["dimension_numbers"]
    return 0, contracted


def _position_in_leaf(view: WeightView, axis: int) -> tuple[tuple[int, ...], int]:
    """A sort key: where in the leaf an axis's second position lies, then minus axis."""
    # Of axes that a reshape made of one, `axes` says only which one that was.
    place = [int(i == axis and size > 1) for i, size in enumerate(view.shape)]
    for move in reversed(view.moves):
        match move:
            case Slice():
                place = [i + start for i, start in zip(place, move.starts, strict=True)]
            case Steps():
                place = [i * step for i, step in zip(place, move.steps, strict=True)]
            case Transpose():
                place = [place[move.order.index(i)] for i in range(len(place))]
            case Reshape():
                flat = np.ravel_multi_index(place, move.after)
                place = [int(i) for i in np.unravel_index(flat, move.before)]
            case _:  # turned round, its first place is not nearest
                return tuple(-leaf_axis for leaf_axis in view.axes[axis]), -axis
    return tuple(place), -axis


def convolution_operands(use: WeightUse) -> tuple[WeightView, Input] | None:
    """A convolution as the matmul of its kernel with patches of the input."""
    params, view = use.step.params, use.view
    if use.side != 1 or params["batch_group_count"] != 1:
        return None
    numbers, groups = params["dimension_numbers"], params["feature_group_count"]
    kernel_out, kernel_in, *window = numbers.rhs_spec
    size = [view.shape[axis] for axis in window]
    inputs = view.shape[kernel_in] * math.prod(size)  # of a group
    outputs = view.shape[kernel_out] // groups
    # Channels outermost, as `conv_general_dilated_patches` lays them out.
    matrix = view.transpose((kernel_in, *window, kernel_out))
    # (in, groups x out) as (groups, in, out)
    matrix = matrix.reshape((inputs, groups, outputs)).transpose((1, 0, 2))
    feature = numbers.out_spec[1]
    shape = use.avals[use.step.outputs[0]].shape
    samples = [a for a in range(len(shape)) if a != feature]
    leading = tuple(shape[a] for a in samples)
    patches = {
        "filter_shape": tuple(size),
        "window_strides": params["window_strides"],
        "padding": params["padding"],
        "lhs_dilation": params["lhs_dilation"],
        "rhs_dilation": params["rhs_dilation"],
        "dimension_numbers": numbers,
    }
    source = Input(
        value=use.value,
        order=(*samples, feature),
        shape=(groups, math.prod(leading), inputs),
        leading=leading,
        patches=tuple(patches.items()),
    )
    return matrix, source


def convolution_summed(params: Mapping[str, Any]) -> tuple[int, Sequence[int]]:
    """The inputs of a group and the window of a kernel."""
    return 1, params["dimension_numbers"].rhs_spec[1:]


def grouped_dot_operands(use: WeightUse) -> tuple[WeightView, Input] | None:
    """A `lax.ragged_dot`: each row times the matrix of its group."""
    if not is_grouped(use.step) or use.side != 1:
        return None
    sizes = use.step.inputs[2]
    if isinstance(sizes, Fixed):
        return None
    rows, inputs = use.avals[use.value].shape
    source = Input(
        value=use.value,
        order=(0, 1),
        shape=(use.view.shape[0], rows, inputs),
        leading=(rows,),
        grouped=True,
        sizes=sizes,
    )
    return use.view.matrix(1, 1), source


def grouped_dot_summed(params: Mapping[str, Any]) -> tuple[int, Sequence[int]]:
    """The contracted axes of the rows."""
    numbers = params["ragged_dot_dimension_numbers"].dot_dimension_numbers
    (contracted, _), _ = numbers
    return 0, contracted
