"""A traced function in segments, compiled, with the parameters it runs with.

Over the devices of a mesh as many batches go through a segment at once, each whole on
one device. Of the parameters a segment's are whole on every device while batches go
through it.
"""

import collections
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.arrays.lazy import Leaves
from jaxprune.arrays.per_device import PerDevice
from jaxprune.graph import program as program_
from jaxprune.graph import segments
from jaxprune.graph.linear_ops import LinearOp, Trace
from jaxprune.graph.program import Subgraph
from jaxprune.graph.segments import Segment
from jaxprune.graph.weight_view import WeightView

Activations = dict[int, jax.Array]
"""Values that depend on the batch, by their numbers in the program."""


class SegmentedProgram:
    """The segments of a program, compiled, and the parameters they run with.

    Attributes:
      trace: what was traced.
      leaves: the parameters' leaves, in flattening order; replaced as weights change.
      ops: the linear ops whose inputs end segments.
      segments: in order.
      layers: the positions of each layer's segments.
      devices: those that take a batch each; None where a batch lies as it was given.
    """

    def __init__(
        self,
        trace: Trace,
        leaves: Leaves,
        ops: Sequence[LinearOp],
        *,
        devices: PerDevice | None = None,
    ) -> None:
        """Cuts the program at the inputs of some linear ops.

        Args:
          trace: what was traced.
          leaves: the parameters' leaves.
          ops: the linear ops whose inputs end segments.
          devices: devices that take a batch each, or None.
        """
        self.trace, self.leaves, self.ops = trace, leaves, list(ops)
        self.devices = devices
        self.segments = segments.cut_at_inputs(trace, ops)
        self.layers = segments.layer_ranges(self.segments)
        uses = collections.Counter(op.name for op in ops)
        self._tied = {name for name, number in uses.items() if number > 1}
        # By segment: an op of a later step may read an earlier input.
        self._last_step = {
            op.name: op.step for segment in self.segments for op in segment.linear_ops
        }
        self._leaf_of = {n: i for i, n in enumerate(trace.program.leaves)}
        self._tables: dict[int, jax.Array] = {}  # computed once
        self._compiled: dict[Any, Callable[..., list[jax.Array]]] = {}
        # Position of a leaf to the number of the last segment that uses it.
        self._last_use = {
            i: k
            for k, segment in enumerate(self.segments)
            for i in {op.view.leaf for op in segment.linear_ops}
            | self._read_by(segment.subgraph)
        }

    @property
    def used(self) -> dict[str, int]:
        """The leaves that any segment reads or prunes: name to position."""
        return {n: i for n, i in self.trace.leaves.items() if i in self._last_use}

    @property
    def programs(self) -> int:
        """How many different programs the segments have been compiled to."""
        return len(self._compiled)

    def last_used_in(self, number: int) -> list[int]:
        """The positions of the leaves whose last use is in the segment of a number."""
        return [i for i, last in self._last_use.items() if last == number]

    def release(self, number: int) -> None:
        """Frees what was read of lazy leaves whose last use is in a segment."""
        for i in self.last_used_in(number):
            self.leaves.forget(i)

    def finished_in(self, segment: Segment) -> list[LinearOp]:
        """The linear ops of a segment that are the last uses of their weights."""
        return [op for op in segment.linear_ops if self._last_step[op.name] == op.step]

    def groups(self, segment: Segment) -> list[tuple[str, ...]]:
        """The names of a segment's weights, those with the same statistics together.

        A tied weight is alone, since it has other inputs besides.
        """
        names = list(dict.fromkeys(op.name for op in segment.linear_ops))
        shared = tuple(name for name in names if name not in self._tied)
        groups = [shared] if shared else []
        return groups + [(name,) for name in names if name in self._tied]

    def constants(
        self, part: Subgraph, dense: Mapping[int, jax.Array] | None = None
    ) -> dict[int, Any]:
        """What steps need besides activations, by the number of the value.

        Leaves, slices of them and tables: the same for every batch. Those in `dense`
        are taken from there, as they were before they changed.
        """
        constants: dict[int, Any] = {}
        for number in part.inputs:
            if dense and number in dense:
                constants[number] = dense[number]
            elif number in self._leaf_of:
                leaf = self.leaves[self._leaf_of[number]]
                # NumPy's would go to the device anew with every batch.
                is_numpy = isinstance(leaf, np.ndarray)
                constants[number] = jnp.asarray(leaf) if is_numpy else leaf
            elif number in self.trace.views:
                view = self.trace.views[number]
                constants[number] = view.read(self.leaves[view.leaf])
            elif number not in self.trace.program.varying:
                constants[number] = self.table(number)
        # A segment's weights come together here, and are let go after it.
        return constants if self.devices is None else self.devices.everywhere(constants)

    def read_late(self, view: WeightView, after: int) -> dict[int, WeightView]:
        """Values that overlap a changed weight and that the dense model still reads.

        A linear op may run several segments after its input was computed: of parallel
        branches, the last one is computed together with the next layer.

        Args:
          view: the part of a leaf that is about to change.
          after: the number of the segment that the dense model has reached.

        Returns:
          Number of such a value, which a segment behind `after` reads, to its view.
        """
        parts = [segment.subgraph for segment in self.segments[after + 1 :]]
        views = {n: self.trace.views.get(n) for part in parts for n in part.inputs}
        return {n: v for n, v in views.items() if v and not v.is_apart(view)}

    def table(self, number: int) -> jax.Array:
        """A value that depends on neither parameters nor batch."""
        if number not in self._tables:
            self._tables[number] = program_.constant_value(self.trace.program, number)
        return self._tables[number]

    def run(
        self, segment: Segment, activations: Activations, constants: dict[int, Any]
    ) -> tuple[Any, Activations]:
        """Takes one batch through a segment: its input, what later segments need."""
        known = activations | self.compute(segment.subgraph, activations | constants)
        after = {n: x for n, x in known.items() if n in segment.later}
        return segment.source.of(known), after

    def compute(self, part: Subgraph, known: Mapping[int, Any]) -> Activations:
        """What is wanted of some steps; compiled once for equal ones."""
        stacked = [number in self.trace.program.varying for number in part.inputs]
        key = part.key, tuple(stacked)
        if key not in self._compiled:
            devices = self.devices
            self._compiled[key] = (
                jax.jit(part.run)
                if devices is None
                else devices.compiled(part.run, stacked)
            )
        results = self._compiled[key](*(known[n] for n in part.inputs))
        return dict(zip(part.outputs, results, strict=True))

    def _read_by(self, part: Subgraph) -> set[int]:
        """The positions of the leaves that some steps read."""
        views = self.trace.views  # whole leaves are views too
        return {views[number].leaf for number in part.inputs if number in views}
