"""What primitives that compute do to the dimensions of their axes.

Axes that are added, multiplied or compared must keep the same positions. An axis that
is summed over may lose a position only if one factor is zero there as soon as the
weights of that position are zero. A primitive that ranks, scans or takes the largest
freezes its axis.
"""

from collections.abc import Callable, Sequence
from typing import TypeAlias

from jaxprune.graph.axis_dims import as_product, freeze, new_dim, unify
from jaxprune.graph.axis_moves import (
    AxesEquation,
    AxesOperand,
    DimsRule,
    ValueAxes,
    new_axes,
    select_axes,
)
from jaxprune.graph.program import GROUPED

_WINDOW = "is a window"

ZeroRule: TypeAlias = Callable[[AxesEquation, Sequence[bool]], bool]
"""A step, and which of its operands are zero at a removed position, to an answer."""


def freeze_all_axes(equation: AxesEquation) -> list[ValueAxes]:
    """What is not understood: nothing can be removed from what it touches."""
    for operand in equation.operands:
        for dim in operand.axes.dims:
            freeze(dim, f"is an operand of {equation.name}, which is not understood")
    why = f"is an axis of the result of {equation.name}, which is not understood"
    return [new_axes(shape, why) for shape in equation.shapes]


def never(equation: AxesEquation, zeros: Sequence[bool]) -> bool:
    """No: 0 == 0 is not zero, say."""
    return False


def any_is_zero(equation: AxesEquation, zeros: Sequence[bool]) -> bool:
    """Whether a product is zero."""
    return any(zeros)


def all_are_zero(equation: AxesEquation, zeros: Sequence[bool]) -> bool:
    """Whether a sum or a maximum is zero."""
    return all(zeros)


def quotient_is_zero(equation: AxesEquation, zeros: Sequence[bool]) -> bool:
    """Whether 0 is divided by what is not."""
    return zeros[0] and not zeros[1]


def divisor_is_zero(equation: AxesEquation, zeros: Sequence[bool]) -> bool:
    """Whether the divisor becomes zero; the number 0 was zero before."""
    return zeros[1] and equation.operands[1].scalar is None


def cases_are_zero(equation: AxesEquation, zeros: Sequence[bool]) -> bool:
    """Whether `select_n` is zero, whichever case it selects."""
    return all(zeros[1:])


def integer_power_is_zero(equation: AxesEquation, zeros: Sequence[bool]) -> bool:
    """Whether it is 0 to a positive power."""
    return zeros[0] and equation.params["y"] > 0


def integer_power_fails(equation: AxesEquation, zeros: Sequence[bool]) -> bool:
    """Whether it is 0 to a negative power."""
    return zeros[0] and equation.params["y"] < 0


def power_is_zero(equation: AxesEquation, zeros: Sequence[bool]) -> bool:
    """Whether it is 0 to a power that is known to be positive."""
    power = equation.operands[1].scalar
    return zeros[0] and power is not None and power > 0


def power_fails(equation: AxesEquation, zeros: Sequence[bool]) -> bool:
    """Whether it is 0 to a power that may be negative."""
    power = equation.operands[1].scalar
    return zeros[0] and (power is None or power < 0)


def clamped_is_zero(equation: AxesEquation, zeros: Sequence[bool]) -> bool:
    """Whether 0 lies between the bounds."""
    low, high = equation.operands[0].scalar, equation.operands[2].scalar
    return zeros[1] and low is not None and high is not None and low <= 0 <= high


def elementwise(zero: ZeroRule = never, fails: ZeroRule = never) -> DimsRule:
    """The rule of an operation on operands of one shape, position by position.

    Args:
      zero: whether the result is zero at a removed position.
      fails: whether the result is not finite there, so that nothing can be removed.

    Returns:
      The rule.
    """

    def rule(equation: AxesEquation) -> list[ValueAxes]:
        operands, shape = equation.operands, equation.shapes[0]
        if any(len(operand.shape) not in (0, len(shape)) for operand in operands):
            return freeze_all_axes(equation)
        dims, zeros = [], []
        for axis, size in enumerate(shape):
            # An axis of length one is repeated, and ties nothing.
            full = [x for x in operands if x.shape[axis:][:1] == (size,)]
            tied = [operand.axes.dims[axis] for operand in full]
            for dim in tied[1:]:
                unify(tied[0], dim)
            are_zero = [_is_zero(operand, axis, size) for operand in operands]
            # Made of numbers only, an axis is free to follow what it meets.
            dims.append(tied[0] if tied else new_dim(size))
            zeros.append(zero(equation, are_zero))
            if tied and fails(equation, are_zero):
                why = f"{equation.name} divides by what is zero where it is removed"
                freeze(tied[0], why)
        return [ValueAxes(tuple(dims), tuple(zeros))]

    return rule


