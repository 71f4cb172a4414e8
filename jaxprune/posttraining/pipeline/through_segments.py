"""The one loop over a program's segments, on which their weights change.

`jp.calibrate` runs it as it is; pruning and the removal of units change the weights of
each segment that it comes to.
"""

from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

from jaxprune.arrays.console_progress import Progress
from jaxprune.posttraining.pipeline.input_statistics import InputStatistics
from jaxprune.posttraining.pipeline.sequential_pipeline import SequentialPipeline


class Observed(NamedTuple):
    """What is known of the inputs of some segments, before their weights change.

    Attributes:
      statistics: name of the weight to the statistics of its input, of weights whose
        last use is in these segments. Whoever takes one out frees it.
      values: segment number to what its input is read from, in the first batch.
      dense: what the dense model's input is read from in the first batch, or None.
    """

    statistics: dict[str, InputStatistics]
    values: dict[int, Any]
    dense: Any


def through_segments(
    pipeline: SequentialPipeline,
    shown: Progress,
    done: Collection[str] = (),
    *,
    dense_layers: bool = False,
) -> Iterator[tuple[int, Observed]]:
    """Takes all batches from input to input, and stops at each segment.

    Args:
      pipeline: all batches, before the first segment.
      shown: how far the job is.
      done: names of weights that need no statistics.
      dense_layers: whether the inputs of a layer are observed while all of it is dense.
        A batch goes through all segments of the layer then, and the segments run again
        while their weights change.

    Yields:
      The number of each segment and what was observed, once all batches are at its
      input; what the caller changes of its weights, the next segments run with.
    """
    program = pipeline.program
    pipeline.advance_dense(0)
    for layer in program.layers:
        for numbers in [layer] if dense_layers else [range(i, i + 1) for i in layer]:
            ops = [op for n in numbers for op in program.segments[n].linear_ops]
            # Of what was done before, only the activations are needed again.
            is_done = {*done}.issuperset(op.name for op in ops)
            observed = numbers[:1] if is_done else numbers
            values = pipeline.observe(observed, done)
            # Before any weight changes: the statistics are of the weights as they are.
            statistics = pipeline.finished_statistics(observed, done)
            inputs = Observed(statistics, values, pipeline.dense_input)
            pipeline.advance_dense(numbers[-1] + 1)
            for number in numbers:
                shown.note(program.segments[number].linear_ops[0].name)
                if number > numbers[0] and numbers[-1] + 1 < len(program.segments):
                    pipeline.advance(program.segments[number])
                yield number, inputs
                shown.update()
