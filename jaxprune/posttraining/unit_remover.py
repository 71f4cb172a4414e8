"""Removes units of trained groups, segment by segment, and makes up for them.

Groups are handled one after the other, in the order of the program. The consumer of a
group is the matrix that reads the group's units. Its inputs are summed up over the
batches, in the model that the groups before have left. The units whose removal changes
the consumer's outputs least are removed, and the consumer's other rows are updated.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxprune.arrays import placement
from jaxprune.arrays.rules import Rule, check
from jaxprune.graph.linear_ops import LinearOp
from jaxprune.posttraining import relative_error
from jaxprune.posttraining.pipeline.input_statistics import InputStatistics
from jaxprune.posttraining.pipeline.segment_job import Observed, SegmentJob
from jaxprune.posttraining.pipeline.segmented_program import SegmentedProgram
from jaxprune.posttraining.pipeline.sequential_pipeline import SequentialPipeline
from jaxprune.posttraining.pipeline.sums import Sums
from jaxprune.posttraining.pipeline.weight_store import WeightStore
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
        program: SegmentedProgram,
        consumers: Mapping[str, Consumer],
        lost: Mapping[str, int],
        batches: list[Any],
        positions: Sequence[jax.Array | None],
        *,
        damping: float,
        relative: bool,
    ) -> None:
        """Begins before the first segment.

        Args:
          program: the program, cut at the inputs of the consumers.
          consumers: group name to the matrix that its units go out by.
          lost: group name to the number of units that it loses.
          batches: the batches; the list is emptied.
          positions: booleans for each batch, which samples count, or None for all.
          damping: share of the Hessian's mean diagonal that is added to its diagonal.
          relative: whether each sample is divided by its root mean square first.
        """
        sums = Sums(hessian=True, relative=relative)
        super().__init__(SequentialPipeline(program, batches, positions, sums))
        self._lost, self._damping = lost, damping
        # Heads, and the query heads of each, go out by one weight, one after the other.
        self._groups: dict[str, list[tuple[str, np.ndarray]]] = {}
        for name, consumer in consumers.items():
            groups = self._groups.setdefault(consumer.op.name, [])
            groups.append((name, consumer.rows))
        self._store = WeightStore(program)
        self.kept: dict[str, np.ndarray] = {}
        self.rows: list[dict[str, Any]] = []

    def statistics(self, numbers: range) -> dict[str, InputStatistics]:
        """Those of the consumers at some inputs."""
        return self.pipeline.finished_statistics(numbers)

    def at_segment(self, number: int, inputs: Observed) -> None:
        """Removes the units that go out by the weights of a segment."""
        for op in self.pipeline.program.segments[number].linear_ops:
            moments = inputs.statistics[op.name]
            self.rows.append(self._solve(op, moments, inputs.values[number]))

    def _solve(
        self, op: LinearOp, statistics: InputStatistics, value: Any
    ) -> dict[str, Any]:
        """Removes the units that go out by one weight, and updates its other rows."""
        before = self._store.read(op.view)  # (1, in, out)
        finite = bool(np.isfinite(before).all())
        check(_FINITE, name=op.name, is_finite=finite)
        moments: Any = statistics.hessian  # (1, in, in)
        after, hessian, damping = before[0], moments[0], 0.0
        for name, rows in self._groups[op.name]:
            removal = placement.automatic(
                functools.partial(units.remove, damping=self._damping),
                after,
                hessian,
                rows,
                self._lost[name],
            )
            damping = max(damping, float(removal.damping))
            after = removal.weight
            self.kept[name] = np.flatnonzero(removal.kept)
            # For the next group, what is gone is as if it never saw anything.
            gone = np.delete(rows, self.kept[name], 0).reshape(-1)
            hessian = hessian.at[gone].set(0).at[:, gone].set(0)
        check(FACTORISED, name=op.name, damping=damping, also="")
        positions = self.pipeline.first_positions
        error = relative_error.weight_error(
            op.source, value, before, after[None], positions=positions
        )
        self._store.replace(op.view, after[None])
        return {
            "name": op.name,
            "groups": {name: self._lost[name] for name, _ in self._groups[op.name]},
            "shape": list(op.shape),
            "damping": damping,
            "error": error,
        }


_FINITE = [
    Rule(
        lambda v: v.is_finite,
        "the weights to update must be finite, but '{name}' holds NaN or infinity",
        "look for a damaged checkpoint",
    )
]
