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
from jaxprune.graph import program as program_
from jaxprune.graph.axis_dims import ONE, Dim, atoms, freeze, new_dim, product_of, root
from jaxprune.graph.axis_moves import AxesOperand, ValueAxes, new_axes
from jaxprune.graph.equation import Equation
from jaxprune.graph.primitives import rules_of
from jaxprune.graph.program import Fixed, Program, Step
from jaxprune.graph.view_rules import cast_view, same_views
from jaxprune.typing import Params

UNUSED = "is not used"


@dataclasses.dataclass(frozen=True)
class LeafAxes:
    """The dimensions of a leaf.

    Attributes:
      name: the leaf's path name.
      shape: shape of the leaf.
      dtype: dtype of the leaf.
      stacked: the axis that is used index by index, or None.
      parts: dimensions of each axis, for each index along the stacked axis (one where
        there is none); `ONE` for the stacked axis.
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
      nested: products of the axes of a weight that meet an activation side by side, as
        heads and their features do.
    """

    program: Program
    structure: Any
    leaves: tuple[LeafAxes, ...]
    axes: dict[int, ValueAxes]
    uses: dict[tuple[int, int], ValueAxes]
    nested: list[Dim]


def trace_axes(
    fn: Callable[[Params, Any], Any], params: Params, batch: Any
) -> AxisTrace:
    """Traces a function of parameters and a batch, and finds its axes' dimensions."""
    structure = None

    def flat_fn(params: Params, batch: Any) -> list[Any]:
        nonlocal structure
        leaves, structure = jax.tree.flatten(fn(params, batch))
        return leaves

    params = lazy.abstract(params)  # shapes and dtypes are enough
    flat = program_.flatten(flat_fn, params, batch)
    named = {
        name: leaf
        for name, leaf in tree.named_leaves(params).items()
        if not tree.is_excluded(leaf)
    }
    walker = _Walker(flat, named)
    for position, step in enumerate(flat.steps):
        walker.look(position, step)
    walker.freeze_ends()
    return AxisTrace(
        flat, structure, walker.leaves, walker.axes, walker.uses, walker.nested
    )