def _is_zero(operand: AxesOperand, axis: int, size: int) -> bool:
    if operand.scalar is not None:
        return operand.scalar == 0
    return operand.shape[axis:][:1] == (size,) and operand.axes.zeros[axis]


def unary(*, zero_stays: bool = True, finite: bool = True) -> DimsRule:
    """The rule of a function f of one operand.

    Args:
      zero_stays: whether f(0) = 0.
      finite: whether f(0) is finite. Else 0 times it is no number, and nothing can be
        removed where the operand is zero.

    Returns:
      The rule.
    """

    def rule(equation: AxesEquation) -> list[ValueAxes]:
        for operand in equation.operands:
            for dim, zero in zip(*operand.axes, strict=True):
                if zero and not finite:
                    why = f"{equation.name} runs over what is zero where it is removed"
                    freeze(dim, why)
        # `optimization_barrier` has several operands, each with its own result.
        return [
            ValueAxes(x.axes.dims, tuple(zero_stays and zero for zero in x.axes.zeros))
            for x in equation.operands
        ]

    return rule


def dot_axes(equation: AxesEquation) -> list[ValueAxes]:
    """Contracted and batch axes are the same in both; the others stay."""
    contracted, batched = equation.params["dimension_numbers"]
    first, second = equation.operands
    for i, j in zip(*contracted, strict=True):
        unify(first.axes.dims[i], second.axes.dims[j])
        if not (first.axes.zeros[i] or second.axes.zeros[j]):
            freeze(first.axes.dims[i], _runs_over("a contraction"))
    dims, zeros = [], []
    for i, j in zip(*batched, strict=True):
        unify(first.axes.dims[i], second.axes.dims[j])
        dims.append(first.axes.dims[i])
        zeros.append(first.axes.zeros[i] or second.axes.zeros[j])
    # Results are (batch, free axes of the first, free axes of the second).
    for side, operand in enumerate((first, second)):
        for axis in range(len(operand.shape)):
            if axis not in (*contracted[side], *batched[side]):
                dims.append(operand.axes.dims[axis])
                zeros.append(operand.axes.zeros[axis])
    return [ValueAxes(tuple(dims), tuple(zeros))]


def _runs_over(what: str) -> str:
    return f"{what} runs over it, of values that are not zero where it is removed"


def grouped_dot_axes(equation: AxesEquation) -> list[ValueAxes]:
    """Rows (rows, in) that lie group by group, times weights (groups, in, out)."""
    numbers = equation.params["ragged_dot_dimension_numbers"]
    if numbers != GROUPED or equation.params["group_offset"] is not None:
        return freeze_all_axes(equation)
    rows, weight, sizes = equation.operands
    why = "the sizes of the groups say which matrix a row meets"
    for dim in (weight.axes.dims[0], sizes.axes.dims[0]):
        freeze(dim, why)
    freeze(rows.axes.dims[0], "lies group by group")
    # Every group's matrix (in, out) is alike.
    matrix = AxesOperand(weight.shape[1:], select_axes(weight, (1, 2)))
    params = {"dimension_numbers": (((1,), (0,)), ((), ()))}
    return dot_axes(equation._replace(params=params, operands=(rows, matrix)))


