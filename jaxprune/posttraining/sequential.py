"""Prunes the weights of a program segment by segment, each for the input it will see.

A method may ask for the inputs that its layer has while it is dense. Then the
statistics of all segments of a layer are taken first, and the segments are run once
more as they are pruned; activations are held once all the same.
"""

import ctypes
import dataclasses
import functools
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune.arrays import placement
from jaxprune.arrays.console_progress import Progress
from jaxprune.arrays.lazy import LazyArray
from jaxprune.graph import segments
from jaxprune.graph.linear_ops import LinearOp
from jaxprune.posttraining import solve_weight
from jaxprune.posttraining.input_statistics import InputStatistics, Sums
from jaxprune.posttraining.pipeline import SegmentedProgram, SequentialPipeline
from jaxprune.posttraining.plan import Plan
from jaxprune.posttraining.progress import ProgressLog


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
    ) -> None:
        """Begins before the first segment, and reads what the log holds already."""
        self._program, self._plan, self._log = program, plan, log
        sums = Sums(hessian=plan.method.needs == "hessian")
        self._count = len(program.segments)
        self._pipeline = SequentialPipeline(program, batches, positions, sums)
        # Weights and rows of the segments that were pruned before.
        self._done = [log.read(i) if log else None for i in range(self._count)]
        self._known = {name for done in self._done if done for name in done[0]}
        self._donate = donate
        leaves = enumerate(program.leaves.all)
        self._lazy = {i: leaf for i, leaf in leaves if isinstance(leaf, LazyArray)}
        self._owned = set(self._lazy)  # leaves that are no array of the caller's
        # Position of a leaf to the weights of it that the log holds.
        self._written: dict[int, list[tuple[int, LinearOp]]] = {}

    def run(self, *, progress: bool) -> list[dict[str, Any]]:
        """Prunes all segments; one row a weight."""
        parts = [range(i, i + 1) for i in range(self._count)]
        if self._plan.method.inputs == "dense":
            parts = segments.layers(self._program.segments)
        rows: list[dict[str, Any]] = []
        with Progress(self._count, "pruning", unit="segment", shown=progress) as shown:
            for numbers in parts:
                rows += self._prune_part(numbers, shown)
        return rows

    def _prune_part(self, numbers: range, shown: Progress) -> list[dict[str, Any]]:
        """Observes the inputs of some segments, then prunes all of them."""
        resumed = all(self._done[number] is not None for number in numbers)
        # Of what was pruned before, only the activations are needed again.
        observed = numbers[:1] if resumed else numbers
        values = self._pipeline.observe(observed, self._known)
        statistics = self._finished_statistics(observed)
        rows: list[dict[str, Any]] = []
        for number in numbers:
            segment, before = self._program.segments[number], len(rows)
            shown.note(segment.linear_ops[0].name)
            if number > numbers[0] and numbers[-1] + 1 < self._count:
                self._pipeline.advance(segment)
            if self._done[number] is not None:
                rows += self._restore(number)
            else:
                rows += self._prune_segment(number, statistics, values.pop(number))
            for row in rows[before:]:
                if row.get("by_magnitude"):
                    shown.say(_unreached(row))
            self._release(number)
            shown.update()
        return rows

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
            self._replace(op, arrays[op.name])
            self._written.setdefault(op.view.leaf, []).append((number, op))
        self._done[number] = None  # closes its file
        return rows

    def _prune_segment(
        self, number: int, statistics: dict[str, InputStatistics], value: jax.Array
    ) -> list[dict[str, Any]]:
        """Prunes the weights of a segment, and writes them to the log."""
        ops = self._program.finished_in(self._program.segments[number])
        # Statistics are freed with their segment, those of a whole layer one by one.
        found = [self._prune_weight(op, statistics.pop(op.name), value) for op in ops]
        rows = [row for _, row in found]
        if self._log:
            weights = jax.device_get([weight for weight, _ in found])
            names = [op.name for op in ops]
            self._log.write(number, dict(zip(names, weights, strict=True)), rows)
            for op in ops:
                self._written.setdefault(op.view.leaf, []).append((number, op))
        return rows

    def _prune_weight(
        self, op: LinearOp, statistics: InputStatistics, value: jax.Array
    ) -> tuple[jax.Array, dict[str, Any]]:
        """Solves for one weight, measures its error and puts it in its place."""
        started = time.perf_counter()
        leaf = self._program.leaves[op.view.leaf]
        before = placement.automatic(op.view.read, leaf)  # (batch, in, out)
        after, row = solve_weight.solve(self._plan, op, before, statistics)
        row["seconds"] = time.perf_counter() - started
        row["error"] = solve_weight.error(op.source, value, before, after)
        self._replace(op, after)
        return after, row

    def _replace(self, op: LinearOp, weight: Any) -> None:
        """Puts a pruned weight in its place in the leaf."""
        i = op.view.leaf
        leaf = self._program.leaves[i]
        spare = self._donate or i in self._owned
        self._program.leaves[i] = replaced(op, leaf, weight, donate=spare)
        if self._donate and isinstance(leaf, jax.Array) and not leaf.is_deleted():
            leaf.delete()
        self._owned.add(i)

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
    return (
        "pruned by magnitude, since the input was zero in all of the calibration: "
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


def replaced(op: LinearOp, leaf: Any, weight: Any, *, donate: bool) -> jax.Array:
    """The leaf, where it was, with another weight in the place of one of its own."""
    write = functools.partial(op.view.write, donate=donate)
    new = placement.automatic(write, leaf, jnp.asarray(weight))
    return jax.device_put(new, getattr(leaf, "sharding", None))


def _read_back(
    home: LazyArray, log: ProgressLog, written: Sequence[tuple[int, LinearOp]]
) -> jax.Array:
    """A lazy leaf with its pruned weights, from the log."""
    leaf = home.read()
    for number, op in written:
        leaf = replaced(op, leaf, log.weight(number, op.name), donate=True)
    return leaf
