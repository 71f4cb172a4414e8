"""What primitives that compute do to the dimensions of their axes.

Axes that are added, multiplied or compared must keep the same positions. An axis that
is summed over may lose a position only if one factor is zero there as soon as the
weights of that position are zero. A primitive that ranks, scans or takes the largest
freezes its axis. A primitive without a rule freezes the axes of its operands and
results.
"""

from collections.abc import Sequence

from jaxprune.graph import axis_moves
from jaxprune.graph.axis_dims import as_product, freeze, new_dim, unify
from jaxprune.graph.axis_moves import Axes, Operand, Params, Rule, Shapes, new_axes
from jaxprune.graph.program import GROUPED

# f(0) = 0.
_ZERO_STAYS = """
    neg sign floor ceil round abs sqrt cbrt square sin tan asin atan sinh asinh tanh
    atanh expm1 log1p erf real imag conj convert_element_type reduce_precision copy
    copy_p optimization_barrier stop_gradient device_put sharding_constraint reshard
    name
"""
_UNARY = """
    exp exp2 log log2 cos acos cosh acosh logistic rsqrt erfc erf_inv lgamma digamma
    is_finite not population_count clz one_minus_square
"""
# f(0) is not finite, and 0 times that is no number.
_NOT_FINITE = "log log2 rsqrt lgamma digamma acosh"
_ELEMENTWISE = """
    add add_any sub mul div max min rem pow atan2 nextafter eq ne lt le gt ge and or
    xor select_n clamp integer_pow
"""
_ALONG = "cumsum cumprod cummax cummin cumlogsumexp sort rev"
_REDUCTIONS = """
    reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or reduce_xor argmax
    argmin
"""
_WINDOWS = "reduce_window_sum reduce_window_max reduce_window_min"
_WINDOW = "is a window"


def apply(
    name: str, params: Params, operands: Sequence[Operand], shapes: Shapes
) -> list[Axes]:
    """The axes of a step's results; ties and freezes those of its operands.

    Args:
      name: the primitive.
      params: its parameters.
      operands: its operands, each with its axes.
      shapes: the shapes of its results.

    Returns:
      The axes of each result.
    """
    rule = RULES.get(name)
    if rule is not None:
        return rule(params, operands, shapes)
    return _not_understood(name, operands, shapes)


def _not_understood(
    name: str, operands: Sequence[Operand], shapes: Shapes
) -> list[Axes]:
    for operand in operands:
        for dim in operand.axes.dims:
            freeze(dim, f"is an operand of {name}, which is not understood")
    why = f"is an axis of the result of {name}, which is not understood"
    return [new_axes(shape, why) for shape in shapes]


def _summed(what: str) -> str:
    return f"{what} runs over it, of values that are not zero where it is removed"


def _elementwise(name: str) -> Rule:
    def rule(params: Params, operands: Sequence[Operand], shapes: Shapes) -> list[Axes]:
        shape = shapes[0]
        if any(len(o.shape) not in (0, len(shape)) for o in operands):
            return _not_understood(name, operands, shapes)
        dims, zeros = [], []
        for axis, size in enumerate(shape):
            # An axis of length one is repeated, and ties nothing.
            own = [o.axes.dims[axis] for o in operands if o.shape[axis:][:1] == (size,)]
            for other in own[1:]:
                unify(own[0], other)
            each = [_is_zero(operand, axis, size) for operand in operands]
            dims.append(own[0] if own else new_dim(size))
            zeros.append(_zero_of(name, params, each, operands))
            if own and _divides(name, params, each, operands):
                freeze(own[0], f"{name} divides by what is zero where it is removed")
        return [Axes(tuple(dims), tuple(zeros))]

    return rule


def _is_zero(operand: Operand, axis: int, size: int) -> bool:
    if operand.scalar is not None:
        return operand.scalar == 0
    return operand.shape[axis:][:1] == (size,) and operand.axes.zeros[axis]


