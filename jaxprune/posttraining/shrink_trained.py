"""Smaller models with calibration batches: what is left makes up for what is gone.

Groups are handled one after the other, in the order of the program. The consumer of a
group is the matrix that reads the group's units. Its inputs are summed up over the
batches, in the model that the groups before have left. The units whose removal changes
the consumer's outputs least are removed, and the consumer's other rows are updated.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.arrays import placement
from jaxprune.arrays.console_progress import Progress
from jaxprune.arrays.lazy import Leaves
from jaxprune.graph.axis_groups import AxisGroups, axis_groups
from jaxprune.graph.linear_ops import LinearOp, Trace, trace
from jaxprune.posttraining import (
    calibration,
    input_statistics,
    sequential,
    solve_weight,
    unit_rows,
)
from jaxprune.posttraining.input_statistics import InputStatistics, Sums
from jaxprune.posttraining.pipeline import SegmentedProgram, SequentialPipeline
from jaxprune.posttraining.solvers import layer_problem, units
from jaxprune.structured import cut, shrink, timing
from jaxprune.structured.budget import Measure
from jaxprune.structured.shrink import Rules, ShrinkResult, Sizes
from jaxprune.typing import Params


def shrink_trained(
    fn: Callable[[Params, Any], Any],
    params: Params,
    batches: Iterable[Any],
    sparsity: float | Mapping[str, float] | None = None,
    *,
    budget: float | None = None,
    measure: Measure = "parameters",
    groups: Rules = ("*",),
    sizes: Sizes | None = None,
    damping: float = 0.01,
    relative: bool = True,
    positions: Callable[[Any], jax.Array] | None = None,
    progress: bool = True,
) -> ShrinkResult:
    """Removes whole units of a trained model, and updates the rest to make up for them.

    A unit is rows of one matrix: a neuron is a row of the down projection, a head is
    some rows of the output projection. X is the input of that matrix over all batches
    and W (in, out) its values. The units are removed whose removal changes X W least
    once the other rows are updated by least squares, and the other rows get these
    updated values: optimal brain surgery on units. Each matrix is solved for the inputs
    that it has after the groups before it were pruned. Where a norm runs over the units
    before the matrix reads them, the removal of one changes the others; this change is
    left out of account, and so is what anything but a matmul reads of the units.

    Args:
      fn: parameters and a batch to anything; traceable by JAX.
      params: a pytree of arrays or `jp.LazyArray`, sharded or not.
      batches: pytrees of arrays, all of one shape; their activations are kept.
      sparsity: the share of its units that each group loses, as in `jp.shrink`.
      budget: instead: the share of the whole that may be left, as in `jp.shrink`.
      measure: what the budget is of, as in `jp.shrink`.
      groups: the groups that the budget is met with, as in `jp.shrink`.
      sizes: the numbers of units that groups may keep, as in `jp.shrink`.
      damping: added to the diagonal of XᵀX, as a share of its mean.
      relative: whether each row of X is divided by its root mean square first. Else a
        few tokens with massive activations are most of XᵀX.
      positions: a batch to booleans of the samples' shape, (batch, time) say: which
        positions count. None counts all.
      progress: whether to show how far it is.

    Returns:
      As `jp.shrink`; the report also has "weights", a row for each updated weight:
      name, group, shape, units lost, damping, relative squared error of its output on
      the first 256 samples.

    Raises:
      ValueError: an argument does not fit, a group's units do not go out by one matrix,
        an input is not finite, or a Hessian could not be factorised.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import jaxprune as jp
      >>> fn = lambda params, x: jnp.tanh(x @ params["up"]) @ params["down"]
      >>> keys = jax.random.split(jax.random.key(0), 3)
      >>> params = {"up": jax.random.normal(keys[0], (4, 8)),
      ...           "down": jax.random.normal(keys[1], (8, 2))}
      >>> batches = [jax.random.normal(keys[2], (32, 4))]
      >>> small = jp.shrink_trained(fn, params, batches, 0.5)
      >>> small.params["up"].shape, small.params["down"].shape
      ((4, 4), (4, 2))

    Reference:
      Kurtic, Frantar, Alistarh, "ZipLM: Inference-Aware Structured Pruning of Language
      Models", 2023, arXiv 2302.04089; Meng et al., "OSSCAR: One-Shot Structured Pruning
      in Vision and Language Models with Combinatorial Optimization", 2024, arXiv
      2403.12983.
    """
    if (sparsity is None) == (budget is None):
        raise ValueError(
            "shrink_trained needs either a sparsity or a budget, got "
            f"sparsity={sparsity}, budget={budget}"
        )
    shrink.check_budget(budget, measure)
    layer_problem.check_damping(damping)
    batches = calibration.checked_batches(batches, "shrink_trained")
    first = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), batches[0]
    )
    found = axis_groups(fn, params, first)
    timed = timing.needed(measure, budget, found.trace, params, batches[0])
    lost = shrink.lost_units(found, sparsity, budget, measure, groups, sizes, timed)
    lost = {name: count for name, count in lost.items() if count}
    leaves = Leaves(jax.tree.leaves(params))
    kept: dict[str, np.ndarray] = {}
    rows: list[dict[str, Any]] = []
    if lost:
        job = _Job(trace(fn, params, first), found, lost, leaves, damping)
        counted = [positions(batch) if positions else None for batch in batches]
        sums = Sums(hessian=True, relative=relative)
        rows = job.run(batches, counted, sums, progress=progress)
        kept = job.kept
    cuts = cut.of_groups(found, kept)
    updated = jax.tree.unflatten(jax.tree.structure(params), leaves.all)
    small = shrink.of_cuts(fn, updated, first, found, kept, cuts)
    small.report["weights"] = rows
    return shrink.timed_too(small, timed)


class _Job:
    """The weights of the groups' consumers on the way to their smaller values."""

    def __init__(
        self,
        traced: Trace,
        groups: AxisGroups,
        lost: Mapping[str, int],
        leaves: Leaves,
        damping: float,
    ) -> None:
        """Finds the consumers and cuts the program at their inputs."""
        consumers = unit_rows.consumers(groups, list(lost), traced)
        self._lost, self._damping = lost, damping
        # Heads, and the query heads of each, go out by one weight, one after the other.
        self._groups: dict[str, list[tuple[str, np.ndarray]]] = {}
        for name, own in consumers.items():
            self._groups.setdefault(own.op.name, []).append((name, own.rows))
        ops = {own.op.name: own.op for own in consumers.values()}
        self._program = SegmentedProgram(traced, leaves, list(ops.values()))
        self._owned: set[int] = set()  # leaves that are no array of the caller's
        self.kept: dict[str, np.ndarray] = {}

    def run(
        self,
        batches: list[Any],
        counted: Sequence[jax.Array | None],
        sums: Sums,
        *,
        progress: bool,
    ) -> list[dict[str, Any]]:
        """Solves for all weights, in the order of the program; a row each."""
        program = self._program
        for segment, own in itertools.product(program.segments, counted):
            input_statistics.counted_samples(segment, own)
        pipeline = SequentialPipeline(program, batches, counted, sums)
        batches.clear()  # the pipeline frees each one after its first segment
        rows: list[dict[str, Any]] = []
        count = len(program.segments)
        with Progress(count, "shrinking", unit="segment", shown=progress) as shown:
            for number, segment in enumerate(program.segments):
                shown.note(segment.linear_ops[0].name)
                (value,) = pipeline.observe(range(number, number + 1)).values()
                statistics = sums.finish_all()
                rows += [
                    self._solve(op, statistics[op.name], value, counted[0])
                    for op in segment.linear_ops
                ]
                program.release(number)
                shown.update()
        return rows

    def _solve(
        self, op: LinearOp, statistics: InputStatistics, value: Any, positions: Any
    ) -> dict[str, Any]:
        """Removes the units that go out by one weight, and puts the rest in place."""
        i = op.view.leaf
        leaf = self._program.leaves[i]
        before = placement.automatic(op.view.read, leaf)  # (1, in, out)
        if not np.isfinite(before).all():
            raise ValueError(
                f"the weights to update must be finite, but '{op.name}' holds NaN or "
                "infinity; look for a damaged checkpoint"
            )
        summed: Any = statistics.hessian
        after, hessian, damping = before[0], summed[0], 0.0
        for name, rows in self._groups[op.name]:
            found = placement.automatic(
                functools.partial(units.remove, damping=self._damping),
                after,
                hessian,
                rows,
                self._lost[name],
            )
            damping = max(damping, float(found.damping))
            after = found.weight
            self.kept[name] = np.flatnonzero(found.kept)
            # For the next group, what is gone is as if it never saw anything.
            gone = np.delete(rows, self.kept[name], 0).reshape(-1)
            hessian = hessian.at[gone].set(0).at[:, gone].set(0)
        if not np.isfinite(damping):
            raise ValueError(
                f"the Hessian of '{op.name}' must be positive definite, but could not "
                "be factorised with any damping; give more or other calibration "
                "batches, or run the model in float32"
            )
        row = {
            "name": op.name,
            "groups": {name: self._lost[name] for name, _ in self._groups[op.name]},
            "shape": list(op.shape),
            "damping": damping,
            "error": solve_weight.error(
                op.source, value, before, after[None], positions=positions
            ),
        }
        spare = i in self._owned
        new = sequential.replaced(op.view, leaf, after[None], donate=spare)
        self._program.leaves[i] = new
        self._owned.add(i)
        return row
