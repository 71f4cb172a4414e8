"""Removes units of trained groups, segment by segment, and makes up for them.

Groups are handled one after the other, in the order of the program. The consumer of a
group is the matrix that reads the group's units. Its inputs are summed up over the
batches, in the model that the groups before have left. The units whose removal changes
the consumer's outputs least are removed, and the consumer's other rows are updated.
"""

import functools
import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxprune.arrays import placement
from jaxprune.arrays.rules import Rule, check
from jaxprune.graph.linear_ops import LinearOp
from jaxprune.posttraining import relative_error
from jaxprune.posttraining.pipeline.input_statistics import InputStatistics
from jaxprune.posttraining.pipeline.segment_job import Observed, SegmentJob
from jaxprune.posttraining.pipeline.sequential_pipeline import SequentialPipeline
from jaxprune.posttraining.pipeline.weight_store import WeightStore
from jaxprune.posttraining.progress import ProgressLog
from jaxprune.posttraining.solve_weight import FACTORISED
from jaxprune.posttraining.solvers import units
from jaxprune.posttraining.unit_rows import Consumer


class UnitRemover(SegmentJob):
    """The weights of the groups' consumers on the way to their smaller values.

    Attributes:
      kept: group name to the units that are kept, of groups that were handled.
      rows: a row of the report for each updated weight.
    """

    def __init__(
        self,
        consumers: Mapping[str, Consumer],
        lost: Mapping[str, int],
        pipeline: SequentialPipeline,
        log: ProgressLog | None,
        *,
        damping: float,
    ) -> None:
        """Begins before the first segment, and reads what the log holds already.

        Args:
          consumers: group name to the matrix that its units go out by.
          lost: group name to the number of units that it loses.
          pipeline: all batches, whose sums have Hessians, before a program that is cut
            at the inputs of the consumers.
          log: log of what is done, or None.
          damping: share of the Hessian's mean diagonal that is added to its diagonal.
        """
        super().__init__(pipeline)
        self._lost, self._damping, self._log = lost, damping, log
        # Heads, and the query heads of each, go out by one weight, one after the other.
        self._groups: dict[str, list[tuple[str, np.ndarray]]] = {}
        for name, consumer in consumers.items():
            groups = self._groups.setdefault(consumer.op.name, [])
            groups.append((name, consumer.rows))
        program = pipeline.program
        self._store = WeightStore(program, log)
        self.kept: dict[str, np.ndarray] = {}
        self.rows: list[dict[str, Any]] = []
        names = [op.name for part in program.segments for op in part.linear_ops]
        self._restored = {n: log.read(_entry(n)) if log else None for n in names}
        self.done = {name for name, entry in self._restored.items() if entry}

    def is_done(self, numbers: range) -> bool:
        """Whether the log holds all weights of some segments."""
        segments = [self.pipeline.program.segments[number] for number in numbers]
        ops = [op for segment in segments for op in segment.linear_ops]
        return {*self.done}.issuperset(op.name for op in ops)

    def statistics(self, numbers: range) -> dict[str, InputStatistics]:
        """Those of the consumers at some inputs."""
        return self.pipeline.finished_statistics(numbers, self.done)

    def at_segment(self, number: int, inputs: Observed) -> None:
        """Removes the units that go out by the weights of a segment."""
        for op in self.pipeline.program.segments[number].linear_ops:
            entry = self._restored.pop(op.name)
            if entry is None:
                moments = inputs.statistics[op.name]
                arrays, row = self._solve(op, moments, inputs.values[number])
                if self._log:
                    self._log.write(_entry(op.name), jax.device_get(arrays), row)
            else:
                arrays, row = entry
            for name, _ in self._groups[op.name]:
                self.kept[name] = np.array(arrays[f"kept of {name}"])
            self._store.replace(op.view, arrays["weight"])
            self._store.note_logged(op.view, _entry(op.name), "weight")
            self.rows.append(row)

    def release(self, number: int) -> None:
        """Frees lazy leaves; with a log, those that were updated too."""
        self._store.release(number)

    def _solve(
        self, op: LinearOp, statistics: InputStatistics, value: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The weight without units and what groups keep, by name, and a row."""
        before = self._store.read(op.view)  # (1, in, out)
        finite = bool(np.isfinite(before).all())
        check(_FINITE, name=op.name, is_finite=finite)
        # Inside an Explicit mesh even a slice must be taken on its Auto twin.
        after, kept, damping = placement.automatic(
            functools.partial(self._without_units, op.name), before, statistics.hessian
        )
        check(FACTORISED, name=op.name, damping=damping, also="")
        positions = self.pipeline.first_positions
        error = relative_error.weight_error(
            op.source, value, before, after, positions=positions
        )
        arrays: dict[str, Any] = {f"kept of {name}": kept[name] for name in kept}
        arrays["weight"] = after
        row = {
            "name": op.name,
            "groups": {name: self._lost[name] for name, _ in self._groups[op.name]},
            "shape": list(op.shape),
            "damping": damping,
            "error": error,
        }
        return arrays, row

    def _without_units(
        self, name: str, before: jax.Array, moments: Any
    ) -> tuple[jax.Array, dict[str, np.ndarray], float]:
        """A weight (1, in, out) after the units of all its groups went, one by one."""
        after, hessian, damping = before[0], moments[0], 0.0
        kept: dict[str, np.ndarray] = {}
        for group, rows in self._groups[name]:
            removal = units.remove(
                after, hessian, rows, self._lost[group], damping=self._damping
            )
            damping = max(damping, float(removal.damping))
            after = removal.weight
            kept[group] = np.flatnonzero(removal.kept)
            # For the next group, what is gone is as if it never saw anything.
            gone = np.delete(rows, kept[group], 0).reshape(-1)
            hessian = hessian.at[gone].set(0).at[:, gone].set(0)
        return after[None], kept, damping


def _entry(name: str) -> str:
    """The name of a weight's entry in the log, which names files."""
    return "weight_" + hashlib.sha256(name.encode()).hexdigest()[:16]


_FINITE = [
    Rule(
        lambda v: v.is_finite,
        "the weights to update must be finite, but '{name}' holds NaN or infinity",
        "look for a damaged checkpoint",
    )
]
