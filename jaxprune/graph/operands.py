"""The two operands of a linear op: its weight as (batch, in, out), its input.

A matmul's axes are sorted into batch, inputs and outputs. A convolution is the matmul
of its kernel with the patches of its input.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

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
      patches: for a convolution, the arguments of
        `jax.lax.conv_general_dilated_patches`, as pairs; otherwise empty.
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
            return value[0][None]
        if self.patches:
            value = jax.lax.conv_general_dilated_patches(
                value, precision=jax.lax.Precision.HIGHEST, **dict(self.patches)
            )
        moved = jnp.transpose(value, self.order)
        if self.patches:  # (samples..., batch x in) so far
            batch, samples, inputs = self.shape
            return jnp.swapaxes(moved.reshape(samples, batch, inputs), 0, 1)
        return moved.reshape(self.shape)


def dot(
    numbers: Any, view: WeightView, value: Any, aval: Any, side: int
) -> tuple[WeightView, Input]:
    """A `dot_general` whose operand `side` is the weight."""
    contracted, batched = numbers
    # In the leaf's order: an einsum may contract (size, heads), and four consecutive
    # inputs are those that lie side by side in the leaf.
    both = zip(contracted[side], contracted[1 - side], strict=True)
    pairs = sorted(
        both, key=lambda pair: _position_in_leaf(view, pair[0]), reverse=True
    )
    inputs, batch = tuple(axis for axis, _ in pairs), tuple(batched[side])
    free = tuple(a for a in range(len(view.shape)) if a not in inputs + batch)
    shape = [math.prod(view.shape[a] for a in axes) for axes in (batch, inputs, free)]
    matrix = view.transpose(batch + inputs + free)
    # Grouped by axis before it is flattened, so that `axes` can tell them apart.
    last, first = tuple(other for _, other in pairs), tuple(batched[1 - side])
    samples = tuple(a for a in range(len(aval.shape)) if a not in first + last)
    leading = tuple(aval.shape[a] for a in samples)
    source = Input(
        value=value,
        order=first + samples + last,
        shape=(shape[0], math.prod(leading), shape[1]),
        leading=leading,
    )
    return matrix.matrix(len(batch), len(inputs)), source


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
                return tuple(-axis_of_leaf for axis_of_leaf in view.axes[axis]), -axis
    return tuple(place), -axis


def convolution(
    params: Mapping[str, Any], view: WeightView, value: Any, result: Any
) -> tuple[WeightView, Input]:
    """A convolution as the matmul of its kernel with patches of the input."""
    numbers, groups = params["dimension_numbers"], params["feature_group_count"]
    out, feature_in, *window = numbers.rhs_spec
    size = [view.shape[axis] for axis in window]
    inputs, outputs = view.shape[feature_in] * math.prod(size), view.shape[out]
    matrix = view.transpose((feature_in, *window, out))
    matrix = matrix.reshape((inputs, groups, outputs // groups)).transpose((1, 0, 2))
    feature = numbers.out_spec[1]
    samples = [a for a in range(len(result.shape)) if a != feature]
    leading = tuple(result.shape[a] for a in samples)
    patches = {
        "filter_shape": tuple(size),
        "window_strides": params["window_strides"],
        "padding": params["padding"],
        "lhs_dilation": params["lhs_dilation"],
        "rhs_dilation": params["rhs_dilation"],
        "dimension_numbers": numbers,
    }
    source = Input(
        value=value,
        order=(*samples, feature),
        shape=(groups, math.prod(leading), inputs),
        leading=leading,
        patches=tuple(patches.items()),
    )
    return matrix, source


def groups(
    view: WeightView, value: int, aval: Any, sizes: int
) -> tuple[WeightView, Input]:
    """A `lax.ragged_dot`: each row times the matrix of its group."""
    rows, inputs = aval.shape
    source = Input(
        value=value,
        order=(0, 1),
        shape=(view.shape[0], rows, inputs),
        leading=(rows,),
        grouped=True,
        sizes=sizes,
    )
    return view.matrix(1, 1), source