def convolution_axes(equation: AxesEquation) -> list[ValueAxes]:
    """Inputs are (groups x inputs of a group), outputs likewise; space is frozen."""
    numbers = equation.params["dimension_numbers"]
    groups = equation.params["feature_group_count"]
    value, kernel = equation.operands
    batch, feature, *space = numbers.lhs_spec
    kernel_out, kernel_in, *window = numbers.rhs_spec
    # A position in space meets every position of the window.
    for operand, axes in ((value, space), (kernel, window)):
        for axis in axes:
            freeze(operand.axes.dims[axis], _WINDOW)
    inputs, outputs = value.axes.dims[feature], kernel.axes.dims[kernel_out]
    split_inputs = as_product(inputs, [groups, value.shape[feature] // groups])
    split_outputs = as_product(outputs, [groups, kernel.shape[kernel_out] // groups])
    batch_groups = equation.params["batch_group_count"]
    if split_inputs is None or split_outputs is None or batch_groups > 1:
        inputs_of_group, samples = kernel.axes.dims[kernel_in], value.axes.dims[batch]
        for dim in (inputs, outputs, inputs_of_group, samples):
            freeze(dim, "is cut by the groups of a convolution")
    else:
        # A group of inputs meets its own outputs and no others.
        unify(split_inputs[0], split_outputs[0])
        unify(split_inputs[1], kernel.axes.dims[kernel_in])
        if not (value.axes.zeros[feature] or kernel.axes.zeros[kernel_in]):
            freeze(split_inputs[1], _runs_over("a convolution"))
    result = new_axes(equation.shapes[0], _WINDOW)
    dims, zeros = list(result.dims), list(result.zeros)
    result_batch, result_feature, *_ = numbers.out_spec
    if batch_groups == 1:
        dims[result_batch] = value.axes.dims[batch]
        zeros[result_batch] = value.axes.zeros[batch]
    dims[result_feature], zeros[result_feature] = outputs, kernel.axes.zeros[kernel_out]
    return [ValueAxes(tuple(dims), tuple(zeros))]


def sum_axes(equation: AxesEquation) -> list[ValueAxes]:
    """What is zero where it is removed may be summed over."""
    (operand,), axes = equation.operands, equation.params["axes"]
    for axis in axes:
        if not operand.axes.zeros[axis]:
            freeze(operand.axes.dims[axis], _runs_over("a sum"))
    return [select_axes(operand, _all_but(axes, operand))]


def reduction(*, zero_stays: bool) -> DimsRule:
    """The rule of a reduction that needs every position of its axes.

    Args:
      zero_stays: whether zeros along the axes reduce to zero.

    Returns:
      The rule.
    """

    def rule(equation: AxesEquation) -> list[ValueAxes]:
        (operand,), axes = equation.operands, equation.params["axes"]
        for axis in axes:
            freeze(operand.axes.dims[axis], _runs_over(equation.name))
        result = select_axes(operand, _all_but(axes, operand))
        return [result if zero_stays else _without_zeros(result)]

    return rule


def _all_but(axes: Sequence[int], operand: AxesOperand) -> list[int]:
    return [i for i in range(len(operand.shape)) if i not in axes]


def _without_zeros(axes: ValueAxes) -> ValueAxes:
    return ValueAxes(axes.dims, (False,) * len(axes.dims))


def along(*, zero_stays: bool = True) -> DimsRule:
    """The rule of what works along some axes and leaves the others to themselves.

    Args:
      zero_stays: whether zeros along the axes give zeros.

    Returns:
      The rule.
    """

    def rule(equation: AxesEquation) -> list[ValueAxes]:
        names = ("axis", "dimension", "dimensions")
        axes = next(equation.params[name] for name in names if name in equation.params)
        first = equation.operands[0].axes
        for operand in equation.operands[1:]:
            for a, b in zip(first.dims, operand.axes.dims, strict=True):
                unify(a, b)
        for axis in axes if isinstance(axes, tuple | list) else (axes,):
            freeze(first.dims[axis], f"{equation.name} runs along it")
        # What is sorted by other keys is not zero where its operand is.
        if not zero_stays or len(equation.operands) > 1:
            first = _without_zeros(first)
        return [first for _ in equation.shapes]

    return rule


def top_k_axes(equation: AxesEquation) -> list[ValueAxes]:
    """Values and indices: the axis that is ranked keeps all its positions."""
    operand = equation.operands[0]
    axis = equation.params.get("axis", -1) % len(operand.shape)
    freeze(operand.axes.dims[axis], "top_k runs along it")
    results = []
    for shape in equation.shapes:
        dims = list(operand.axes.dims)
        dims[axis] = new_axes(shape, "is a choice of top_k").dims[axis]
        results.append(ValueAxes(tuple(dims), (False,) * len(dims)))
    return results


def window_axes(equation: AxesEquation) -> list[ValueAxes]:
    """Axes with a window of one position stay; others are frozen."""
    operand, params = equation.operands[0], equation.params
    strides = ("window_strides", "base_dilation", "window_dilation")
    dims, zeros = [], []
    for axis, size in enumerate(equation.shapes[0]):
        alone = params["window_dimensions"][axis] == 1
        alone = alone and all(params[name][axis] == 1 for name in strides)
        if alone and tuple(params["padding"][axis]) == (0, 0):
            dims.append(operand.axes.dims[axis])
            zeros.append(operand.axes.zeros[axis])
        else:
            freeze(operand.axes.dims[axis], _WINDOW)
            dims += new_axes((size,), _WINDOW).dims
            zeros.append(False)
    return [ValueAxes(tuple(dims), tuple(zeros))]
