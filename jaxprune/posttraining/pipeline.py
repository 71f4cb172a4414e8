"""All batches, side by side, through the segments of a program.

`SequentialPipeline` takes all batches to the next input and adds up its statistics.
Before it goes on, `sequential` may prune the weights that the input meets. So each
weight is seen with the input that it will really have, each activation is computed
once, and memory holds one segment's statistics and the activations that later segments
need.

Over the devices of a mesh as many batches go at once, each whole on one device. Of the
parameters a segment's are whole on every device while batches go through it.
"""

import collections
from collections.abc import Callable, Collection, Mapping, Sequence
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
from jaxprune.posttraining.input_statistics import Sums

Activations = dict[int, jax.Array]
"""Values that depend on the batch, by their numbers in the program."""


class SegmentedProgram:
    """The segments of a program, compiled, and the parameters they run with.

    Attributes:
      trace: what was traced.
      leaves: the parameters' leaves, in flattening order; replaced as weights change.
      segments: in order.
      layers: the positions of each layer's segments.
      blocks: what is done with each layer's weights, as `segments.block_subgraph`.
      devices: those that take a batch each; None where a batch lies as it was given.
    """

    def __init__(
        self,
        trace: Trace,
        leaves: Leaves,
        chosen: Sequence[LinearOp],
        *,
        outputs: bool = False,
        devices: PerDevice | None = None,
    ) -> None:
        """Cuts the program at the inputs of the chosen linear ops.

        With `outputs` the program's results are computed as well, by `blocks`.
        """
        self.trace = trace
        self.leaves = leaves
        self.devices = devices
        self.segments = segments.cut_at_inputs(trace, chosen, outputs=outputs)
        self.layers = segments.layer_ranges(self.segments)
        self.blocks: list[Subgraph] = []
        if outputs:
            self.blocks = [
                segments.block_subgraph(trace, self.segments, own)
                for own in self.layers
            ]
        uses = collections.Counter(op.name for op in chosen)
        self._tied = {name for name, number in uses.items() if number > 1}
        # By segment: an op of a later step may read an earlier input.
        self._last_step = {
            op.name: op.step for own in self.segments for op in own.linear_ops
        }
        self._leaf_of = {n: i for i, n in enumerate(trace.program.leaves)}
        self._tables: dict[int, jax.Array] = {}  # computed once
        self._compiled: dict[Any, Callable[..., list[jax.Array]]] = {}
        # Position of a leaf to the number of the last segment that uses it.
        self._last_use = {
            i: k
            for k, own in enumerate(self.segments)
            for i in {op.view.leaf for op in own.linear_ops}
            | self._read_by(own.subgraph)
        }
        for own in self.blocks[-1:]:  # its end is behind the last segment
            last = dict.fromkeys(self._read_by(own), len(self.segments) - 1)
            self._last_use |= last

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

    def start(self, batch: Any) -> Activations:
        """The activations before the first segment: the batch itself, or one each."""
        # On the one device of the parameters, where there is one: of a batch that is
        # nowhere in particular the first segments would be compiled to other programs
        # than those that follow.
        where = self.leaves.device
        if where is not None and self.devices is None:
            batch = jax.device_put(batch, where)
        return dict(zip(self.trace.program.batch, jax.tree.leaves(batch), strict=True))

    def constants(
        self, part: Subgraph, dense: Mapping[int, jax.Array] | None = None
    ) -> dict[int, Any]:
        """What steps need besides activations, by the number of the value.

        Leaves, slices of them and tables: the same for every batch. Those in `dense`
        are taken from there, as they were before they changed.
        """
        given: dict[int, Any] = {}
        for number in part.inputs:
            if dense and number in dense:
                given[number] = dense[number]
            elif number in self._leaf_of:
                leaf = self.leaves[self._leaf_of[number]]
                # NumPy's would go to the device anew with every batch.
                is_numpy = isinstance(leaf, np.ndarray)
                given[number] = jnp.asarray(leaf) if is_numpy else leaf
            elif number in self.trace.views:
                view = self.trace.views[number]
                given[number] = view.read(self.leaves[view.leaf])
            elif number not in self.trace.program.varying:
                given[number] = self.table(number)
        # A segment's weights come together here, and are let go after it.
        return given if self.devices is None else self.devices.everywhere(given)

    def read_late(
        self, view: WeightView, after: int, *, segments: bool
    ) -> dict[int, WeightView]:
        """Values that overlap a changed weight and that the dense model still reads.

        A linear op may run several segments after its input was computed: of parallel
        branches, the last one is computed together with the next layer.

        Args:
          view: the part of a leaf that is about to change.
          after: the number of the segment that the dense model has reached.
          segments: whether the dense model runs through segments as well as blocks.

        Returns:
          Number of such a value to its view. The readers are the segments behind
          `after`, and the blocks that begin at `after` or later.
        """
        begun = zip(self.blocks, self.layers, strict=False)
        parts = [own for own, numbers in begun if numbers.start >= after]
        if segments:
            parts += [own.subgraph for own in self.segments[after + 1 :]]
        views = {n: self.trace.views.get(n) for part in parts for n in part.inputs}
        return {n: own for n, own in views.items() if own and not own.is_apart(view)}

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
        own = [number in self.trace.program.varying for number in part.inputs]
        key = part.key, tuple(own)
        if key not in self._compiled:
            each = self.devices
            self._compiled[key] = (
                jax.jit(part.run) if each is None else each.compiled(part.run, own)
            )
        results = self._compiled[key](*(known[n] for n in part.inputs))
        return dict(zip(part.outputs, results, strict=True))

    def _read_by(self, part: Subgraph) -> set[int]:
        """The positions of the leaves that some steps read."""
        views = self.trace.views  # whole leaves are views too
        return {views[number].leaf for number in part.inputs if number in views}


