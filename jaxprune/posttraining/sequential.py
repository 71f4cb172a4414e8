"""Prunes the weights of a program segment by segment, each for the input it will see.

A method may ask for the inputs that a layer has while the layer is still dense. Then
the statistics of all segments of the layer are taken first, and the segments run a
second time while they are pruned. Activations are still held only once.

For a method with a correction, the dense model runs beside the pruned one, one segment
ahead of it, and activations are held twice.
"""

import ctypes
import dataclasses
import functools
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jaxprune.arrays import placement
from jaxprune.arrays.console_progress import Progress
from jaxprune.arrays.lazy import LazyArray
from jaxprune.arrays.per_device import PerDevice, put
from jaxprune.graph.linear_ops import LinearOp
from jaxprune.graph.weight_view import WeightView
from jaxprune.posttraining import methods, solve_weight
from jaxprune.posttraining.input_statistics import InputStatistics, Sums
from jaxprune.posttraining.pipeline import SegmentedProgram, SequentialPipeline
from jaxprune.posttraining.plan import Plan
from jaxprune.posttraining.progress import Part, ProgressLog
from jaxprune.posttraining.refine import Refine, Refiner


class Pruner:
    """A sequential pipeline whose weights are pruned on the way."""

    def __init__(
        self,
        program: SegmentedProgram,
        plan: Plan,
        batches: Sequence[Any],
        positions: Sequence[jax.Array | None],
        log: ProgressLog | None,
        *,
        donate: bool,
        refine: Refine | None,
    ) -> None:
        """Begins before the first segment, and reads what the log holds already."""
        self._program, self._plan, self._log = program, plan, log
        hessian = plan.method.needs == "hessian"
        relative = getattr(plan.method, "relative", False)
        devices = program.devices
        with_dense = methods.correction(plan.method) > 0
        sums = Sums(
            hessian=hessian, relative=relative, drift=with_dense, devices=devices
        )
        self._count = len(program.segments)
        self._pipeline = SequentialPipeline(
            program, batches, positions, sums, with_dense=with_dense
        )
        # Weights and rows of the segments that were pruned before.
        self._done = [log.read(i) if log else None for i in range(self._count)]
        self._known = {name for done in self._done if done for name in done[0]}
        self._donate = donate
        leaves = enumerate(program.leaves.all)
        self._lazy = {i: leaf for i, leaf in leaves if isinstance(leaf, LazyArray)}
        self._owned = set(self._lazy)  # leaves that are no array of the caller's
        # Position of a leaf to what of it the log holds, in the order of writing.
        self._written: dict[int, list[_Written]] = {}
        self._refiner = Refiner(program, refine, positions) if refine else None
        self.refined: list[dict[str, Any]] = []

    def run(self, *, progress: bool) -> list[dict[str, Any]]:
        """Prunes all segments; one row a weight, and in `refined` one a block."""
        layers = self._program.layers
        passes = self._refiner.refine.passes if self._refiner else 0
        total, unit = (
            self._count + len(layers) * passes,
            "step" if passes else "segment",
        )
        rows: list[dict[str, Any]] = []
        with Progress(total, "pruning", unit=unit, shown=progress) as shown:
            for block, layer in enumerate(layers):
                whole = self._plan.method.inputs == "dense"
                for numbers in [layer] if whole else [range(i, i + 1) for i in layer]:
                    rows += self._prune_part(numbers, block, shown)
                if self._refiner:
                    self._refine(self._refiner, block, shown)
                    for number in layer:
                        self._release(number)
        return rows

    def _prune_part(
        self, numbers: range, block: int, shown: Progress
    ) -> list[dict[str, Any]]:
        """Observes the inputs of some segments, then prunes all of them."""
        ops = [op for n in numbers for op in self._program.segments[n].linear_ops]
        # A tied weight whose last use is yet to come needs the statistics of this one.
        resumed = all(self._done[number] is not None for number in numbers)
        resumed = resumed and self._known.issuperset(op.name for op in ops)
        # Of what was pruned before, only the activations are needed again.
        observed = numbers[:1] if resumed else numbers
        values = self._pipeline.observe(observed, self._known)
        if self._refiner and numbers[0] == self._program.layers[block][0]:
            now = self._pipeline
            self._refiner.begin(block, now.activations, now.dense, now.before)
        statistics = self._finished_statistics(observed)
        dense = self._pipeline.dense_input
        # By the weights of these segments as they are still.
        self._pipeline.advance_dense(numbers[-1] + 1)
        rows: list[dict[str, Any]] = []
        for number in numbers:
            segment, before = self._program.segments[number], len(rows)
            shown.note(segment.linear_ops[0].name)
            if number > numbers[0] and numbers[-1] + 1 < self._count:
                self._pipeline.advance(segment)
            if self._done[number] is not None:
                rows += self._restore(number)
            else:
                rows += self._prune_segment(
                    number, statistics, values.pop(number), dense
                )
            for row in rows[before:]:
                if row.get("by_magnitude"):
                    shown.say(_unreached(row))
            if not self._refiner:  # which needs the leaves of the whole block again
                self._release(number)
            shown.update()
        return rows

    def _refine(self, refiner: Refiner, block: int, shown: Progress) -> None:
        """Refines a block that is pruned, or takes its values from the log."""
        started, passes = time.perf_counter(), refiner.refine.passes
        values, layer = refiner.values[block], self._program.layers[block]
        names = [str(value.number) for value in values]
        done = self._log.read(block, "block") if self._log else None

        def tick(loss: float) -> None:
            shown.note(f"refining, loss {loss:.5f}")
            shown.update()

        arrays: list[Any]
        if done is not None:
            arrays, row = [done[0][name] for name in names], done[1]
        else:
            arrays, row = refiner.train(block, tick)
            row |= {
                "weights": [
                    op.name
                    for k in layer
                    for op in self._program.segments[k].linear_ops
                ],
                "leaves": sorted({value.leaf for value in values}),
                "seconds": time.perf_counter() - started,
            }
            if self._log:
                wide = dict(zip(names, jax.device_get(arrays), strict=True))
                self._log.write(block, wide, row, "block")
        self.refined.append(row)
        shown.update(passes - (len(row["losses"]) - 1 if done is None else 0))
        for value, name, array in zip(values, names, arrays, strict=True):
            self._replace(value.view, array, gives_up=value.is_pruned)
            self._note_written(value.view, block, name, "block")
        self._pipeline.activations = refiner.end()
        if layer.stop < self._count:
            for number in layer[1:]:
                self._pipeline.advance(self._program.segments[number])

    def _finished_statistics(self, numbers: range) -> dict[str, InputStatistics]:
        """The statistics of the weights whose last use is in some segments."""
        found: dict[str, InputStatistics] = {}
        for number in numbers:
            segment = self._program.segments[number]
            last = {op.name for op in self._program.finished_in(segment)} - self._known
            for names in self._program.groups(segment):
                if not last.isdisjoint(names):
                    found |= self._pipeline.sums.finish(names)
        return found

    def _restore(self, number: int) -> list[dict[str, Any]]:
        """Puts the weights that the log holds of a segment in their places."""
        arrays, rows = self._done[number] or ({}, [])
        for op in self._program.finished_in(self._program.segments[number]):
            self._replace(op.view, arrays[op.name])
            self._note_written(op.view, number, op.name, "segment")
        self._done[number] = None  # closes its file
        return rows

    def _prune_segment(
        self,
        number: int,
        statistics: dict[str, InputStatistics],
        value: Any,
        dense: Any,
    ) -> list[dict[str, Any]]:
        """Prunes the weights of a segment, and writes them to the log."""
        ops = self._program.finished_in(self._program.segments[number])
        if self._program.devices is not None:
            found = self._prune_together(
                self._program.devices, ops, statistics, value, dense
            )
        else:
            # Statistics are freed with their segment, those of a layer one by one.
            found = [
                self._prune_weight(op, statistics.pop(op.name), value, dense)
                for op in ops
            ]
        rows = [row for _, row in found]
        if self._log:
            weights = jax.device_get([weight for weight, _ in found])
            names = [op.name for op in ops]
            self._log.write(number, dict(zip(names, weights, strict=True)), rows)
            for op in ops:
                self._note_written(op.view, number, op.name, "segment")
        return rows

    def _prune_weight(
        self, op: LinearOp, statistics: InputStatistics, value: Any, dense: Any
    ) -> tuple[jax.Array, dict[str, Any]]:
        """Solves for one weight, measures its error and puts it in its place."""
        started = time.perf_counter()
        leaf = self._program.leaves[op.view.leaf]
        before = placement.automatic(op.view.read, leaf)  # (batch, in, out)
        after, row = solve_weight.solve(self._plan, op, before, statistics)
        row["seconds"] = time.perf_counter() - started
        row["error"] = solve_weight.error(
            op.source, value, before, after, dense, self._pipeline.first_positions
        )
        self._replace(op.view, after)
        return after, row

    def _prune_together(
        self,
        devices: PerDevice,
        ops: Sequence[LinearOp],
        statistics: dict[str, InputStatistics],
        value: Any,
        dense: Any,
    ) -> list[tuple[jax.Array, dict[str, Any]]]:
        """Prunes all weights of a segment, each matrix on one device.

        Each weight gets what `_prune_weight` gives it.
        """
        started = time.perf_counter()
        before = {}  # (batch, in, out), whole on every device
        for op in ops:
            leaf = self._program.leaves[op.view.leaf]
            before[op] = devices.everywhere(placement.automatic(op.view.read, leaf))
        own = {op.name: statistics.pop(op.name) for op in ops}
        found = solve_weight.solve_together(self._plan, before, own, devices)
        seconds = time.perf_counter() - started
        read = value, dense, self._pipeline.first_positions
        read = jax.tree.map(lambda x: x[0], devices.first(read, 1))
        value, dense, positions = read
        for op, (after, row) in zip(ops, found, strict=True):
            row["seconds"] = seconds / len(ops)
            row["error"] = solve_weight.error(
                op.source, value, before[op], after, dense, positions
            )
            self._replace(op.view, after)
        return found

    def _replace(self, view: WeightView, weight: Any, *, gives_up: bool = True) -> None:
        """Puts a new weight in its place in the leaf.

        With `donate` the old leaf is given up, unless `gives_up` is False: a vector may
        be the caller's zeros for several biases.
        """
        i = view.leaf
        self._pipeline.keep(view)
        leaf = self._program.leaves[i]
        donate = self._donate and gives_up
        spare = donate or i in self._owned
        self._program.leaves[i] = replaced(view, leaf, weight, donate=spare)
        if donate and isinstance(leaf, jax.Array) and not leaf.is_deleted():
            leaf.delete()
        self._owned.add(i)

    def _note_written(
        self, view: WeightView, number: int, name: str, part: Part
    ) -> None:
        if self._log:
            found = self._written.setdefault(view.leaf, [])
            found.append(_Written(view, number, name, part))

    def _release(self, number: int) -> None:
        """Frees the lazy leaves whose last use is in a segment.

        With a log a pruned one is lazy again: read from its file, its weights from the
        log.
        """
        self._program.release(number)
        for i in self._program.last_used_in(number):
            home, written = self._lazy.get(i), self._written.get(i)
            if home and written and self._log:
                read = functools.partial(_read_back, home, self._log, written)
                self._program.leaves[i] = dataclasses.replace(home, read=read)
        _trim()


