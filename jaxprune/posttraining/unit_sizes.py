"""Each group of a model at several numbers of units, solved once and kept on disk.

`jp.shrink` solves one number of units of each group. A search over numbers asks for
many; here each matrix that units go out by is solved at all of them in one sweep
(`solvers.unit_ladder.remove_to_sizes`), one segment after the other. What later
segments see is the model at one of the sizes, the same for all searches.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaxprune.arrays import placement
from jaxprune.arrays.lazy import Leaves
from jaxprune.arrays.rules import Rule, check
from jaxprune.graph.axis_groups import AxisGroups
from jaxprune.graph.linear_ops import LinearOp, trace
from jaxprune.posttraining import fingerprint, unit_rows
from jaxprune.posttraining.pipeline import preparation
from jaxprune.posttraining.pipeline.input_statistics import InputStatistics
from jaxprune.posttraining.pipeline.segmented_program import SegmentedProgram
from jaxprune.posttraining.pipeline.sequential_pipeline import SequentialPipeline
from jaxprune.posttraining.pipeline.sums import Sums
from jaxprune.posttraining.progress import ProgressLog
from jaxprune.posttraining.solve_weight import FACTORISED
from jaxprune.posttraining.solvers import unit_ladder
from jaxprune.posttraining.unit_remover import UnitRemover
from jaxprune.posttraining.unit_rows import Consumer


class SolvedSizes(NamedTuple):
    """A group at several numbers of units.

    Attributes:
      leaf: name of the leaf that the units go out by.
      sizes: numbers of units, ascending; the last is all of them.
      errors: relative squared error of that leaf's outputs at each size.
      read: function of a size to the leaf's matrix (in, out) float32, with zeros in the
        rows of units that are gone.
    """

    leaf: str
    sizes: tuple[int, ...]
    errors: tuple[float, ...]
    read: Callable[[int], Float[np.ndarray, "in out"]]


def solve_sizes(
    fn: Callable[[Any, Any], Any],
    params: Any,
    batches: Iterable[Any],
    groups: AxisGroups,
    sizes: Mapping[str, Sequence[int]],
    start: Mapping[str, int],
    *,
    directory: Path,
    damping: float = 0.01,
) -> dict[str, SolvedSizes]:
    """Solves groups at several numbers of units each.

    Args:
      fn: function of parameters and a batch.
      params: parameters of the function.
      batches: batches that the inputs are summed up over, all of one shape.
      groups: axis groups of the function.
      sizes: group name to the numbers of units that are solved, each from 0 to all.
      start: group name to the number, one of `sizes`, at which later segments see it.
      directory: directory of what is solved; a second call goes on from there.
      damping: share of the Hessian's mean diagonal that is added to its diagonal.

    Returns:
      Group name to what was solved.

    Raises:
      ValueError: the units of a group go out by several matrices, an input is not
        finite, or the directory is another job's.
    """
    batches = preparation.check_batches(batches, "solve_sizes")
    first = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), batches[0]
    )
    traced = trace(fn, params, first)
    readers = unit_rows.consumers(groups, list(sizes), traced)
    several = {
        name: len(ways_out) for name, ways_out in readers.items() if len(ways_out) > 1
    }
    check(_ONE_MATRIX, several=several)
    consumers = {name: ways_out[0] for name, ways_out in readers.items()}
    leaves = Leaves(jax.tree.leaves(params))
    updated = {consumer.op.name for consumer in consumers.values()}
    # Each use of a weight has inputs of its own.
    uses = [op for op in traced.linear_ops if op.name in updated]
    program = SegmentedProgram(traced, leaves, uses)
    facts = {
        "sizes": {name: list(numbers) for name, numbers in sizes.items()},
        "start": dict(start),
        "damping": float(damping),
        "calibration": fingerprint.of_arrays(batches),
    }
    # Tokens count by their direction alone, as in the command's own shrinking.
    sums = Sums(hessian=True, relative=True)
    pipeline = SequentialPipeline(program, batches, None, sums)
    job = fingerprint.of_job(program, pipeline.counted, {})
    log = ProgressLog(directory, {**facts, **job})
    solver = _SizeSolver(consumers, sizes, start, pipeline, log, damping=damping)
    solver.run("solving sizes", progress=True)
    dense = [*jax.tree.leaves(params)]
    solved = {}
    for name, consumer in consumers.items():
        errors = solver.errors[consumer.op.name]
        table = _Table(log, consumer, dense[consumer.op.view.leaf])
        ascending = tuple(sorted(sizes[name]))
        solved[name] = SolvedSizes(
            consumer.op.leaf,
            ascending,
            tuple(errors[str(size)] for size in ascending),
            table.read,
        )
    return solved


class _Table(NamedTuple):
    """What the log holds of one group."""

    log: ProgressLog
    consumer: Consumer
    dense: Any

    def read(self, size: int) -> Float[np.ndarray, "in out"]:
        """The matrix at a size."""
        op, rows = self.consumer.op, self.consumer.rows
        if size == len(rows):
            return np.asarray(op.view.read(self.dense)[0], np.float32)
        matrix = np.zeros(op.shape[1:], np.float32)
        if size:
            entry = _entry(op.name)
            matrix[self.log.array(entry, f"rows of {size}")] = self.log.array(
                entry, f"weight of {size}"
            )
        return matrix


class _SizeSolver(UnitRemover):
    """Solves each consumer at all sizes, and leaves it at one of them.

    Attributes:
      errors: name of a consumer to {size: error}, sizes as words, as JSON has them.
    """

    def __init__(
        self,
        consumers: Mapping[str, Consumer],
        sizes: Mapping[str, Sequence[int]],
        start: Mapping[str, int],
        pipeline: SequentialPipeline,
        log: ProgressLog,
        *,
        damping: float,
    ) -> None:
        """Begins before the first segment; see `UnitRemover`."""
        lost = {name: len(consumers[name].rows) - start[name] for name in consumers}
        readers = {name: (consumer,) for name, consumer in consumers.items()}
        super().__init__(readers, lost, pipeline, log, damping=damping)
        self._sizes, self._start = sizes, start

    @property
    def errors(self) -> dict[str, dict[str, float]]:
        """The errors of all sizes."""
        return {row["name"]: row["errors"] for row in self.rows}

    def _solve(
        self, observed: Mapping[str, Any]
    ) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
        """By weight its rows at all sizes, itself at that of the start, and a row."""
        return {
            name: self._solve_alone(inputs.op, inputs.statistics)
            for name, inputs in observed.items()
        }

    def _solve_alone(
        self, op: LinearOp, statistics: InputStatistics
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        before = self._store.read(op.view)  # (1, in, out)
        (group,) = self._groups_of(op.name)
        rows = self._consumers[group][0].rows
        total, start = len(rows), self._start[group]
        inner = sorted(size for size in self._sizes[group] if 0 < size < total)

        def ladder(weight: Any, hessian: Any) -> unit_ladder.Ladder:
            return unit_ladder.remove_to_sizes(
                weight[0], hessian[0], rows, inner, damping=self._damping
            )

        solved = placement.automatic(ladder, before, statistics.hessian)
        damping = float(solved.damping)
        check(FACTORISED, name=op.name, damping=damping, also="")
        masks = np.array(solved.kept)  # (sizes, units)
        weights = {0: jnp.zeros_like(before), total: before}
        kept = {0: np.zeros(total, bool), total: np.ones(total, bool)}
        errors = {"0": 1.0, str(total): 0.0}
        arrays: dict[str, Any] = {}
        for i, size in enumerate(inner):
            weights[size], kept[size] = solved.weights[i][None], masks[i]
            errors[str(size)] = float(solved.errors[i])
            read = np.ones(before.shape[1], bool)
            read[rows[~kept[size]]] = False
            arrays[f"rows of {size}"] = np.flatnonzero(read)
            arrays[f"weight of {size}"] = np.asarray(solved.weights[i])[read]
        arrays["weight"] = weights[start].astype(before.dtype)
        arrays[f"kept of {group}"] = np.flatnonzero(kept[start])
        lost = {group: self._lost[group]}
        row = {"name": op.name, "groups": lost, "damping": damping, "errors": errors}
        return arrays, row


def _entry(name: str) -> str:
    """The name of a weight's entry in the log, which names files."""
    return "weight_" + hashlib.sha256(name.encode()).hexdigest()[:16]


_ONE_MATRIX = [
    Rule(
        lambda v: not v.several,
        "groups are solved at several sizes where their units go out by one matrix, "
        "but these go out by so many: {several}",
    )
]
