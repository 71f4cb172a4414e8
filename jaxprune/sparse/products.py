"""Where a traced program meets the matrices of its leaves: products and looked-up rows.

A use is a step of the program, and the matrix (batch, out, in) that a leaf is to it.
Steps of four kinds can do with a packed matrix: a `dot_general` of a leaf with an
activation, a `ragged_dot` with those of experts, a convolution of 1 x 1, and a `gather`
of whole rows, as of an embedding that the head shares.
"""

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.arrays import lazy
from jaxprune.graph import program as program_
from jaxprune.graph.linear_ops import Trace
from jaxprune.graph.program import Fixed, Program, Step
from jaxprune.graph.weight_view import Transpose, WeightView
from jaxprune.sparse import expansion
from jaxprune.sparse.grouped import grouped_matmul
from jaxprune.sparse.matmul import matmul
from jaxprune.sparse.split_matrix import SplitMatrix, split_expand, split_matmul


class Use(NamedTuple):
    """A step that needs a matrix of a leaf.

    Attributes:
      position: position of the step in the program.
      leaf: the leaf's path name.
      side: number of the operand that is the weight.
      value: number of that operand in the program.
      batch: axes of the operand that are batch.
      outputs: its axes that are outputs.
      inputs: its axes that are summed over.
      key: equal for the same matrix in traces of other batches.
    """

    position: int
    leaf: str
    side: int
    value: int
    batch: tuple[int, ...]
    outputs: tuple[int, ...]
    inputs: tuple[int, ...]
    key: Hashable

    def matrix(self, weight: np.ndarray) -> np.ndarray:
        """The operand as (out, in), or (batch, out, in)."""
        moved = weight.transpose(self.batch + self.outputs + self.inputs)
        sizes = [
            int(np.prod([weight.shape[axis] for axis in axes], dtype=np.int64))
            for axes in (self.batch, self.outputs, self.inputs)
        ]
        return moved.reshape(sizes if self.batch else sizes[1:])


def find_uses(trace: Trace) -> list[Use]:
    """The uses of a traced program, in its order."""
    uses = []
    names = {number: name for name, number in trace.leaves.items()}
    positions = {op.step for op in trace.linear_ops}
    for position, step in enumerate(trace.program.steps):
        axes = _axes(trace, step) if position in positions else _row_axes(trace, step)
        if axes is None:
            continue
        side, *parts = axes
        value = step.inputs[side]
        view = trace.views[value]  # type: ignore[index]
        key = (
            names[view.leaf],
            _moves(view, sum(parts, ())),
            tuple(map(len, parts)),
            _arithmetic(trace, value),
        )
        uses.append(
            Use(position, names[view.leaf], side, value, *parts, key)  # type: ignore
        )
    return uses


def _axes(trace: Trace, step: Step) -> Any:
    """Which operand of a product is the weight: its batch, output and input axes."""
    if program_.is_grouped(step):
        return 1, (0,), (2,), (1,)
    if _is_pointwise(trace.program, step):
        outputs, *inputs = step.params["dimension_numbers"].rhs_spec
        return 1, (), (outputs,), tuple(inputs)
    if step.primitive.name != "dot_general":
        return None
    side = next((i for i, x in enumerate(step.inputs) if x in trace.views), None)
    if side is None:  # kernels that are joined first
        return None
    contracted, batched = step.params["dimension_numbers"]
    batch, inputs = tuple(batched[side]), tuple(contracted[side])
    ndim = len(trace.views[step.inputs[side]].shape)  # type: ignore[index]
    outputs = tuple(a for a in range(ndim) if a not in batch + inputs)
    # Without outputs a leaf is a vector, and of no axes nothing is saved.
    return (side, batch, outputs, inputs) if outputs and inputs else None


def _is_pointwise(program: Program, step: Step) -> bool:
    """Whether a step is a convolution of 1 x 1, without padding: a product."""
    if step.primitive.name != "conv_general_dilated":
        return False
    params = step.params
    shape = program.avals[step.inputs[1]].shape  # type: ignore[index]
    window = [shape[axis] for axis in params["dimension_numbers"].rhs_spec[2:]]
    groups = params["feature_group_count"], params["batch_group_count"]
    return {*window, *groups, *params["lhs_dilation"]} == {1} and not np.any(
        params["padding"]
    )