def _unreached(row: dict[str, Any]) -> str:
    """Says that a weight, or some matrices of it, were pruned by magnitude."""
    own, batch = row["by_magnitude"], row["shape"][0]
    some = "" if batch == 1 else f"{len(own)} of {batch} matrices of "
    numbers = "" if batch == 1 else f" ({', '.join(map(str, own))})"
    why = "the input was zero" if batch == 1 else "too few samples, or none, came to it"
    return (
        f"pruned by magnitude, since {why} in all of the calibration: "
        f"{some}'{row['name']}'{numbers}"
    )


def _trim() -> None:
    """Gives freed pages back to the system.

    glibc keeps the freed pages of each thread for later: 100 MB and more over a model
    whose layers are read one by one, which would count as memory that pruning needs.
    Other systems' allocators give them back by themselves, and have no such call.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:  # musl has none
            trim(0)


class _Written(NamedTuple):
    """A part of a leaf that the log holds: of which part of the job, under a name."""

    view: WeightView
    number: int
    name: str
    part: Part


def replaced(view: WeightView, leaf: Any, weight: Any, *, donate: bool) -> jax.Array:
    """The leaf with a new weight in the place of a view, and with its old sharding."""
    write = functools.partial(view.write, donate=donate)
    where = getattr(leaf, "sharding", None)
    if where is not None and not where.is_fully_addressable:
        # With other processes' devices nothing of one process alone may be combined.
        weight = put(weight, NamedSharding(where.mesh, PartitionSpec()))
    elif where is not None and len(where.device_set) == 1:
        weight = jax.device_put(weight, where)  # it may lie on all devices of a mesh
    new = placement.automatic(write, leaf, jnp.asarray(weight))
    return jax.device_put(new, getattr(leaf, "sharding", None))


def _read_back(
    home: LazyArray, log: ProgressLog, written: Sequence[_Written]
) -> jax.Array:
    """A lazy leaf with its new weights, from the log."""
    leaf = home.read()
    for own in written:
        weight = log.weight(own.number, own.name, own.part)
        leaf = replaced(own.view, leaf, weight, donate=True)
    return leaf
