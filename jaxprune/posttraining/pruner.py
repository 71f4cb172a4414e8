"""Prunes the weights of a program segment by segment, each for the input it will see.

A pass may ask for the inputs that a layer has while the layer is still dense. Then the
statistics of all segments of the layer are taken first, and the segments run a second
time while they are pruned. Activations are still held only once.

With a correction, the dense model runs beside the pruned one, one segment ahead of it,
and activations are held twice.
"""

import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune.graph.linear_ops import LinearOp
from jaxprune.graph.weight_view import WeightView
from jaxprune.posttraining import relative_error, solve_weight
from jaxprune.posttraining.pipeline.input_statistics import InputStatistics
from jaxprune.posttraining.pipeline.segment_job import Observed, SegmentJob
from jaxprune.posttraining.pipeline.sequential_pipeline import SequentialPipeline
from jaxprune.posttraining.pipeline.weight_store import WeightStore
from jaxprune.posttraining.plan import Plan
from jaxprune.posttraining.progress import ProgressLog
from jaxprune.posttraining.refiner import Refiner


class Pruner(SegmentJob):
    """What a chain of passes does to the weights of each segment, and to each block.

    Attributes:
      rows: a row of the report for each weight.
      refined: a row of the report for each block, where blocks are refined.
    """

    def __init__(
        self,
        plan: Plan,
        pipeline: SequentialPipeline,
        log: ProgressLog | None,
        *,
        donate: bool,
    ) -> None:
        """Begins before the first segment, and reads what the log holds already.

        Args:
          plan: what is done to which weight.
          pipeline: all batches, with the sums that the chain needs; the leaves of its
            program are replaced.
          log: log of what is done, or None.
          donate: whether the caller's leaves are given up once they are replaced.
        """
        super().__init__(pipeline)
        chain, program = plan.chain, pipeline.program
        self.dense_layers = chain.pruning.inputs == "dense"
        self.rows: list[dict[str, Any]] = []
        self.refined: list[dict[str, Any]] = []
        self._plan, self._program, self._log = plan, program, log
        self._store = WeightStore(program, log, donate=donate)
        self._refiner: Refiner | None = None
        if chain.refinement is not None:
            self._refiner = Refiner(program, chain.refinement, pipeline.counted)
            self.by_block, self.passes = True, chain.refinement.passes
        # Weights and rows of the segments that were pruned before.
        count = len(program.segments)
        self._restored = [log.read(_segment(i)) if log else None for i in range(count)]
        done = {name for entry in self._restored if entry for name in entry[0]}
        # By weight, what a block that is refined is quantized by: a layer's at once.
        self._moments: dict[str, InputStatistics] = {}
        self._settles = self.by_block and chain.quantization is not None
        self._settles = self._settles and "hessian" in chain.observes
        if self._settles and log:
            # Of a block that is not done the statistics are needed once more.
            done -= {
                op.name
                for block, layer in enumerate(program.layers)
                if log.read(_block(block)) is None
                for number in layer
                for op in program.segments[number].linear_ops
            }
        self.done = done

    def is_done(self, numbers: range) -> bool:
        """Whether the log holds some segments, and nothing needs their statistics."""
        ops = [op for n in numbers for op in self._program.segments[n].linear_ops]
        # A tied weight whose last use is yet to come needs the statistics of this one.
        restored = all(self._restored[number] is not None for number in numbers)
        return restored and {*self.done}.issuperset(op.name for op in ops)

    def statistics(self, numbers: range) -> dict[str, InputStatistics]:
        """Those of the weights whose last use is in some segments."""
        return self.pipeline.finished_statistics(numbers, self.done)

    def at_segment(self, number: int, inputs: Observed) -> None:
        """Prunes the weights of a segment, or takes them from the log."""
        entry = self._restored[number]
        rows = self._prune(number, inputs) if entry is None else entry[1]
        if entry is not None:
            for op in self._finished_in(number):
                self._replace(op.view, entry[0][op.name])
                self._store.note_logged(op.view, _segment(number), op.name)
            self._restored[number] = None  # closes its file
        if entry is not None and self._settles:
            ops = self._finished_in(number)
            names = [op.name for op in ops if op.name in inputs.statistics]
            self._moments |= {name: inputs.statistics.pop(name) for name in names}
        for row in rows:
            if row.get("by_magnitude"):
                self.shown.say(_unreached(row))
        self.rows += rows

    def begin_block(self, block: int) -> None:
        """Takes the dense model through a block that is to be refined."""
        if self._refiner:
            pipeline = self.pipeline
            self._refiner.begin(
                block, pipeline.activations, pipeline.dense, pipeline.before
            )

    def end_block(self, block: int) -> None:
        """Refines a block that is pruned, or takes its values from the log."""
        refiner, layer = self._refiner, self._program.layers[block]
        if refiner is None:
            return
        name, values = _block(block), refiner.values[block]
        quantized = self._quantized_in(block)
        views = {
            **{str(value.number): value.view for value in values},
            **{f"levels of {op.name}": op.view for op in quantized},
        }
        entry = self._log.read(name) if self._log else None
        arrays: dict[str, Any]
        if entry is None:
            arrays, row = self._refine(refiner, block, quantized)
            if self._log:
                self._log.write(name, jax.device_get(arrays), row)
            self.shown.update(self.passes - (len(row["losses"]) - 1))
        else:
            arrays, row = entry
            pruned = {str(value.number): value.is_pruned for value in values}
            for key, array in arrays.items():
                self._replace(views[key], array, gives_up=pruned.get(key, True))
            self.shown.update(self.passes)
        self.refined.append(row)
        for key in arrays:
            self._store.note_logged(views[key], name, key)
        levels = {op.name: op for op in quantized}
        for row in self.rows:
            if op := levels.get(row["name"]):  # a small weight's level may be zero
                row["zeros"] = int(jnp.sum(self._read(op) == 0))
        self._moments.clear()
        self.pipeline.activations = refiner.end()
        if layer.stop < len(self._program.segments):
            for number in layer[1:]:
                self.pipeline.advance(self._program.segments[number])

    def release(self, number: int) -> None:
        """Frees lazy leaves; with a log, those that were pruned too."""
        self._store.release(number)

    def _refine(
        self, refiner: Refiner, block: int, quantized: Sequence[LinearOp]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Trains a block, then puts it on levels: new arrays by name, and its row."""
        started, values = time.perf_counter(), refiner.values[block]

        def tick(loss: float) -> None:
            self.shown.note(f"refining, loss {loss:.5f}")
            self.shown.update()

        trained, row = refiner.train(block, tick)
        arrays: dict[str, Any] = {}
        for value, array in zip(values, trained, strict=True):
            arrays[str(value.number)] = array
            self._replace(value.view, array, gives_up=value.is_pruned)
        for op in quantized:
            weight = self._on_levels(op)
            arrays[f"levels of {op.name}"] = weight
            self._replace(op.view, weight)
        if quantized:
            row["quantized"] = refiner.loss(block)
        layer = self._program.layers[block]
        segments = [self._program.segments[number] for number in layer]
        row |= {
            "weights": [op.name for part in segments for op in part.linear_ops],
            "leaves": sorted({value.leaf for value in values}),
            "seconds": time.perf_counter() - started,
        }
        return arrays, row

    def _quantized_in(self, block: int) -> list[LinearOp]:
        """The weights that are put on levels once their block is refined."""
        if self._plan.chain.quantization is None:
            return []
        layer = self._program.layers[block]
        return [op for number in layer for op in self._finished_in(number)]

    def _prune(self, number: int, inputs: Observed) -> list[dict[str, Any]]:
        """Prunes the weights of a segment, and writes them to the log."""
        ops, devices = self._finished_in(number), self._program.devices
        # All at once over devices; else one by one, so that the statistics of each are
        # freed: those of a segment come with it, those of a dense layer together.
        groups = [[op] for op in ops] if devices is None else [ops] if ops else []
        weights: dict[str, jax.Array] = {}
        rows: list[dict[str, Any]] = []
        for group in groups:
            after = self._prune_together(group, inputs, number)
            weights |= {op.name: weight for op, (weight, _) in after.items()}
            rows += [row for _, row in after.values()]
        if self._log:
            self._log.write(_segment(number), jax.device_get(weights), rows)
            for op in ops:
                self._store.note_logged(op.view, _segment(number), op.name)
        return rows

    def _prune_together(
        self, ops: Sequence[LinearOp], inputs: Observed, number: int
    ) -> dict[LinearOp, tuple[jax.Array, dict[str, Any]]]:
        """Solves for some weights, measures their errors and puts them in place."""
        started, devices = time.perf_counter(), self._program.devices
        before = {op: self._read(op) for op in ops}  # (batch, in, out)
        first = (
            inputs.values.get(number),
            inputs.dense,
            self.pipeline.first_positions,
        )
        if devices is not None:
            first = jax.tree.map(lambda x: x[0], devices.first(first, 1))
        moments = {op.name: inputs.statistics.pop(op.name) for op in ops}
        if self._settles:
            self._moments |= moments
        solved = solve_weight.solve_weights(self._plan, before, moments, devices)
        del moments
        seconds = (time.perf_counter() - started) / len(ops)
        value, dense, positions = first
        for op, (after, row) in zip(ops, solved, strict=True):
            row["seconds"] = seconds
            row["error"] = relative_error.weight_error(
                op.source, value, before[op], after, dense, positions
            )
            self._replace(op.view, after)
        return dict(zip(ops, solved, strict=True))

    def _read(self, op: LinearOp) -> jax.Array:
        """A weight as it is by now; with a mesh whole on every device."""
        weight, devices = self._store.read(op.view), self._program.devices
        return weight if devices is None else devices.everywhere(weight)

    def _on_levels(self, op: LinearOp) -> jax.Array:
        """A refined weight on its levels, by the statistics that it was pruned by."""
        weight, moments = self._read(op), self._moments.pop(op.name, None)
        devices = self._program.devices
        if devices is None:
            return solve_weight.settle_weight(self._plan, op, weight, moments)
        # As on one device; the Hessians of experts may lie one a device.
        local = devices.local((weight, devices.everywhere(moments)))
        return devices.everywhere(solve_weight.settle_weight(self._plan, op, *local))

    def _finished_in(self, number: int) -> list[LinearOp]:
        """The linear ops of a segment that are the last uses of their weights."""
        return self._program.finished_in(self._program.segments[number])

    def _replace(self, view: WeightView, weight: Any, *, gives_up: bool = True) -> None:
        """Puts a new weight in its place, and keeps what the dense model still reads.

        A vector is not given up: it may be the caller's zeros for several biases.
        """
        self.pipeline.keep(view)
        self._store.replace(view, weight, gives_up=gives_up)


def _segment(number: int) -> str:
    """The name of a segment's entry in the log."""
    return f"segment_{number:05d}"


def _block(number: int) -> str:
    """The name of a block's entry in the log."""
    return f"block_{number:05d}"


def _unreached(row: dict[str, Any]) -> str:
    """Says that a weight, or some matrices of it, were pruned by magnitude."""
    matrices, batch = row["by_magnitude"], row["shape"][0]
    some = "" if batch == 1 else f"{len(matrices)} of {batch} matrices of "
    numbers = "" if batch == 1 else f" ({', '.join(map(str, matrices))})"
    why = "the input was zero" if batch == 1 else "too few samples, or none, came to it"
    return (
        f"pruned by magnitude, since {why} in all of the calibration: "
        f"{some}'{row['name']}'{numbers}"
    )
