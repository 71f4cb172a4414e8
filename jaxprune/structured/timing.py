"""How long a smaller program takes, measured beside the whole one.

The two run in turn in one process, so that whatever else the machine does falls on both
alike; what counts is the median over rounds of the quotient of neighbours.
"""

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune.arrays.lazy import LazyArray
from jaxprune.graph.axis_trace import AxisTrace
from jaxprune.structured.budget import Measure
from jaxprune.structured.cut import LeafCut
from jaxprune.structured.resized import Resized
from jaxprune.typing import Params

_ROUNDS = 7


def needed(
    measure: Measure, budget: float | None, trace: AxisTrace, params: Params, batch: Any
) -> "Timed | None":
    """What measures time, where a budget is one of time."""
    if budget is None or measure != "milliseconds":
        return None
    return Timed(trace, params, batch)


class Timed:
    """Times smaller programs beside the whole one.

    While it does, the whole parameters and a smaller copy are on the device.

    Attributes:
      milliseconds: medians of what was timed last, "before" and "after", to 1e-3.
    """

    def __init__(self, trace: AxisTrace, params: Params, batch: Any) -> None:
        """Keeps the program and what it is run with.

        Args:
          trace: the program.
          params: parameters of the program; lazy ones are read for each timing.
          batch: the batch that it is timed with; zeros where it is abstract.
        """
        self._trace = trace
        self._leaves = jax.tree.leaves(params)
        self._batch = [_on_device(leaf) for leaf in jax.tree.leaves(batch)]
        self._dense: Any = None  # compiled with the first smaller program
        self.milliseconds: dict[str, float] = {}

    def share(self, cuts: Mapping[str, LeafCut], resized: Resized) -> float:
        """The time of a smaller program as a share of that of the whole one.

        Args:
          cuts: leaf name to its cut.
          resized: the smaller program.

        Returns:
          The median over rounds.
        """
        leaves = [_on_device(leaf) for leaf in self._leaves]
        pairs = zip(self._trace.leaves, leaves, strict=True)
        small_leaves = [cuts[axes.name].take(leaf) for axes, leaf in pairs]
        if self._dense is None:
            self._dense = self._compiled(Resized(self._trace, {}), leaves)
        small = self._compiled(resized, small_leaves)
        times = [
            (self._seconds(self._dense, leaves), self._seconds(small, small_leaves))
            for _ in range(1 + _ROUNDS)
        ][1:]  # the first may wait for memory
        before, after = map(statistics.median, zip(*times, strict=True))  # seconds
        self.milliseconds = {
            "before": round(1e3 * before, 3),
            "after": round(1e3 * after, 3),
        }
        # Not the quotient of the medians: neighbours share what the machine does.
        return statistics.median(after / before for before, after in times)

    def _compiled(self, resized: Resized, leaves: Sequence[Any]) -> Any:
        return jax.jit(resized.run).lower(leaves, self._batch).compile()

    def _seconds(self, program: Any, leaves: Sequence[Any]) -> float:
        started = time.perf_counter()
        jax.block_until_ready(program(leaves, self._batch))
        return time.perf_counter() - started


def _on_device(leaf: Any) -> Any:
    """A leaf on the device."""
    if isinstance(leaf, LazyArray):
        return leaf.read()
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jnp.zeros(leaf.shape, leaf.dtype)
    return jnp.asarray(leaf)
