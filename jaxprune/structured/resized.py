"""A traced program run with smaller parameters.

Every value is what the dense program computes, at the positions that are kept. So the
steps are the same; only sizes that are written into them change (`resize_rules`).
Tables and other constants are taken at the positions that are kept where they are used.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.graph.axis_dims import Dim
from jaxprune.graph.axis_trace import AxisTrace
from jaxprune.graph.equation import Equation
from jaxprune.graph.primitives import rules_of
from jaxprune.graph.program import Fixed, Step
from jaxprune.graph.resize_rules import KeptPositions


class Resized:
    """A program with some units of its dimensions left out.

    Args:
      trace: the program.
      masks: booleans (units,) of each atom that loses units.
    """

    def __init__(self, trace: AxisTrace, masks: Mapping[Dim, np.ndarray]) -> None:
        """Works out the sizes that are written into the steps."""
        self._trace = trace
        self._kept = KeptPositions(masks)
        self._steps = [
            self._resized(i, step) for i, step in enumerate(trace.program.steps)
        ]

    def run(self, params: Sequence[Any], batch: Sequence[Any]) -> Any:
        """The function's result for leaves of smaller parameters and of a batch."""
        flat = self._trace.program
        # Tables are whole here, and cut where a step uses them: see `_take`.
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
                # A constant may follow other axes at each of its uses.
                if axes := self._trace.uses.get((position, i)):
                    value = self._take(value, axes.dims)
                operands.append(value)
            env.update(zip(step.outputs, step.run(operands), strict=True))
        # A function may return a number that its trace has written down.
        results = [
            jnp.asarray(x.value) if isinstance(x, Fixed) else env[x]
            for x in flat.outputs
        ]
        return jax.tree.unflatten(self._trace.structure, results)

    def flops(self) -> int:
        """Two for each multiplication of its matmuls and convolutions."""
        total = 0
        for position, step in enumerate(self._trace.program.steps):
            product = rules_of(step.primitive.name).product
            if product is None:
                continue  # jax.debug.print has no result at all
            result = self._trace.axes.get(step.outputs[0])
            if result is None:
                continue  # a product of constants is computed once, if at all
            i, axes = product.summed(step.params)
            dims = self._dims(position, i)
            summed = self._kept.shape([dims[axis] for axis in axes])
            total += 2 * math.prod(self._kept.shape(result.dims)) * math.prod(summed)
        return total

    def _take(self, value: Any, dims: Sequence[Dim]) -> Any:
        """A constant at the positions that are kept."""
        for axis, dim in enumerate(dims):
            if self._kept.size(dim) != dim.size:
                positions = np.flatnonzero(self._kept.mask(dim))
                value = jnp.take(value, positions, axis)
        return value

    def _resized(self, position: int, step: Step) -> Step:
        """The step with the sizes of the smaller values."""
        results = [self._trace.axes.get(number) for number in step.outputs]
        dims = [axes.dims for axes in results if axes is not None]
        if len(dims) < len(results):
            return step  # of constants or stacked leaves, which are cut elsewhere
        operands = [self._dims(position, i) for i in range(len(step.inputs))]
        shapes = [tuple(dim.size for dim in axes) for axes in dims]
        equation = Equation(step.primitive.name, step.params, operands, shapes)
        changes = rules_of(equation.name).resize(equation, dims, self._kept)
        return step._replace(params={**step.params, **changes}) if changes else step

    def _dims(self, position: int, i: int) -> tuple[Dim, ...]:
        """The dimensions of an operand; none for a leaf that is stacked."""
        axes = self._trace.uses.get((position, i))
        x = self._trace.program.steps[position].inputs[i]
        if axes is None and isinstance(x, int):
            axes = self._trace.axes.get(x)
        return () if axes is None else axes.dims