def _row_axes(trace: Trace, step: Step) -> Any:
    """The same of a gather of whole rows of a matrix; None for other steps."""
    if step.primitive.name != "gather" or step.inputs[0] not in trace.views:
        return None
    shape = trace.views[step.inputs[0]].shape  # type: ignore[index]
    numbers, indices = step.params["dimension_numbers"], step.inputs[1]
    if isinstance(indices, Fixed) or len(shape) != 2:
        return None
    ndim = len(trace.program.avals[indices].shape)
    whole_rows = (
        tuple(step.params["slice_sizes"]) == (1, shape[1])
        and tuple(numbers.offset_dims) == (ndim - 1,)
        and tuple(numbers.collapsed_slice_dims) == (0,)
        and tuple(numbers.start_index_map) == (0,)
    )
    return (0, (), (0,), (1,)) if whole_rows else None


def _moves(view: WeightView, order: tuple[int, ...]) -> Hashable:
    """A view's moves with the axes in this order at the end; equal for equal ones."""
    moves: list[Any] = []
    for move in (*view.moves, Transpose(order)):
        if isinstance(move, Transpose):
            if moves and isinstance(moves[-1], Transpose):
                before = moves.pop().order
                move = Transpose(tuple(before[axis] for axis in move.order))
            if move.order == tuple(range(len(move.order))):
                continue
        moves.append(move)
    return tuple(moves)


def _arithmetic(trace: Trace, value: Any) -> Hashable:
    """The casts and factors between a leaf and an operand, and its dtype."""
    program = trace.program
    keys: list[Hashable] = [str(program.avals[value].dtype)]
    if not trace.views[value].cast:
        return tuple(keys)
    leaves = set(program.leaves)
    for position in sorted(program_.steps_to(program, [value], leaves.__contains__)):
        step = program.steps[position]
        constants = [
            np.asarray(program_.constant_value(program, x)).tobytes()
            for x in step.inputs
            if isinstance(x, Fixed) or x in program.constants
        ]
        keys.append((step.key, *constants))
    return tuple(keys)


def leaf_order(trace: Trace, use: Use) -> bool | None:
    """Whether the matrix of a use is its leaf transposed.

    Args:
      trace: the traced program.
      use: the use.

    Returns:
      True, or False where it is the leaf as it is; None where it is neither: a part of
      the leaf, or one that is scaled or narrowed on its way.
    """
    program, view = trace.program, trace.views[use.value]
    moves: Any = _moves(view, use.batch + use.outputs + use.inputs)
    turned = Transpose((*range(len(use.batch)), len(use.batch) + 1, len(use.batch)))
    if moves not in ((), (turned,)):
        return None
    leaf = program.leaves[view.leaf]
    positions = program_.steps_to(program, [use.value], {leaf}.__contains__)
    dtype = np.dtype(program.avals[leaf].dtype)
    for step in (program.steps[position] for position in positions):
        after = np.dtype(program.avals[step.outputs[0]].dtype)
        is_move = step.primitive.name in ("convert_element_type", "transpose", "copy")
        if not is_move or jnp.promote_types(dtype, after) != after:
            return None
    return bool(moves)


def operand(trace: Trace, use: Use, leaves: Mapping[str, Any]) -> np.ndarray:
    """The weight of a use, as the program computes it from leaves.

    Args:
      trace: the traced program.
      use: the use.
      leaves: arrays by path name; `LazyArray` leaves are read.

    Returns:
      The operand, of its shape and dtype in the program.
    """
    program, view = trace.program, trace.views[use.value]
    if not view.cast:
        # One compiled program for all layers of a stack.
        return np.asarray(view.read(jnp.asarray(lazy.array(leaves[use.leaf]))))
    known: dict[int, Any] = dict(program.closed_over)
    numbers = dict(zip(program.leaves, trace.leaves, strict=True))
    steps = program_.steps_to(
        program, [use.value], lambda x: x in known or x in numbers
    )
    part = program_.subgraph(program, steps, [use.value])
    arrays = [
        known[x] if x in known else jnp.asarray(lazy.array(leaves[numbers[x]]))
        for x in part.inputs
    ]
    return np.asarray(part.run(*arrays)[0])


