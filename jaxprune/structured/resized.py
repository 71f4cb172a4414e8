"""A traced program run with smaller parameters.

Every value is what the dense program computes, at the positions that are kept. So the
steps are the same; only sizes that are written into them change: of reshapes,
broadcasts, slices and groups of convolutions. Tables and other constants are taken at
the positions that are kept where they are used.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.graph.axis_dims import Dim, kept_positions, root
from jaxprune.graph.axis_trace import AxisTrace
from jaxprune.graph.program import Fixed, Step


class Resized:
    """A program with some units of its dimensions left out.

    Args:
      trace: the program.
      kept: booleans of each atom that loses units.
    """

    def __init__(self, trace: AxisTrace, kept: Mapping[Dim, np.ndarray]) -> None:
        """Works out the sizes that are written into the steps."""
        self._trace = trace
        self._kept = kept
        self._masks: dict[Dim, np.ndarray] = {}
        self._steps = [
            self._resized(i, step) for i, step in enumerate(trace.program.steps)
        ]

    def run(self, params: Sequence[Any], batch: Sequence[Any]) -> Any:
        """The function's result for leaves of smaller parameters and of a batch."""
        flat = self._trace.program
        env: dict[int, Any] = dict(flat.closed_over)
        env.update(zip(flat.leaves, params, strict=True))
        env.update(zip(flat.batch, batch, strict=True))

        for position, step in enumerate(self._steps):
            operands = []
            for i, x in enumerate(step.inputs):
                if isinstance(x, Fixed):
                    operands.append(x.value)
                    continue
                value = env[x]
                if axes := self._trace.uses.get((position, i)):
                    value = self._take(value, axes.dims)
                operands.append(value)
            env.update(zip(step.outputs, step.run(operands), strict=True))
        results = [
            jnp.asarray(x.value) if isinstance(x, Fixed) else env[x]
            for x in flat.outputs
        ]
        return jax.tree.unflatten(self._trace.structure, results)

    def size(self, dim: Dim) -> int:
        """How many positions of a dimension are kept."""
        return int(self._mask(dim).sum())

    def flops(self) -> int:
        """Two for each multiplication of its matmuls and convolutions."""
        total = 0
        for position, step in enumerate(self._trace.program.steps):
            if step.primitive.name not in _PRODUCTS:
                continue  # jax.debug.print has no result at all
            result = self._trace.axes.get(step.outputs[0])
            if result is None:
                continue
            made = math.prod(self.size(dim) for dim in result.dims)
            i, axes = _contracted(step)
            dims = self._operand(position, i)
            total += 2 * made * math.prod(self.size(dims[axis]) for axis in axes)
        return total

    def _mask(self, dim: Dim) -> np.ndarray:
        dim = root(dim)
        if dim not in self._masks:
            self._masks[dim] = kept_positions(dim, self._kept)
        return self._masks[dim]

    def _take(self, value: Any, dims: Sequence[Dim]) -> Any:
        """A constant at the positions that are kept."""
        for axis, dim in enumerate(dims):
            own = self._mask(dim)
            if not own.all():
                value = jnp.take(value, np.flatnonzero(own), axis)
        return value

    def _resized(self, position: int, step: Step) -> Step:
        """The step with the sizes of the smaller values."""
        results = [self._trace.axes.get(number) for number in step.outputs]
        name, change = step.primitive.name, _CHANGES.get(step.primitive.name)
        if change is None or any(axes is None for axes in results):
            return step
        dims = [axes.dims for axes in results if axes is not None]
        shape = tuple(self.size(dim) for dim in dims[0])
        if name == "split":
            axis = step.params["axis"]
            shape = tuple(self.size(own[axis]) for own in dims)
        elif name == "tile":
            before = self._operand(position, 0)
            shape = tuple(
                self.size(made) // max(1, self.size(dim))
                for made, dim in zip(dims[0], before, strict=True)
            )
        elif name == "conv_general_dilated":
            shape = self._convolution(position, step)
        elif name == "gather":
            return step._replace(params=self._gather(position, step))
        elif name == "slice":
            return step._replace(params=self._slice(position, step, shape))
        return step._replace(params={**step.params, change: shape})

    def _operand(self, position: int, i: int) -> tuple[Dim, ...]:
        """The dimensions of an operand; none for a leaf that is stacked."""
        axes = self._trace.uses.get((position, i))
        x = self._trace.program.steps[position].inputs[i]
        if axes is None and isinstance(x, int):
            axes = self._trace.axes.get(x)
        return () if axes is None else axes.dims

    def _slice(
        self, position: int, step: Step, shape: tuple[int, ...]
    ) -> dict[str, Any]:
        starts, dims = list(step.params["start_indices"]), self._operand(position, 0)
        if dims:
            # What is kept in front of a range moves to its beginning.
            starts = [
                int(self._mask(dim)[:start].sum())
                for dim, start in zip(dims, starts, strict=True)
            ]
        if step.params["strides"] is not None and set(step.params["strides"]) != {1}:
            shape = tuple(
                size if stride == 1 else limit - start
                for size, stride, start, limit in zip(
                    shape,
                    step.params["strides"],
                    step.params["start_indices"],
                    step.params["limit_indices"],
                    strict=True,
                )
            )
        limits = [start + size for start, size in zip(starts, shape, strict=True)]
        new = {"start_indices": tuple(starts), "limit_indices": tuple(limits)}
        return {**step.params, **new}

    def _gather(self, position: int, step: Step) -> dict[str, Any]:
        dims = self._operand(position, 0)
        sizes = [
            self.size(dim) if size == dim.size else size
            for dim, size in zip(dims, step.params["slice_sizes"], strict=True)
        ]
        return {**step.params, "slice_sizes": tuple(sizes)}

    def _convolution(self, position: int, step: Step) -> Any:
        """The number of groups that are left."""
        numbers = step.params["dimension_numbers"]
        value, kernel = (self._operand(position, i) for i in (0, 1))
        inputs = self.size(value[numbers.lhs_spec[1]])
        return inputs // self.size(kernel[numbers.rhs_spec[1]])


def _contracted(step: Step) -> tuple[int, Sequence[int]]:
    """An operand, and its axes over which each number of the result is summed."""
    numbers = step.params[_PRODUCTS[step.primitive.name]]
    if step.primitive.name == "conv_general_dilated":
        return 1, numbers.rhs_spec[1:]
    if step.primitive.name == "ragged_dot_general":
        numbers = numbers.dot_dimension_numbers
    return 0, numbers[0][0]


# What multiplies, and the parameter that says which axes.
_PRODUCTS = {
    "conv_general_dilated": "dimension_numbers",
    "dot_general": "dimension_numbers",
    "ragged_dot_general": "ragged_dot_dimension_numbers",
}


# The parameter of a primitive that says how large its result is.
_CHANGES = {
    "broadcast_in_dim": "shape",
    "conv_general_dilated": "feature_group_count",
    "dynamic_slice": "slice_sizes",
    "gather": "slice_sizes",
    "reshape": "new_sizes",
    "slice": "limit_indices",
    "split": "sizes",
    "tile": "reps",
}
