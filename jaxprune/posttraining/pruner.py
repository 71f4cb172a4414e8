"""Prunes the weights of a program segment by segment, each for the input it will see.

A pass may ask for the inputs that a layer has while the layer is still dense. Then the
statistics of all segments of the layer are taken first, and the segments run a second
time while they are pruned. Activations are still held only once.

With a correction, the dense model runs beside the pruned one, one segment ahead of it,
and activations are held twice.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from jaxprune.arrays import processes
from jaxprune.arrays.console_progress import Progress
from jaxprune.graph.linear_ops import LinearOp
from jaxprune.posttraining import relative_error, solve_weight
from jaxprune.posttraining.pipeline.sequential_pipeline import SequentialPipeline
from jaxprune.posttraining.pipeline.through_segments import Observed, through_segments
from jaxprune.posttraining.pipeline.weight_store import WeightStore
from jaxprune.posttraining.plan import Plan
from jaxprune.posttraining.progress import ProgressLog


def prune_segments(
    plan: Plan,
    pipeline: SequentialPipeline,
    log: ProgressLog | None,
    *,
    donate: bool,
) -> list[dict[str, Any]]:
    """Prunes all segments, or takes what the log holds of them.

    Args:
      plan: what is done to which weight.
      pipeline: all batches, with the sums that the chain needs; the leaves of its
        program are replaced.
      log: log of what is done, or None.
      donate: whether the caller's leaves are given up once they are replaced.

    Returns:
      A row of the report for each weight.
    """
    program, rows = pipeline.program, []
    store = WeightStore(program, log, donate=donate)
    # Weights and rows of the segments that were pruned before.
    entries = [f"segment_{i:05d}" for i in range(len(program.segments))]
    restored = [log.read(entry) if log else None for entry in entries]
    done = {name for entry in restored if entry for name in entry[0]}
    dense_layers = plan.chain.pruning.inputs == "dense"
    with Progress(
        len(entries), "pruning", unit="segment", shown=processes.is_first()
    ) as shown:
        for number, inputs in through_segments(
            pipeline, shown, done, dense_layers=dense_layers
        ):
            # Those that are the last uses of their weights.
            ops = program.finished_in(program.segments[number])
            entry, restored[number] = restored[number], None  # which closes its file
            weights: Mapping[str, Any]
            if entry is None:
                weights, new = _prune(plan, pipeline, store, ops, inputs, number)
                if log:
                    log.write(entries[number], jax.device_get(weights), new)
            else:
                weights, new = entry
                for op in ops:
                    pipeline.keep(op.view)
                    store.replace(op.view, weights[op.name])
            for op in ops:
                store.note_logged(op.view, entries[number], op.name)
            del entry, weights
            for row in new:
                if row.get("by_magnitude"):
                    shown.say(_unreached(row))
            rows += new
            store.release(number)
    return rows


def _prune(
    plan: Plan,
    pipeline: SequentialPipeline,
    store: WeightStore,
    ops: Sequence[LinearOp],
    inputs: Observed,
    number: int,
) -> tuple[dict[str, jax.Array], list[dict[str, Any]]]:
    """The weights of a segment, pruned and put in place, and their rows."""
    devices = pipeline.program.devices
    # All at once over devices; else one by one, so that the statistics of each are
    # freed: those of a segment come with it, those of a dense layer together.
    groups = [[op] for op in ops] if devices is None else [ops] if ops else []
    first = inputs.values.get(number), inputs.dense, pipeline.first_positions
    if devices is not None:
        first = jax.tree.map(lambda x: x[0], devices.first(first, 1))
    value, dense, positions = first
    weights: dict[str, jax.Array] = {}
    rows: list[dict[str, Any]] = []
    for group in groups:
        started = time.perf_counter()
        before = {op: store.read(op.view) for op in group}  # (batch, in, out)
        if devices is not None:
            # One by one: operations cannot be sorted, as the keys of a tree are.
            before = {op: devices.everywhere(w) for op, w in before.items()}
        moments = {op.name: inputs.statistics.pop(op.name) for op in group}
        solved = solve_weight.solve_weights(plan, before, moments, devices)
        del moments
        seconds = (time.perf_counter() - started) / len(group)
        for op, (after, row) in zip(group, solved, strict=True):
            row["seconds"] = seconds
            row["error"] = relative_error.weight_error(
                op.source, value, before[op], after, dense, positions
            )
            pipeline.keep(op.view)  # what the dense model still reads of it
            store.replace(op.view, after)
            weights[op.name] = after
            rows.append(row)
    return weights, rows


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
