"""The one loop over a program's segments: what is observed, and what is done there.

`SegmentJob.run` takes all batches from input to input. `jp.calibrate` runs it as it is;
pruning, refining and the removal of units say what happens to the weights on the way.
"""

from collections.abc import Collection
from typing import Any, NamedTuple

from jaxprune.arrays.console_progress import Progress
from jaxprune.posttraining.pipeline.input_statistics import InputStatistics
from jaxprune.posttraining.pipeline.sequential_pipeline import SequentialPipeline


class Observed(NamedTuple):
    """What is known of the inputs of some segments, before their weights change.

    Attributes:
      statistics: name of the weight to the statistics of its input, of weights whose
        last use is in these segments.
      values: segment number to what its input is read from, in the first batch.
      dense: what the dense model's input is read from in the first batch, or None.
    """

    statistics: dict[str, InputStatistics]
    values: dict[int, Any]
    dense: Any


class SegmentJob:
    """What is done as batches go from input to input; as it stands, nothing.

    Attributes:
      pipeline: all batches.
      dense_layers: whether the inputs of a layer are observed while all of it is dense.
        A batch goes through all segments of the layer then, and the segments run again
        while their weights change.
      by_block: whether `end_block` is called, which needs a block's leaves until then.
      passes: number of passes of `end_block`, for the progress.
      done: names of weights that need no statistics.
      shown: how far the job is.
    """

    dense_layers: bool = False
    by_block: bool = False
    passes: int = 0
    done: Collection[str] = frozenset()
    shown: Progress

    def __init__(self, pipeline: SequentialPipeline) -> None:
        """Begins before the first segment."""
        self.pipeline = pipeline

    def run(self, title: str, *, progress: bool) -> None:
        """Takes all batches through all segments.

        Args:
          title: name of the job, such as "pruning".
          progress: whether to show how far it is.
        """
        program = self.pipeline.program
        total = len(program.segments) + len(program.layers) * self.passes
        unit = "step" if self.passes else "segment"
        with Progress(total, title, unit=unit, shown=progress) as self.shown:
            self.pipeline.advance_dense(0)
            for block, layer in enumerate(program.layers):
                # Once a layer, or once a segment.
                parts = [range(i, i + 1) for i in layer]
                for numbers in [layer] if self.dense_layers else parts:
                    self._run_part(numbers, block)
                if self.by_block:
                    self.end_block(block)
                    for number in layer:
                        self.release(number)

    def _run_part(self, numbers: range, block: int) -> None:
        """Observes the inputs of some segments, then changes the weights of all."""
        pipeline, program = self.pipeline, self.pipeline.program
        # Of what was done before, only the activations are needed again.
        observed = numbers[:1] if self.is_done(numbers) else numbers
        values = pipeline.observe(observed, self.done)
        if numbers[0] == program.layers[block][0]:
            self.begin_block(block)
        # Before any weight changes: the statistics are of the weights as they are.
        inputs = Observed(self.statistics(observed), values, pipeline.dense_input)
        # By the weights of these segments as they are still.
        pipeline.advance_dense(numbers[-1] + 1)
        for number in numbers:
            segment = program.segments[number]
            self.shown.note(segment.linear_ops[0].name)
            if number > numbers[0] and numbers[-1] + 1 < len(program.segments):
                pipeline.advance(segment)
            self.at_segment(number, inputs)
            if not self.by_block:
                self.release(number)
            self.shown.update()

    def is_done(self, numbers: range) -> bool:
        """Whether all weights of some segments were done in an earlier run."""
        return False

    def begin_block(self, block: int) -> None:
        """Called at the first input of a layer, before its weights change."""

    def statistics(self, numbers: range) -> dict[str, InputStatistics]:
        """The statistics that are finished with some segments; none are by default."""
        return {}

    def at_segment(self, number: int, inputs: Observed) -> None:
        """Called when all batches are at a segment's input, to change its weights."""

    def end_block(self, block: int) -> None:
        """Called behind the last segment of a layer, where `by_block` is set."""

    def release(self, number: int) -> None:
        """Frees what was read of lazy leaves whose last use is in a segment."""
        self.pipeline.program.release(number)
