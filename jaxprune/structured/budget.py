"""What a model costs, in parameters, bytes or FLOPs, and how a budget is met.

FLOPs are two for each multiplication of a matmul or convolution in the traced program,
for a batch of the shape that was traced.
"""

import math
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

from jaxprune.graph.axis_trace import AxisTrace
from jaxprune.structured.cut import LeafCut
from jaxprune.structured.resized import Resized

Measure = Literal["parameters", "bytes", "flops"]


class OutOfReach(ValueError):
    """A budget that cannot be met by what may be removed."""


class Costs(NamedTuple):
    """What a model costs.

    Attributes:
      parameters: number of parameters.
      bytes: number of bytes that they take.
      flops: number of FLOPs of its matmuls and convolutions, for the traced batch.
    """

    parameters: int
    bytes: int
    flops: int


def costs(
    trace: AxisTrace, kept: Mapping[str, LeafCut], resized: Resized | None = None
) -> Costs:
    """What a model costs whose leaves are cut."""
    shapes = [(leaf, kept[leaf.name].after) for leaf in trace.leaves]
    # Leaves of other dtypes than the rest, as integers, count with their own bytes.
    sizes = [(math.prod(shape), leaf.dtype) for leaf, shape in shapes]
    return Costs(
        sum(size for size, _ in sizes),
        sum(size * dtype.itemsize for size, dtype in sizes),
        (resized or Resized(trace, {})).flops(),
    )


def share_within(
    cost: Callable[[float], float], most: float, shares: list[float]
) -> float | None:
    """The smallest of some shares that costs no more; None where none does.

    Args:
      cost: function of a share to the cost of a model that lost it; it falls.
      most: the budget.
      shares: shares of units, ascending.

    Returns:
      One of the shares, or None.
    """
    # Bisection: the answer is in shares[low:high + 1], or there is none.
    low, high = 0, len(shares)
    while low < high:
        middle = (low + high) // 2
        if cost(shares[middle]) <= most:
            high = middle
        else:
            low = middle + 1
    return shares[low] if low < len(shares) else None