class SequentialPipeline:
    """Takes all batches through the segments and sums up the segments' inputs.

    With a mesh, each item is a stack of one batch for each device, and the positions
    are stacked in the same way.

    Attributes:
      activations: for each batch, the activations that later segments need.
      dense: the same activations in the dense model, one segment ahead while weights
        are pruned. Empty where the dense model does not run beside the pruned one.
      before: the old values, by number, of weights that have changed and that the dense
        model still reads.
    """

    def __init__(
        self,
        program: SegmentedProgram,
        batches: Sequence[Any],
        positions: Sequence[jax.Array | None],
        sums: Sums,
        *,
        with_dense: bool = False,
    ) -> None:
        """Begins before the first segment; `positions` are booleans for each batch.

        With `with_dense` the dense model's inputs are compared with those that are
        left. Call `advance_dense` for the next segment before a segment's weights
        change.
        """
        self.program, self.sums = program, sums
        self._positions = positions
        self.activations = [program.start(batch) for batch in batches]
        self.dense = list(self.activations) if with_dense else []
        self.before: dict[int, jax.Array] = {}
        self._ahead = 0  # the segment that the dense model has come to
        self._dense_inputs: list[Any] = [None] * len(self.activations)
        if with_dense:
            self.advance_dense(0)

    def observe(
        self, numbers: range, known: Collection[str] = frozenset()
    ) -> dict[int, Any]:
        """Adds up some segments' inputs; the batches end at the first segment's input.

        The segments run with the current weights. Weights whose names are in `known`
        need no statistics. Returns, by segment number, what that segment's input is
        read from in the first batch.
        """
        program = self.program
        own = [program.segments[number] for number in numbers]
        constants = [program.constants(segment.subgraph) for segment in own]
        groups = [
            [names for names in program.groups(segment) if not {*names} & {*known}]
            for segment in own
        ]
        values: dict[int, Any] = {}
        for i, activations in enumerate(self.activations):
            for k, segment in enumerate(own):
                value, activations = program.run(segment, activations, constants[k])
                dense = self._dense_inputs[i]
                self.sums.add(segment, groups[k], value, self._positions[i], dense)
                if k == 0:
                    self.activations[i] = activations
                if i == 0:
                    values[numbers[k]] = value
            if len(own) > 1:
                # Or the host runs ahead, and the activations of many batches pile up.
                jax.block_until_ready(value)
        return values

    @property
    def first_positions(self) -> jax.Array | None:
        """Which samples of the first batch count, or batches, one a device."""
        return self._positions[0]

    def advance(self, segment: Segment) -> None:
        """Takes all batches to a segment's input, with the weights as they are."""
        constants = self.program.constants(segment.subgraph)
        for i, activations in enumerate(self.activations):
            _, self.activations[i] = self.program.run(segment, activations, constants)

    @property
    def dense_input(self) -> Any:
        """What the dense model's next input is read from, of the first batch."""
        return self._dense_inputs[0] if self.dense else None

    def advance_dense(self, number: int) -> None:
        """Takes the dense model to a segment's input; past the last it is dropped.

        Where no dense model runs beside the pruned one, only `number` is stored.
        """
        self._ahead = number
        if number == len(self.program.segments):
            self.dense, self._dense_inputs = [], [None] * len(self.activations)
        if self.dense:
            segment = self.program.segments[number]
            constants = self.program.constants(segment.subgraph, self.before)
            for i, own in enumerate(self.dense):
                value, self.dense[i] = self.program.run(segment, own, constants)
                self._dense_inputs[i] = value
        views = self.program.trace.views
        for known in [n for n in self.before if n not in self._late(views[n])]:
            del self.before[known]

    def keep(self, view: WeightView) -> None:
        """Keeps what the dense model needs still of a leaf, before a part changes."""
        for number, own in self._late(view).items():
            if number not in self.before:
                # A copy, since the leaf may be given up.
                value = own.read(self.program.leaves[own.leaf])
                self.before[number] = jnp.array(value)

    def _late(self, view: WeightView) -> dict[int, WeightView]:
        return self.program.read_late(view, self._ahead, segments=bool(self.dense))