def _zero_of(
    name: str, params: Params, zeros: Sequence[bool], operands: Sequence[Operand]
) -> bool:
    """Whether an elementwise result is zero, by which operands are."""
    if name in ("mul", "and"):
        return any(zeros)
    if name in ("add", "add_any", "sub", "max", "min"):
        return all(zeros)
    if name == "div":
        return zeros[0] and not zeros[1]
    if name == "select_n":
        return all(zeros[1:])
    if name == "integer_pow":
        return zeros[0] and params["y"] > 0
    if name == "pow":
        power = operands[1].scalar
        return zeros[0] and power is not None and power > 0
    if name == "clamp":
        low, high = operands[0].scalar, operands[2].scalar
        return zeros[1] and low is not None and high is not None and low <= 0 <= high
    return False


def _divides(
    name: str, params: Params, zeros: Sequence[bool], operands: Sequence[Operand]
) -> bool:
    """Whether an elementwise operation divides by a zero."""
    if name in ("div", "rem"):
        return zeros[1] and operands[1].scalar is None
    if name == "integer_pow":
        return zeros[0] and params["y"] < 0
    if name == "pow":
        power = operands[1].scalar
        return zeros[0] and (power is None or power < 0)
    return False


def _unary(name: str) -> Rule:
    stays, finite = name in _ZERO_STAYS.split(), name not in _NOT_FINITE.split()

    def rule(params: Params, operands: Sequence[Operand], shapes: Shapes) -> list[Axes]:
        for operand in operands:
            for dim, zero in zip(*operand.axes, strict=True):
                if zero and not finite:
                    freeze(dim, f"{name} runs over what is zero where it is removed")
        # `optimization_barrier` has several operands, each with its own result.
        return [
            Axes(o.axes.dims, tuple(stays and zero for zero in o.axes.zeros))
            for o in operands
        ]

    return rule


def _dot(params: Params, operands: Sequence[Operand], shapes: Shapes) -> list[Axes]:
    (contracted, batched), (one, two) = params["dimension_numbers"], operands
    for i, j in zip(*contracted, strict=True):
        unify(one.axes.dims[i], two.axes.dims[j])
        if not (one.axes.zeros[i] or two.axes.zeros[j]):
            freeze(one.axes.dims[i], _summed("a contraction"))
    dims, zeros = [], []
    for i, j in zip(*batched, strict=True):
        unify(one.axes.dims[i], two.axes.dims[j])
        dims.append(one.axes.dims[i])
        zeros.append(one.axes.zeros[i] or two.axes.zeros[j])
    for side, operand in enumerate((one, two)):
        for axis in range(len(operand.shape)):
            if axis not in (*contracted[side], *batched[side]):
                dims.append(operand.axes.dims[axis])
                zeros.append(operand.axes.zeros[axis])
    return [Axes(tuple(dims), tuple(zeros))]


def _grouped_dot(
    params: Params, operands: Sequence[Operand], shapes: Shapes
) -> list[Axes]:
    numbers = params["ragged_dot_dimension_numbers"]
    if numbers != GROUPED or params["group_offset"] is not None:
        return _not_understood("ragged_dot_general", operands, shapes)
    rows, weight, sizes = operands
    why = "the sizes of the groups say which matrix a row meets"
    for dim in (weight.axes.dims[0], sizes.axes.dims[0]):
        freeze(dim, why)
    freeze(rows.axes.dims[0], "lies group by group")
    one = axis_moves.picked(weight, (1, 2))  # every group's matrix is alike
    matrix = Operand(weight.shape[1:], one)
    return _dot({"dimension_numbers": (((1,), (0,)), ((), ()))}, (rows, matrix), shapes)


