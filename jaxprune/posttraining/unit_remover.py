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

from jaxprune.arrays import placement, processes
from jaxprune.arrays.console_progress import Progress
from jaxprune.graph.linear_ops import LinearOp
from jaxprune.posttraining import relative_error
from jaxprune.posttraining.passes.chaining import Chain
from jaxprune.posttraining.pipeline.input_statistics import InputStatistics
from jaxprune.posttraining.pipeline.sequential_pipeline import SequentialPipeline
from jaxprune.posttraining.pipeline.through_segments import through_segments
from jaxprune.posttraining.pipeline.weight_store import WeightStore
from jaxprune.posttraining.progress import ProgressLog
from jaxprune.posttraining.solve_weight import check_factorised
from jaxprune.posttraining.solvers import units
from jaxprune.posttraining.unit_rows import Consumer


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


class Removal(NamedTuple):
    """How units are removed.

    Attributes:
      consumers: group name to the matrices that its units go out by.
      lost: group name to the number of units that it loses.
      chain: the solver, and the correction for what the groups before lost.
    """

    consumers: Mapping[str, Sequence[Consumer]]
    lost: Mapping[str, int]
    chain: Chain


def remove_units(
    removal: Removal,
    pipeline: SequentialPipeline,
    log: ProgressLog | None,
) -> tuple[dict[str, np.ndarray], list[dict[str, Any]]]:
    """Removes the units of all groups, or takes what the log holds of them.

    Args:
      removal: which groups lose how many units, and how.
      pipeline: all batches, whose sums have Hessians and what the correction observes,
        before a program that is cut at the inputs of all uses of the consumers.
      log: log of what is done, or None.

    Returns:
      Group name to the units that are kept, and a row of the report for each updated
      weight.
    """
    together = _joined_by_groups(removal.consumers)
    program, count = pipeline.program, len(pipeline.program.segments)
    store = WeightStore(program, log)
    kept: dict[str, np.ndarray] = {}
    rows: list[dict[str, Any]] = []
    restored: dict[str, Any] = {
        n: log.read(_entry(n)) if log else None for n in together
    }
    # A run that was killed between the weights of a group begins it anew.
    done = {n for n, names in together.items() if all(restored[m] for m in names)}
    observed: dict[str, _Inputs] = {}
    with Progress(
        count, "shrinking", unit="segment", shown=processes.is_first()
    ) as shown:
        for number, inputs in through_segments(pipeline, shown, done):
            for op in program.finished_in(program.segments[number]):
                statistics, value = (
                    inputs.statistics.get(op.name),
                    inputs.values[number],
                )
                observed[op.name] = _Inputs(op, statistics, value, inputs.dense)
                names = together[op.name]
                if not names <= observed.keys():
                    continue  # until all consumers are behind the batches
                # In the order of the program.
                joint = {n: observed.pop(n) for n in [*observed] if n in names}
                old = {name: restored.pop(name) for name in joint}
                solved = (
                    old if names <= done else _solve(removal, pipeline, store, joint)
                )
                for name, (arrays, row) in solved.items():
                    if log and solved is not old:
                        log.write(_entry(name), jax.device_get(arrays), row)
                    for group in row["groups"]:
                        kept[group] = np.array(arrays[f"kept of {group}"])
                    view = joint[name].op.view
                    pipeline.keep(view)  # for the dense model, if it runs
                    store.replace(view, arrays["weight"])
                    store.note_logged(view, _entry(name), "weight")
                    rows.append(row)
            store.release(number)
    return kept, rows


def _solve(
    removal: Removal,
    pipeline: SequentialPipeline,
    store: WeightStore,
    observed: Mapping[str, _Inputs],
) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """By weight its values without units and what groups keep, and a row."""
    # (1, in, out) each
    before = {n: store.read(inputs.op.view) for n, inputs in observed.items()}
    for name, weight in before.items():
        if not np.isfinite(weight).all():
            raise ValueError(
                f"the weights to update must be finite, but '{name}' holds NaN or "
                "infinity; look for a damaged checkpoint"
            )
    moments = {n: inputs.statistics for n, inputs in observed.items()}

    def without_units(before: Any, moments: Any) -> Any:
        return _without_units(removal, before, moments)

    # Inside an Explicit mesh even a slice must be taken on its Auto twin.
    after, kept, damping = placement.automatic(without_units, before, moments)
    solved = {}
    for name, (op, _, value, dense) in observed.items():
        check_factorised(name, damping[name])
        error = relative_error.weight_error(
            op.source, value, before[name], after[name], dense, pipeline.first_positions
        )
        # The groups that the weight reads; heads, and the query heads of each, say.
        groups = [
            group
            for group, readers in removal.consumers.items()
            if any(reader.op.name == name for reader in readers)
        ]
        arrays: dict[str, Any] = {f"kept of {g}": kept[g] for g in groups}
        arrays["weight"] = after[name]
        row = {
            "name": name,
            "groups": {group: removal.lost[group] for group in groups},
            "shape": list(op.shape),
            "damping": damping[name],
            "error": error,
        }
        solved[name] = arrays, row
    return solved


def _without_units(
    removal: Removal,
    before: Mapping[str, jax.Array],
    moments: Mapping[str, InputStatistics],
) -> tuple[dict[str, jax.Array], dict[str, np.ndarray], dict[str, float]]:
    """Weights (1, in, out) after the units of all groups went, one by one."""
    after = {n: _target(removal, weight, moments[n]) for n, weight in before.items()}
    hessians = _relative_hessians(moments, before)
    damping = dict.fromkeys(before, 0.0)
    kept: dict[str, np.ndarray] = {}
    for group, readers in removal.consumers.items():
        names = [reader.op.name for reader in readers]
        if names[0] not in before:
            continue
        problems = [
            units.Reader(after[name], hessians[name], reader.rows)
            for name, reader in zip(names, readers, strict=True)
        ]
        removals = units.remove_from_all(
            problems, removal.lost[group], damping=removal.chain.pruning.damping
        )
        kept[group] = np.flatnonzero(removals[0].kept)
        for name, reader, removed in zip(names, readers, removals, strict=True):
            damping[name] = max(damping[name], float(removed.damping))
            after[name] = removed.weight
            # For the next group, what is gone is as if it never saw anything.
            gone = np.delete(reader.rows, kept[group], 0).reshape(-1)
            hessians[name] = hessians[name].at[gone].set(0).at[:, gone].set(0)
    return {n: weight[None] for n, weight in after.items()}, kept, damping


def _target(
    removal: Removal, weight: Float[Array, "1 in out"], moments: InputStatistics
) -> Float[Array, "in out"]:
    """The matrix whose outputs are kept: the weight, or one that makes up."""
    if moments.hessian is None or moments.drift is None:
        return weight[0]
    hessian, drift = moments.hessian[0], moments.drift[0]
    chain = removal.chain
    return chain.target(weight[0], hessian, drift, chain.pruning.damping)


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