def live_steps(program: Program, uses: Iterable[Use]) -> tuple[list[int], set[int]]:
    """What still runs where these uses have packed matrices.

    Args:
      program: traced program.
      uses: uses whose weight is no operand any more.

    Returns:
      The positions of the steps, in order, and the numbers of the values they need.
    """
    sides = {use.position: use.side for use in uses}
    needed = {x for x in program.outputs if not isinstance(x, Fixed)}
    positions = []
    for position in reversed(range(len(program.steps))):
        step = program.steps[position]
        # What has no result, or calls back, is run for what it does.
        acts = not step.outputs or "callback" in step.primitive.name
        if acts or not needed.isdisjoint(step.outputs):
            positions.append(position)
            needed.update(
                x
                for i, x in enumerate(step.inputs)
                if not isinstance(x, Fixed) and sides.get(position) != i
            )
    return positions[::-1], needed


def apply(use: Use, step: Step, operands: Sequence[Any], packed: Any, aval: Any) -> Any:
    """The result of a step whose weight is packed.

    Args:
      use: the use.
      step: its step.
      operands: operands of the step, that of the weight being left out.
      packed: matrix of the use, `PackedMatrix` or `SplitMatrix`.
      aval: shape and dtype of the result.

    Returns:
      The result, of that shape and dtype.
    """
    precision = step.params.get("precision")
    if program_.is_grouped(step):
        rows, _, sizes = operands
        product = grouped_matmul(rows, packed, sizes, precision=precision)
        return product.astype(aval.dtype)
    x = jnp.asarray(operands[1 - use.side])
    if step.primitive.name == "gather":
        return _gathered(step, x, packed).reshape(aval.shape).astype(aval.dtype)
    if step.primitive.name == "conv_general_dilated":
        return _pointwise(step, x, packed).astype(aval.dtype)
    contracted, batched = step.params["dimension_numbers"]
    last, first = contracted[1 - use.side], batched[1 - use.side]
    free = [a for a in range(x.ndim) if a not in (*last, *first)]
    moved = x.transpose(*first, *free, *last)  # (batch..., samples..., in...)
    matrices = packed.shape[:-2]  # () of one
    samples = math.prod(x.shape[a] for a in free)
    rows = moved.reshape(*matrices, samples, packed.shape[-1])
    product = _multiply(rows, packed, precision)
    if use.side == 0:  # the weight's axes come first in the result
        product = jnp.swapaxes(product, -1, -2)
    return product.reshape(aval.shape).astype(aval.dtype)


def _multiply(rows: jax.Array, packed: Any, precision: Any) -> jax.Array:
    multiply: Any = split_matmul if isinstance(packed, SplitMatrix) else matmul
    return multiply(rows, packed, precision=precision)


def _pointwise(step: Step, x: jax.Array, packed: Any) -> jax.Array:
    """A convolution of 1 x 1 as the product of its channels."""
    numbers = step.params["dimension_numbers"]
    batch, channels, *space = numbers.lhs_spec
    strides = [1] * x.ndim
    for axis, stride in zip(space, step.params["window_strides"], strict=True):
        strides[axis] = stride
    x = jax.lax.slice(x, (0,) * x.ndim, x.shape, strides)
    x = x.transpose(batch, *space, channels)  # (batch, ..., in)
    rows = x.reshape(-1, x.shape[-1])
    y = _multiply(rows, packed, step.params["precision"])
    y = y.reshape(*x.shape[:-1], -1)  # (batch, ..., out)
    to_batch, to_channels, *to_space = numbers.out_spec
    return jnp.moveaxis(y, range(y.ndim), (to_batch, *to_space, to_channels))


def _gathered(step: Step, indices: jax.Array, packed: Any) -> jax.Array:
    """Rows of a packed matrix, those out of bounds as the step's mode says."""
    mode, numbers = step.params["mode"], indices.reshape(-1)
    bounded = jnp.clip(numbers, 0, packed.rows - 1)
    is_split = isinstance(packed, SplitMatrix)
    expand: Any = split_expand if is_split else expansion.expand
    rows = expand(packed, bounded)  # (count, in)
    if mode != jax.lax.GatherScatterMode.FILL_OR_DROP:
        return rows
    fill = step.params["fill_value"]
    inside = (numbers == bounded)[:, None]
    return jnp.where(
        inside, rows, jnp.asarray(np.nan if fill is None else fill, rows.dtype)
    )


def abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    """The shape and dtype of a leaf, for a function to be traced again."""
    aval = jax.typeof(leaf) if not isinstance(leaf, jax.ShapeDtypeStruct) else leaf
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=aval.weak_type)
