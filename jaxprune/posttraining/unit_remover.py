"""Removes units of trained groups, segment by segment, and makes up for them.

Groups are handled one after the other, in the order of the program. The consumers of a
group are the matrices that read the group's units. Their inputs are summed up over the
batches, in the model that the groups before have left. The units whose removal changes
the consumers' outputs least are removed, and the consumers' other rows are updated. Of
several consumers the changes count relative to the size of each one's outputs. With a
correction the outputs are those of a matrix that makes up for what the groups before
lost; the dense model then runs beside the smaller one.

Groups that share a consumer are solved together, once the batches have come to the last
use of their last consumer. What the program computed on the way there is as the weights
were before, so each weight is solved for inputs that it really has.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxprune.arrays import placement
from jaxprune.arrays.rules import Rule, check
from jaxprune.graph.linear_ops import LinearOp
from jaxprune.posttraining import relative_error
from jaxprune.posttraining.passes.correction import Correct
from jaxprune.posttraining.pipeline.input_statistics import InputStatistics
from jaxprune.posttraining.pipeline.segment_job import Observed, SegmentJob
from jaxprune.posttraining.pipeline.sequential_pipeline import SequentialPipeline
from jaxprune.posttraining.pipeline.weight_store import WeightStore
from jaxprune.posttraining.progress import ProgressLog
from jaxprune.posttraining.solve_weight import FACTORISED
from jaxprune.posttraining.solvers import units
from jaxprune.posttraining.unit_rows import Consumer

UNCORRECTED = Correct(0.0)
"""Nothing that the groups before lost is made up for."""


class _Inputs(NamedTuple):
    """What is known of a weight's inputs, behind its last use.

    Attributes:
      op: the last use.
      statistics: `InputStatistics` of all uses; None where the log has the result.
      value: what the last input is read from, in the first batch.
      dense: the same of the dense model, or None.
    """

    op: LinearOp
    statistics: Any
    value: Any
    dense: Any


class UnitRemover(SegmentJob):
    """The weights of the groups' consumers on the way to their smaller values.

    Attributes:
      kept: group name to the units that are kept, of groups that were handled.
      rows: a row of the report for each updated weight.
    """

    def __init__(
        self,
        consumers: Mapping[str, Sequence[Consumer]],
        lost: Mapping[str, int],
        pipeline: SequentialPipeline,
        log: ProgressLog | None,
        *,
        damping: float,
        correction: Correct = UNCORRECTED,
    ) -> None:
        """Begins before the first segment, and reads what the log holds already.

        Args:
          consumers: group name to the matrices that its units go out by.
          lost: group name to the number of units that it loses.
          pipeline: all batches, whose sums have Hessians and what the correction
            observes, before a program that is cut at the inputs of all uses of the
            consumers.
          log: log of what is done, or None.
          damping: share of the Hessian's mean diagonal that is added to its diagonal.
          correction: what a matrix makes up for of what the groups before lost.
        """
        super().__init__(pipeline)
        self._consumers, self._lost = consumers, lost
        self._damping, self._correction, self._log = damping, correction, log
        self._together = _joined_by_groups(consumers)
        program = pipeline.program
        self._store = WeightStore(program, log)
        self.kept: dict[str, np.ndarray] = {}
        self.rows: list[dict[str, Any]] = []
        self._restored = {
            n: log.read(_entry(n)) if log else None for n in self._together
        }
        # A run that was killed between the weights of a group begins it anew.
        self.done = {
            name
            for name, names in self._together.items()
            if all(self._restored[n] for n in names)
        }
        self._observed: dict[str, _Inputs] = {}

    def is_done(self, numbers: range) -> bool:
        """Whether the log holds all weights of some segments."""
        segments = [self.pipeline.program.segments[number] for number in numbers]
        ops = [op for segment in segments for op in segment.linear_ops]
        return {*self.done}.issuperset(op.name for op in ops)

    def statistics(self, numbers: range) -> dict[str, InputStatistics]:
        """Those of the consumers at some inputs."""
        return self.pipeline.finished_statistics(numbers, self.done)

    def at_segment(self, number: int, inputs: Observed) -> None:
        """Removes the units all of whose consumers are behind the batches now."""
        program = self.pipeline.program
        for op in program.finished_in(program.segments[number]):
            statistics = inputs.statistics.get(op.name)
            self._observed[op.name] = _Inputs(
                op, statistics, inputs.values[number], inputs.dense
            )
            names = self._together[op.name]
            if names <= self._observed.keys():
                # In the order of the program.
                self._replace([n for n in self._observed if n in names])

    def release(self, number: int) -> None:
        """Frees lazy leaves; with a log, those that were updated too."""
        self._store.release(number)

    def _replace(self, names: Sequence[str]) -> None:
        """Puts new values in the place of weights, from the log or solved for."""
        observed = {name: self._observed.pop(name) for name in names}
        restored: dict[str, Any] = {name: self._restored.pop(name) for name in names}
        solved = restored if {*names} <= {*self.done} else self._solve(observed)
        for name, (arrays, row) in solved.items():
            if self._log and solved is not restored:
                self._log.write(_entry(name), jax.device_get(arrays), row)
            for group in row["groups"]:
                self.kept[group] = np.array(arrays[f"kept of {group}"])
            view = observed[name].op.view
            self.pipeline.keep(view)  # for the dense model, if it runs
            self._store.replace(view, arrays["weight"])
            self._store.note_logged(view, _entry(name), "weight")
            self.rows.append(row)

    def _solve(
        self, observed: Mapping[str, _Inputs]
    ) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
        """By weight its values without units and what groups keep, and a row."""
        # (1, in, out) each
        before = {n: self._store.read(inputs.op.view) for n, inputs in observed.items()}
        for name, weight in before.items():
            check(_FINITE, name=name, is_finite=bool(np.isfinite(weight).all()))
        moments = {n: inputs.statistics for n, inputs in observed.items()}
        # Inside an Explicit mesh even a slice must be taken on its Auto twin.
        after, kept, damping = placement.automatic(self._without_units, before, moments)
        solved = {}
        for name, (op, _, value, dense) in observed.items():
            check(FACTORISED, name=name, damping=damping[name], also="")
            positions = self.pipeline.first_positions
            error = relative_error.weight_error(
                op.source, value, before[name], after[name], dense, positions
            )
            groups = self._groups_of(name)
            arrays: dict[str, Any] = {f"kept of {g}": kept[g] for g in groups}
            arrays["weight"] = after[name]
            row = {
                "name": name,
                "groups": {group: self._lost[group] for group in groups},
                "shape": list(op.shape),
                "damping": damping[name],
                "error": error,
            }
            solved[name] = arrays, row
        return solved

    def _groups_of(self, name: str) -> list[str]:
        """The groups that a weight reads; heads, and the query heads of each, say."""
        return [
            group
            for group, readers in self._consumers.items()
            if any(reader.op.name == name for reader in readers)
        ]

    def _without_units(
        self, before: Mapping[str, jax.Array], moments: Mapping[str, InputStatistics]
    ) -> tuple[dict[str, jax.Array], dict[str, np.ndarray], dict[str, float]]:
        """Weights (1, in, out) after the units of all groups went, one by one."""
        after = {n: self._target(weight, moments[n]) for n, weight in before.items()}
        hessians = _relative_hessians(moments, before)
        damping = dict.fromkeys(before, 0.0)
        kept: dict[str, np.ndarray] = {}
        for group, readers in self._consumers.items():
            names = [reader.op.name for reader in readers]
            if names[0] not in before:
                continue
            problems = [
                units.Reader(after[name], hessians[name], reader.rows)
                for name, reader in zip(names, readers, strict=True)
            ]
            removals = units.remove_from_all(
                problems, self._lost[group], damping=self._damping
            )
            kept[group] = np.flatnonzero(removals[0].kept)
            for name, reader, removal in zip(names, readers, removals, strict=True):
                damping[name] = max(damping[name], float(removal.damping))
                after[name] = removal.weight
                # For the next group, what is gone is as if it never saw anything.
                gone = np.delete(reader.rows, kept[group], 0).reshape(-1)
                hessian = hessians[name].at[gone].set(0).at[:, gone].set(0)
                hessians[name] = hessian
        return {n: weight[None] for n, weight in after.items()}, kept, damping

    def _target(
        self, weight: Float[Array, "1 in out"], moments: InputStatistics
    ) -> Float[Array, "in out"]:
        """The matrix whose outputs are kept: the weight, or one that makes up."""
        if moments.hessian is None or moments.drift is None:
            return weight[0]
        hessian, drift = moments.hessian[0], moments.drift[0]
        return self._correction.target(weight[0], hessian, drift, self._damping)


def _relative_hessians(
    moments: Mapping[str, InputStatistics], weights: Mapping[str, jax.Array]
) -> dict[str, jax.Array]:
    """X^T X of each weight's inputs, (in, in), over the squares of its outputs."""
    hessians = {
        name: sums.hessian[0]
        for name, sums in moments.items()
        if sums.hessian is not None
    }
    if len(hessians) == 1:
        return hessians  # the same units go, whatever the scale
    # Of sums a recurrent matrix, which is read at every step, would drown the layer
    # that reads the last state alone.
    return {name: h / _energy(h, weights[name][0]) for name, h in hessians.items()}


def _energy(
    hessian: Float[Array, "in in"], weight: Float[Array, "in out"]
) -> Float[Array, ""]:
    """The mean squared norm of a weight's outputs, 1 where they are all zero."""
    squares = jnp.sum(weight * (hessian @ weight))
    return jnp.where(squares > 0, squares, 1.0)


def _joined_by_groups(
    consumers: Mapping[str, Sequence[Consumer]],
) -> dict[str, frozenset[str]]:
    """Each weight to those that are solved with it, itself among them."""
    together: dict[str, frozenset[str]] = {}
    for readers in consumers.values():
        names = frozenset(reader.op.name for reader in readers)
        # With all that earlier groups have put together with one of them.
        names = names.union(*(together.get(name, ()) for name in names))
        together |= dict.fromkeys(names, names)
    return together


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
