"""Every primitive that is understood, and what each interpretation does with it.

A row is a primitive; a column is an interpretation of a program. The rules of a column
stand in files of their own: `dims` in `axis_moves` and `axis_arithmetic`, `view` in
`view_rules`, `resize` in `resize_rules`, `product` in `operands`. A primitive that has
no row freezes what it touches. A new one is added here: mostly its rule of `dims`, one
of `view` where it only moves a leaf, one of `resize` where a parameter holds a size.
"""

from collections.abc import Mapping
from typing import NamedTuple

from jaxprune.graph.axis_arithmetic import (
    all_are_zero,
    along,
    any_is_zero,
    cases_are_zero,
    clamped_is_zero,
    convolution_axes,
    divisor_is_zero,
    dot_axes,
    elementwise,
    freeze_all_axes,
    grouped_dot_axes,
    integer_power_fails,
    integer_power_is_zero,
    power_fails,
    power_is_zero,
    quotient_is_zero,
    reduction,
    sum_axes,
    top_k_axes,
    unary,
    window_axes,
)
from jaxprune.graph.axis_moves import (
    DimsRule,
    broadcast_axes,
    concatenate_axes,
    dynamic_slice_axes,
    dynamic_update_slice_axes,
    gather_axes,
    pad_axes,
    reshape_axes,
    slice_axes,
    split_axes,
    squeeze_axes,
    stack_axes,
    tile_axes,
    transpose_axes,
    unstack_axes,
)
from jaxprune.graph.operands import (
    Product,
    convolution_operands,
    convolution_summed,
    dot_operands,
    dot_summed,
    grouped_dot_operands,
    grouped_dot_summed,
)
from jaxprune.graph.resize_rules import (
    ResizeRule,
    resize_convolution,
    resize_gather,
    resize_slice,
    resize_split,
    resize_tile,
    result_shape,
    same_sizes,
)
from jaxprune.graph.view_rules import (
    ViewRule,
    broadcast_view,
    cast_view,
    concatenate_views,
    divide_view,
    dynamic_slice_view,
    gather_view,
    no_view,
    reshape_view,
    reverse_view,
    same_views,
    scale_view,
    slice_view,
    split_view,
    squeeze_view,
    stack_views,
    transpose_view,
    unstack_view,
)


class Primitive(NamedTuple):
    """The rules of a primitive, one an interpretation; the defaults know nothing of it.

    Attributes:
      dims: rule that ties or freezes the dimensions of axes, and gives the results'.
      view: rule that says how a leaf is seen as the results.
      resize: rule that gives the parameters that change once units are removed.
      product: rules of the product of a weight and an activation; None if it is none.
      is_sum: whether it adds its operands: a residual stream goes on through it.
    """

    dims: DimsRule = freeze_all_axes
    view: ViewRule = no_view
    resize: ResizeRule = same_sizes
    product: Product | None = None
    is_sum: bool = False


def _same_rows(names: str, primitive: Primitive) -> dict[str, Primitive]:
    """The same row for several names."""
    return dict.fromkeys(names.split(), primitive)


PRIMITIVES: Mapping[str, Primitive] = {
    # Products: where a weight meets an activation.
    "dot_general": Primitive(dot_axes, product=Product(dot_operands, dot_summed)),
    "ragged_dot_general": Primitive(
        grouped_dot_axes, product=Product(grouped_dot_operands, grouped_dot_summed)
    ),
    "conv_general_dilated": Primitive(
        convolution_axes,
        resize=resize_convolution,
        product=Product(convolution_operands, convolution_summed),
    ),
    # Moves: dims                  view                 resize
    "reshape": Primitive(reshape_axes, reshape_view, result_shape("new_sizes")),
    "squeeze": Primitive(squeeze_axes, squeeze_view),
    "transpose": Primitive(transpose_axes, transpose_view),
    "rev": Primitive(along(), reverse_view),
    "broadcast_in_dim": Primitive(
        broadcast_axes, broadcast_view, result_shape("shape")
    ),
    "tile": Primitive(tile_axes, resize=resize_tile),
    "pad": Primitive(pad_axes),
    "slice": Primitive(slice_axes, slice_view, resize_slice),
    "dynamic_slice": Primitive(
        dynamic_slice_axes, dynamic_slice_view, result_shape("slice_sizes")
    ),
    "dynamic_update_slice": Primitive(dynamic_update_slice_axes),
    "gather": Primitive(gather_axes, gather_view, resize_gather),
    "split": Primitive(split_axes, split_view, resize_split),
    "unstack": Primitive(unstack_axes, unstack_view),
    "concatenate": Primitive(concatenate_axes, concatenate_views),
    "stack": Primitive(stack_axes, stack_views),
    # One operand: the same values (`name` is `checkpoint_name`, as Haliax has it around
    # each layer's slice), a cast, then functions f by what f(0) is.
    **_same_rows(
        "copy copy_p stop_gradient optimization_barrier sharding_constraint reshard "
        "device_put name",
        Primitive(unary(), same_views),
    ),
    "convert_element_type": Primitive(unary(), cast_view),
    "neg": Primitive(unary(), scale_view),
    **_same_rows(
        "sign floor ceil round abs sqrt cbrt square sin tan asin atan sinh asinh tanh "
        "atanh expm1 log1p erf real imag conj reduce_precision",
        Primitive(unary()),
    ),
    **_same_rows(
        "exp exp2 cos acos cosh logistic erfc erf_inv is_finite not population_count "
        "clz one_minus_square",
        Primitive(unary(zero_stays=False)),
    ),
    **_same_rows(
        "log log2 rsqrt lgamma digamma acosh",
        Primitive(unary(zero_stays=False, finite=False)),
    ),
    # Several operands of one shape, by when the result is zero, and when it fails.
    "mul": Primitive(elementwise(any_is_zero), scale_view),
    "and": Primitive(elementwise(any_is_zero)),
    **_same_rows("add add_any", Primitive(elementwise(all_are_zero), is_sum=True)),
    **_same_rows("sub max min", Primitive(elementwise(all_are_zero))),
    "div": Primitive(elementwise(quotient_is_zero, divisor_is_zero), divide_view),
    "rem": Primitive(elementwise(fails=divisor_is_zero)),
    "pow": Primitive(elementwise(power_is_zero, power_fails)),
    "integer_pow": Primitive(elementwise(integer_power_is_zero, integer_power_fails)),
    "select_n": Primitive(elementwise(cases_are_zero)),
    "clamp": Primitive(elementwise(clamped_is_zero)),
    **_same_rows("atan2 nextafter eq ne lt le gt ge or xor", Primitive(elementwise())),
    # Along some axes.
    "reduce_sum": Primitive(sum_axes),
    **_same_rows(
        "reduce_max reduce_min reduce_prod", Primitive(reduction(zero_stays=True))
    ),
    **_same_rows(
        "reduce_and reduce_or reduce_xor argmax argmin",
        Primitive(reduction(zero_stays=False)),
    ),
    **_same_rows("cumsum cumprod cummax cummin sort", Primitive(along())),
    "cumlogsumexp": Primitive(along(zero_stays=False)),  # e^0 is not zero
    "top_k": Primitive(top_k_axes),
    **_same_rows(
        "reduce_window_sum reduce_window_max reduce_window_min", Primitive(window_axes)
    ),
}

_UNKNOWN = Primitive()


def rules_of(name: str) -> Primitive:
    """The rules of a primitive; of one that is not understood, those that freeze."""
    return PRIMITIVES.get(name, _UNKNOWN)
