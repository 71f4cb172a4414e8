"""Walks a traced program and gives every axis of every value its dimension.

Leaves begin with a dimension an axis; each step ties, cuts and freezes them by the rule
of its primitive. A leaf that is stacked over layers and used one layer at a time begins
with dimensions of its own for each layer, so that each layer chooses its own units.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.arrays import lazy, tree
from jaxprune.graph import axis_primitives
from jaxprune.graph import program as program_
from jaxprune.graph.axis_dims import ONE, Dim, atoms, find, freeze, fresh
from jaxprune.graph.axis_moves import Axes, Operand, new_axes
from jaxprune.graph.program import Fixed, Program, Step
from jaxprune.typing import Params


@dataclasses.dataclass(frozen=True)
class LeafAxes:
    """The dimensions of a leaf.

    Attributes:
      name: the leaf's path name.
      shape: its shape.
      dtype: its dtype.
      stacked: the axis that is used index by index, or None.
      parts: for each index along it (one where there is none), a dimension for each
        axis; `ONE` for the stacked axis.
    """

    name: str
    shape: tuple[int, ...]
    dtype: Any
    stacked: int | None
    parts: tuple[tuple[Dim, ...], ...]


@dataclasses.dataclass(frozen=True)
class AxisTrace:
    """A program whose axes have dimensions.

    Attributes:
      program: the traced program.
      structure: the tree of the function's results.
      leaves: the parameters' leaves, in flattening order.
      axes: number of a value to its axes; constants and stacked leaves have none.
      uses: (position of a step, operand) to the axes of a constant as it is used there.
    """

    program: Program
    structure: Any
    leaves: tuple[LeafAxes, ...]
    axes: dict[int, Axes]
    uses: dict[tuple[int, int], Axes]


def walk(fn: Callable[[Params, Any], Any], params: Params, batch: Any) -> AxisTrace:
    """Traces a function of parameters and a batch, and finds its axes' dimensions."""
    structure = None

    def flat_fn(params: Params, batch: Any) -> list[Any]:
        nonlocal structure
        leaves, structure = jax.tree.flatten(fn(params, batch))
        return leaves

    params = lazy.abstract(params)
    flat = program_.flatten(flat_fn, params, batch)
    named = {
        name: leaf
        for name, leaf in tree.named_leaves(params).items()
        if not tree.is_excluded(leaf)
    }
    walker = _Walker(flat, named)
    for position, step in enumerate(flat.steps):
        walker.look(position, step)
    for number in flat.outputs:
        if isinstance(number, int) and number in walker.axes:
            for dim in walker.axes[number].dims:
                freeze(dim, "is an axis of the result")
    return AxisTrace(flat, structure, walker.leaves, walker.axes, walker.uses)


