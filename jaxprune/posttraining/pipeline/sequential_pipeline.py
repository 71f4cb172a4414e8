"""All batches, side by side, through the segments of a program.

`SequentialPipeline` takes all batches to the next input and adds up its statistics.
Before it goes on, `through_segments` lets the weights that the input meets change. So
each weight is seen with the input that it will really have, each activation is computed
once, and memory holds one segment's statistics and the activations that later segments
need.
"""

import itertools
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune.graph.segments import Segment
from jaxprune.graph.weight_view import WeightView
from jaxprune.posttraining.pipeline import input_statistics
from jaxprune.posttraining.pipeline.input_statistics import InputStatistics
from jaxprune.posttraining.pipeline.segmented_program import (
    Activations,
    SegmentedProgram,
)
from jaxprune.posttraining.pipeline.sums import Sums


class SequentialPipeline:
    """Takes all batches through the segments and sums up the segments' inputs.

    With a mesh, each item is a stack of one batch for each device.

    Attributes:
      counted: booleans of the samples' shape for each batch, which samples count, or
        None for all.
      activations: for each batch, the activations that later segments need.
      dense: the same activations in the dense model, one segment ahead while weights
        are pruned. Empty where the dense model does not run beside the pruned one.
      before: the old values, by number, of weights that have changed and that the dense
        model still reads.
    """

    def __init__(
        self,
        program: SegmentedProgram,
        batches: list[Any],
        positions: Callable[[Any], jax.Array] | None,
        sums: Sums,
    ) -> None:
        """Begins before the first segment.

        Args:
          program: the segments.
          batches: the batches; the list is emptied, and each batch freed after its
            first segment.
          positions: function of a batch to booleans of the samples' shape, which
            samples count; None counts all.
          sums: sums of the inputs. Where they have a drift, the dense model runs beside
            the pruned one: call `advance_dense` for the first segment before any runs,
            and for the next one before a segment's weights change.

        Raises:
          ValueError: positions do not have the shape of some input's samples.
          TypeError: they are no booleans.
        """
        self.program, self.sums = program, sums
        self.counted = [positions and positions(batch) for batch in batches]
        for segment, mask in itertools.product(program.segments, self.counted):
            input_statistics.sample_weights(segment, mask)
        devices = program.devices
        stacks, self._positions = list(batches), list(self.counted)
        batches.clear()
        if devices is not None:
            stacks = devices.in_turn(stacks)
            self._positions = devices.in_turn(self.counted)
        elif program.leaves.device is not None:
            # On the one device of the parameters: of a batch that is nowhere in
            # particular the first segments would be compiled to other programs than
            # those that follow.
            stacks = jax.device_put(stacks, program.leaves.device)
        self.activations: list[Activations] = [
            dict(zip(program.trace.program.batch, jax.tree.leaves(batch), strict=True))
            for batch in stacks
        ]
        self.dense = list(self.activations) if sums.drift else []
        self.before: dict[int, jax.Array] = {}
        self._ahead = 0  # the segment that the dense model has come to
        self._dense_inputs: list[Any] = [None] * len(self.activations)

    def observe(
        self, numbers: range, done: Collection[str] = frozenset()
    ) -> dict[int, Any]:
        """Adds up some segments' inputs; the batches end at the first segment's input.

        The segments run with the current weights.

        Args:
          numbers: numbers of the segments.
          done: names of weights that need no statistics.

        Returns:
          By segment number, what that segment's input is read from in the first batch.
        """
        program = self.program
        segments = [program.segments[number] for number in numbers]
        constants = [program.constants(segment.subgraph) for segment in segments]
        groups = [
            [names for names in program.groups(segment) if not {*names} & {*done}]
            for segment in segments
        ]
        values: dict[int, Any] = {}
        for i, activations in enumerate(self.activations):
            for k, segment in enumerate(segments):
                value, activations = program.run(segment, activations, constants[k])
                dense = self._dense_inputs[i]
                self.sums.add(segment, groups[k], value, self._positions[i], dense)
                if k == 0:
                    self.activations[i] = activations
                if i == 0:
                    values[numbers[k]] = value
            if len(segments) > 1:
                # Or the host runs ahead, and the activations of many batches pile up.
                jax.block_until_ready(value)
        return values

    def finished_statistics(
        self, numbers: range, done: Collection[str] = frozenset()
    ) -> dict[str, InputStatistics]:
        """The statistics of the weights whose last use is in some segments, by name.

        Their sums are freed.

        Args:
          numbers: numbers of the segments, which were observed.
          done: names of weights that were observed without statistics.
        """
        statistics: dict[str, InputStatistics] = {}
        for number in numbers:
            segment = self.program.segments[number]
            last = {op.name for op in self.program.finished_in(segment)} - {*done}
            for names in self.program.groups(segment):
                if not last.isdisjoint(names):
                    statistics |= self.sums.finish(names)
        return statistics

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
            for i, activations in enumerate(self.dense):
                value, self.dense[i] = self.program.run(segment, activations, constants)
                self._dense_inputs[i] = value
        views = self.program.trace.views
        for number in [n for n in self.before if n not in self._late(views[n])]:
            del self.before[number]

    def keep(self, view: WeightView) -> None:
        """Keeps what the dense model needs still of a leaf, before a part changes."""
        for number, late in self._late(view).items():
            if number not in self.before:
                # A copy, since the leaf may be given up.
                value = late.read(self.program.leaves[late.leaf])
                self.before[number] = jnp.array(value)

    def _late(self, view: WeightView) -> dict[int, WeightView]:
        return self.program.read_late(view, self._ahead) if self.dense else {}
