"""The costs of a model, in parameters, bytes or FLOPs.

FLOPs are two for each multiplication of a matmul or convolution in the traced program,
for a batch of the shape that was traced.
"""

import math
from collections.abc import Mapping
from typing import Literal, NamedTuple

from jaxprune.graph.axis_groups import AxisGroups
from jaxprune.graph.axis_trace import AxisTrace
from jaxprune.structured import cut
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
    """The costs of a model whose leaves are cut."""
    # Leaves of other dtypes than the rest, as integers, count with their own bytes.
    sizes = [(math.prod(kept[leaf.name].after), leaf.dtype) for leaf in trace.leaves]
    return Costs(
        sum(size for size, _ in sizes),
        sum(size * dtype.itemsize for size, dtype in sizes),
        (resized or Resized(trace, {})).flops(),
    )


def whole_costs(groups: AxisGroups) -> Costs:
    """The costs of the model before anything is removed."""
    return costs(groups.trace, cut.of_groups(groups, {}))