class _Walker:
    """Gives dimensions to the results of one step after the other."""

    def __init__(self, flat: Program, leaves: dict[str, Any]) -> None:
        self.flat = flat
        self.axes: dict[int, ValueAxes] = {}
        self.uses: dict[tuple[int, int], ValueAxes] = {}
        self.nested: list[Dim] = []
        self._stacks = _Stacks(flat)
        self.leaves = tuple(
            _new_leaf_axes(name, leaf, self._stacks.axes.get(number))
            for (name, leaf), number in zip(leaves.items(), flat.leaves, strict=True)
        )
        self._leaf_of = dict(zip(flat.leaves, self.leaves, strict=True))
        for number, leaf in self._leaf_of.items():
            # A stacked leaf has axes only where one of its layers is taken.
            if leaf.stacked is None:
                self.axes[number] = ValueAxes(leaf.parts[0], (True,) * len(leaf.shape))
        for number in flat.batch:
            shape = flat.avals[number].shape
            self.axes[number] = new_axes(shape, "is an axis of the batch")
        self._scalars: dict[int, float | None] = {}  # by number of a constant

    def look(self, position: int, step: Step) -> None:
        """Takes one more step into account."""
        flat = self.flat
        if flat.constants.issuperset(step.outputs):
            return  # computed as it is, whatever is removed
        first = step.inputs[0] if step.inputs else None
        # Only steps that move a stacked leaf have it as an operand; see `_Stacks`.
        if isinstance(first, int) and first in self._stacks.views:
            self._look_at_stack(position, step, first)
            return
        operands = [self._operand(position, i, x) for i, x in enumerate(step.inputs)]
        rules = rules_of(step.primitive.name)
        if rules.is_sum:
            self._note_residual(step, operands)
        if step.primitive.name == "dot_general":  # heads and their features, say
            self._note_nested(step, operands)
        shapes = [tuple(flat.avals[number].shape) for number in step.outputs]
        equation = Equation(step.primitive.name, step.params, operands, shapes)
        results = rules.dims(equation)
        self.axes.update(zip(step.outputs, results, strict=True))

    def freeze_ends(self) -> None:
        """Freezes the axes of the results, and of leaves that nothing uses."""
        numbers = [x for x in self.flat.outputs if isinstance(x, int)]
        for number in numbers:
            for dim in self.axes[number].dims if number in self.axes else ():
                freeze(dim, "is an axis of the result")
        used = {x for step in self.flat.steps for x in step.inputs if type(x) is int}
        for number in {*self.flat.leaves} - used - {*numbers}:
            for dim in self.axes[number].dims:
                freeze(dim, UNUSED)

    def _look_at_stack(self, position: int, step: Step, first: int) -> None:
        """A step that takes one index of a leaf, or moves the whole of it."""
        index = self._stacks.indices.get(position)
        if index is None:
            return  # moved as a whole: `_Stacks` follows it
        number, order = self._stacks.views[first]
        leaf = self._leaf_of[number]
        if len(self.flat.avals[step.outputs[0]].shape) < len(order):  # a gather's
            order = tuple(axis for axis in order if axis != leaf.stacked)
        dims = tuple(leaf.parts[index][axis] for axis in order)
        self.axes[step.outputs[0]] = ValueAxes(dims, (True,) * len(dims))

    def _operand(self, position: int, i: int, x: int | Fixed) -> AxesOperand:
        if isinstance(x, Fixed):
            axes = new_axes(np.shape(x.value), None)
            return AxesOperand(np.shape(x.value), axes, _number(x.value))
        shape = tuple(self.flat.avals[x].shape)
        if x not in self.flat.constants:
            return AxesOperand(shape, self.axes[x])
        # A constant is free to follow what it meets, at each place anew.
        self.uses[position, i] = new_axes(shape, None)
        return AxesOperand(shape, self.uses[position, i], self._scalar(x))

    def _scalar(self, number: int) -> float | None:
        """The number that a constant holds everywhere, where that is easily seen."""
        if number not in self._scalars:
            scalar, aval = None, self.flat.avals[number]
            position = self.flat.maker.get(number)
            if aval.shape == () and isinstance(aval.dtype, np.dtype):
                scalar = _number(program_.constant_value(self.flat, number))
            elif position is not None:
                step = self.flat.steps[position]
                x = step.inputs[0] if step.inputs else None
                if step.primitive.name == "broadcast_in_dim":
                    if isinstance(x, Fixed):
                        scalar = _number(x.value)
                    elif x is not None:
                        scalar = self._scalar(x)
            self._scalars[number] = scalar
        return self._scalars[number]

    def _note_nested(self, step: Step, operands: Sequence[AxesOperand]) -> None:
        """Keeps the axes of a weight that are summed together, or come out together."""
        contracted, batched = step.params["dimension_numbers"]
        for side, (x, operand) in enumerate(zip(step.inputs, operands, strict=True)):
            if isinstance(x, Fixed) or x in self.flat.varying:
                continue
            summed = set(contracted[side])
            free = set(range(len(operand.shape))) - summed - set(batched[side])
            for axes in (summed, free):
                self.nested.append(
                    product_of([operand.axes.dims[i] for i in sorted(axes)])
                )

    def _note_residual(self, step: Step, operands: Sequence[AxesOperand]) -> None:
        """Marks axes on which a value and what was computed from it are added."""
        numbers = [x for x in step.inputs if not isinstance(x, Fixed)]
        if len(numbers) != 2 or not self.flat.varying.issuperset(numbers):
            return
        first_dims, second_dims = (operand.axes.dims for operand in operands)
        if len(first_dims) != len(second_dims):
            return  # one number is added everywhere
        pairs = [
            (root(a), root(b)) for a, b in zip(first_dims, second_dims, strict=True)
        ]
        # Already the same: by what made one of them, or from an earlier sum.
        if all(a is b for a, b in pairs) or not self._made_from(numbers):
            return
        for a, b in pairs:
            for atom in itertools.chain(atoms(a), atoms(b)):
                if a is not b and atom is not ONE:
                    atom.residual = True

    def _made_from(self, numbers: Sequence[int]) -> bool:
        """Whether one of two values was computed from the other."""
        # Values are numbered in order, so the later one is made of the earlier.
        low, high = sorted(numbers)
        positions = program_.steps_to(self.flat, [high], lambda number: number <= low)
        return any(low in self.flat.steps[i].inputs for i in positions)