class _Walker:
    """Gives dimensions to the results of one step after the other."""

    def __init__(self, flat: Program, named: dict[str, Any]) -> None:
        self.flat = flat
        self.axes: dict[int, Axes] = {}
        self.uses: dict[tuple[int, int], Axes] = {}
        stacked, self._indices = _stacked(flat)
        self.leaves = tuple(
            _leaf(name, leaf, stacked.get(number))
            for (name, leaf), number in zip(named.items(), flat.leaves, strict=True)
        )
        self.stacks = {
            number: leaf
            for number, leaf in zip(flat.leaves, self.leaves, strict=True)
            if leaf.stacked is not None
        }
        for number, leaf in zip(flat.leaves, self.leaves, strict=True):
            if leaf.stacked is None:
                self.axes[number] = Axes(leaf.parts[0], (True,) * len(leaf.shape))
        for number in flat.batch:
            shape = flat.kinds[number].shape
            self.axes[number] = new_axes(shape, "is an axis of the batch")
        self._scalars: dict[int, float | None] = {}

    def look(self, position: int, step: Step) -> None:
        """Takes one more step into account."""
        flat = self.flat
        if flat.constants.issuperset(step.outputs):
            return  # computed as it is, whatever is removed
        first = step.inputs[0] if step.inputs else None
        if isinstance(first, int) and first in self.stacks:
            dims = self.stacks[first].parts[self._indices[position]]
            taken = Axes(dims, (True,) * len(dims))
            self.axes.update(dict.fromkeys(step.outputs, taken))
            return
        operands = [self._operand(position, i, x) for i, x in enumerate(step.inputs)]
        if step.primitive.name in ("add", "add_any"):
            self._note_residual(step, operands)
        shapes = [tuple(flat.kinds[number].shape) for number in step.outputs]
        found = axis_primitives.apply(
            step.primitive.name, step.params, operands, shapes
        )
        self.axes.update(zip(step.outputs, found, strict=True))

    def _operand(self, position: int, i: int, x: int | Fixed) -> Operand:
        if isinstance(x, Fixed):
            axes = new_axes(np.shape(x.value), None)
            return Operand(np.shape(x.value), axes, _number(x.value))
        shape = tuple(self.flat.kinds[x].shape)
        if x not in self.flat.constants:
            return Operand(shape, self.axes[x])
        # A constant is free to follow what it meets, at each place anew.
        self.uses[position, i] = new_axes(shape, None)
        return Operand(shape, self.uses[position, i], self._scalar(x))

    def _scalar(self, number: int) -> float | None:
        """The number that a constant holds everywhere, where that is easily seen."""
        if number not in self._scalars:
            found, kind = None, self.flat.kinds[number]
            position = self.flat.maker.get(number)
            if kind.shape == () and isinstance(kind.dtype, np.dtype):
                found = _number(program_.constant(self.flat, number))
            elif position is not None:
                step = self.flat.steps[position]
                x = step.inputs[0] if step.inputs else None
                if step.primitive.name == "broadcast_in_dim":
                    if isinstance(x, Fixed):
                        found = _number(x.value)
                    elif x is not None:
                        found = self._scalar(x)
            self._scalars[number] = found
        return self._scalars[number]

    def _note_residual(self, step: Step, operands: Sequence[Operand]) -> None:
        """Marks axes on which a value and what was computed from it are added."""
        numbers = [x for x in step.inputs if not isinstance(x, Fixed)]
        if len(numbers) != 2 or not self.flat.varying.issuperset(numbers):
            return
        one, two = (operand.axes.dims for operand in operands)
        pairs = [(find(a), find(b)) for a, b in zip(one, two, strict=True)]
        if all(a is b for a, b in pairs) or not self._made_from(numbers):
            return
        for a, b in pairs:
            for atom in itertools.chain(atoms(a), atoms(b)):
                if a is not b and atom is not ONE:
                    atom.residual = True

    def _made_from(self, numbers: Sequence[int]) -> bool:
        """Whether one of two values was computed from the other."""
        low, high = sorted(numbers)
        found = program_.needed(self.flat, [high], lambda number: number <= low)
        return any(low in self.flat.steps[i].inputs for i in found)


def _leaf(name: str, leaf: Any, stacked: int | None) -> LeafAxes:
    shape = tuple(leaf.shape)
    count = 1 if stacked is None else shape[stacked]
    why = None if tree.is_floating(leaf) else "is not floating"
    parts = tuple(
        tuple(
            ONE if axis == stacked else fresh(size, why)
            for axis, size in enumerate(shape)
        )
        for _ in range(count)
    )
    return LeafAxes(name, shape, leaf.dtype, stacked, parts)


def _number(value: Any) -> float | None:
    if value is None or np.shape(value) != ():
        return None
    return float(value) if np.isrealobj(np.asarray(value)) else math.nan


def _stacked(flat: Program) -> tuple[dict[int, int], dict[int, int]]:
    """Leaves that are used only index by index along one axis: to that axis.

    And the positions of the steps that take an index: to that index.
    """
    numbers = {n for n in flat.leaves if len(flat.kinds[n].shape) > 1}
    axes: dict[int, int] = {}
    indices: dict[int, int] = {}
    refused = numbers & {x for x in flat.outputs if isinstance(x, int)}
    for position, step in enumerate(flat.steps):
        for i, x in enumerate(step.inputs):
            if isinstance(x, Fixed) or x not in numbers:
                continue
            taken = _taken(flat, step) if i == 0 else None
            if taken is None or axes.setdefault(x, taken[0]) != taken[0]:
                refused.add(x)
            else:
                indices[position] = taken[1]
    return {n: axis for n, axis in axes.items() if n not in refused}, indices


def _taken(flat: Program, step: Step) -> tuple[int, int] | None:
    """Along which axis a step takes one index of its operand, and which, if it does."""
    if step.primitive.name not in ("slice", "dynamic_slice"):
        return None
    before = flat.kinds[step.inputs[0]].shape  # type: ignore[index]
    after = flat.kinds[step.outputs[0]].shape
    cut = [i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b]
    if len(cut) != 1 or after[cut[0]] != 1:
        return None
    axis = cut[0]
    if step.primitive.name == "slice":
        return axis, int(step.params["start_indices"][axis])
    start = program_.constant(flat, step.inputs[1 + axis])
    if start is None:
        return None
    # Moved until it fits, as XLA does.
    return axis, min(max(int(jnp.asarray(start)), 0), before[axis] - 1)