def _convolution(
    params: Params, operands: Sequence[Operand], shapes: Shapes
) -> list[Axes]:
    numbers, groups = params["dimension_numbers"], params["feature_group_count"]
    value, kernel = operands
    batch, feature, *space = numbers.lhs_spec
    out, own, *window = numbers.rhs_spec
    for operand, axes in ((value, space), (kernel, window)):
        for axis in axes:
            freeze(operand.axes.dims[axis], _WINDOW)
    inputs, outputs = value.axes.dims[feature], kernel.axes.dims[out]
    split = as_product(inputs, [groups, value.shape[feature] // groups])
    made = as_product(outputs, [groups, kernel.shape[out] // groups])
    if split is None or made is None or params["batch_group_count"] > 1:
        for dim in (inputs, outputs, kernel.axes.dims[own], value.axes.dims[batch]):
            freeze(dim, "is cut by the groups of a convolution")
    else:
        # A group of inputs meets its own outputs and no others.
        unify(split[0], made[0])
        unify(split[1], kernel.axes.dims[own])
        if not (value.axes.zeros[feature] or kernel.axes.zeros[own]):
            freeze(split[1], _summed("a convolution"))
    result = new_axes(shapes[0], _WINDOW)
    dims, zeros = list(result.dims), list(result.zeros)
    first, second, *_ = numbers.out_spec
    if params["batch_group_count"] == 1:
        dims[first] = value.axes.dims[batch]
        zeros[first] = value.axes.zeros[batch]
    dims[second], zeros[second] = outputs, kernel.axes.zeros[out]
    return [Axes(tuple(dims), tuple(zeros))]


def _reduction(name: str) -> Rule:
    def rule(params: Params, operands: Sequence[Operand], shapes: Shapes) -> list[Axes]:
        (operand,), axes = operands, tuple(params["axes"])
        for axis in axes:
            if name != "reduce_sum" or not operand.axes.zeros[axis]:
                what = "a sum" if name == "reduce_sum" else name
                freeze(operand.axes.dims[axis], _summed(what))
        left = [i for i in range(len(operand.shape)) if i not in axes]
        found = axis_moves.picked(operand, left)
        stays = name in ("reduce_sum", "reduce_max", "reduce_min", "reduce_prod")
        return [found if stays else Axes(found.dims, (False,) * len(left))]

    return rule


def _along(name: str) -> Rule:
    """What works along some axes and leaves the others to themselves."""

    def rule(params: Params, operands: Sequence[Operand], shapes: Shapes) -> list[Axes]:
        given = params.get("axis", params.get("dimension", params.get("dimensions")))
        first = operands[0].axes
        for operand in operands[1:]:
            for one, other in zip(first.dims, operand.axes.dims, strict=True):
                unify(one, other)
        for axis in given if isinstance(given, tuple | list) else (given,):
            freeze(first.dims[axis], f"{name} runs along it")
        # What is sorted by other keys, or e^0, is not zero where its operand is.
        stays = name != "cumlogsumexp" and len(operands) == 1
        zeros = tuple(stays and zero for zero in first.zeros)
        return [Axes(first.dims, zeros) for _ in shapes]

    return rule


def _top_k(params: Params, operands: Sequence[Operand], shapes: Shapes) -> list[Axes]:
    operand = operands[0]
    axis = params.get("axis", -1) % len(operand.shape)
    freeze(operand.axes.dims[axis], "top_k runs along it")
    found = []
    for shape in shapes:
        dims = list(operand.axes.dims)
        dims[axis] = new_axes(shape, "is a choice of top_k").dims[axis]
        found.append(Axes(tuple(dims), (False,) * len(dims)))
    return found


def _window(params: Params, operands: Sequence[Operand], shapes: Shapes) -> list[Axes]:
    operand, names = operands[0], ("window_strides", "base_dilation", "window_dilation")
    dims, zeros = [], []
    for axis, size in enumerate(shapes[0]):
        alone = params["window_dimensions"][axis] == 1
        alone = alone and all(params[name][axis] == 1 for name in names)
        if alone and tuple(params["padding"][axis]) == (0, 0):
            dims.append(operand.axes.dims[axis])
            zeros.append(operand.axes.zeros[axis])
        else:
            freeze(operand.axes.dims[axis], _WINDOW)
            dims += new_axes((size,), _WINDOW).dims
            zeros.append(False)
    return [Axes(tuple(dims), tuple(zeros))]


RULES: dict[str, Rule] = {
    **axis_moves.RULES,
    **{name: _unary(name) for name in (*_ZERO_STAYS.split(), *_UNARY.split())},
    **{name: _elementwise(name) for name in _ELEMENTWISE.split()},
    **{name: _along(name) for name in _ALONG.split()},
    **{name: _reduction(name) for name in _REDUCTIONS.split()},
    **{name: _window for name in _WINDOWS.split()},
    "conv_general_dilated": _convolution,
    "dot_general": _dot,
    "ragged_dot_general": _grouped_dot,
    "top_k": _top_k,
}