def _new_leaf_axes(name: str, leaf: Any, stacked: int | None) -> LeafAxes:
    shape = tuple(np.shape(leaf))
    count = 1 if stacked is None else shape[stacked]
    why = None if tree.is_floating(leaf) else "is not floating"
    # (layers or 1, axes): each layer of a stack has dimensions of its own.
    parts = tuple(
        tuple(
            ONE if axis == stacked else new_dim(size, why)
            for axis, size in enumerate(shape)
        )
        for _ in range(count)
    )
    return LeafAxes(name, shape, jax.typeof(leaf).dtype, stacked, parts)


def _number(value: Any) -> float | None:
    if value is None or np.shape(value) != ():
        return None
    # A complex number is known too, but no comparison with it holds.
    return float(value) if np.isrealobj(np.asarray(value)) else math.nan


class _Stacks:
    """The leaves that are used only index by index along one axis.

    Attributes:
      axes: number of such a leaf to that axis.
      views: number of a value that is such a leaf, transposed or cast, to the leaf and
        the order of its axes.
      indices: the position of a step that takes one index, to that index.
    """

    def __init__(self, flat: Program) -> None:
        """Looks at every use of every leaf."""
        self.axes: dict[int, int] = {}
        self.indices: dict[int, int] = {}
        self.views = {
            number: (number, tuple(range(len(flat.avals[number].shape))))
            for number in flat.leaves
            if len(flat.avals[number].shape) > 1
        }
        refused = set()  # leaves that something uses as a whole
        for position, step in enumerate(flat.steps):
            for i, x in enumerate(step.inputs):
                if isinstance(x, Fixed) or x not in self.views:
                    continue
                if i > 0 or not self._moved(flat, position, step):
                    refused.add(self.views[x][0])
        for x in flat.outputs:
            if isinstance(x, int) and x in self.views:
                refused.add(self.views[x][0])
        indices: dict[int, set[int]] = {}
        for position, index in self.indices.items():
            leaf, _ = self.views[flat.steps[position].inputs[0]]  # type: ignore[index]
            indices.setdefault(leaf, set()).add(index)
        # Only a leaf all of whose indices are used is a stack.
        self.axes = {
            n: axis
            for n, axis in self.axes.items()
            if n not in refused and len(indices[n]) == flat.avals[n].shape[axis]
        }
        self.views = {n: v for n, v in self.views.items() if v[0] in self.axes}

    def _moved(self, flat: Program, position: int, step: Step) -> bool:
        """Whether a step transposes, casts or takes one index of a leaf."""
        leaf, order = self.views[step.inputs[0]]  # type: ignore[index]
        same = rules_of(step.primitive.name).view in (same_views, cast_view)
        if same and len(step.inputs) == 1:
            self.views[step.outputs[0]] = (leaf, order)
            return True
        if step.primitive.name == "transpose":
            moved = tuple(order[axis] for axis in step.params["permutation"])
            self.views[step.outputs[0]] = (leaf, moved)
            return True
        indexed = _single_index(flat, step)
        if indexed is None:
            return False
        axis, self.indices[position] = order[indexed[0]], indexed[1]
        return self.axes.setdefault(leaf, axis) == axis


def _single_index(flat: Program, step: Step) -> tuple[int, int] | None:
    """Along which axis a step takes one index of its operand, and which, if it does."""
    name = step.primitive.name
    if name not in ("slice", "dynamic_slice", "gather"):
        return None
    before = flat.avals[step.inputs[0]].shape  # type: ignore[index]
    after = flat.avals[step.outputs[0]].shape
    if name == "gather":  # as `jnp.take` of one index
        after = step.params["slice_sizes"]
    cut_axes = [i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b]
    if len(cut_axes) != 1 or after[cut_axes[0]] != 1:
        return None
    axis = cut_axes[0]
    if name == "slice":
        return axis, int(step.params["start_indices"][axis])
    if name == "gather":
        numbers, operand = step.params["dimension_numbers"], step.inputs[1]
        one_axis = numbers.start_index_map == numbers.collapsed_slice_dims == (axis,)
        if not one_axis or len(flat.avals[operand].shape) != 1:  # type: ignore[index]
            return None
    else:
        operand = step.inputs[1 + axis]
    start = program_.constant_value(flat, operand)
    if start is None:
        return None
    index = int(jnp.ravel(jnp.asarray(start))[0])
    fitting = min(max(index, 0), before[axis] - 1)
    # A dynamic slice is moved until it fits, as XLA does; a gather may be filled.
    return None if name == "gather" and index != fitting else (axis, fitting)
