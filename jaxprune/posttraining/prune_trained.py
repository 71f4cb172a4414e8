"""Prunes a trained model, segment by segment of its program, with calibration batches.

Here the arguments are checked and the result is reported; what is in between is
`jaxprune.posttraining.sequential`.
"""

import itertools
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import AxisType, NamedSharding

from jaxprune import leaves
from jaxprune.arrays import tree
from jaxprune.arrays.lazy import Leaves
from jaxprune.arrays.messages import listed
from jaxprune.arrays.per_device import PerDevice
from jaxprune.graph.linear_ops import trace
from jaxprune.masking.counts import Allocation
from jaxprune.posttraining import calibration, fingerprint, input_statistics, methods
from jaxprune.posttraining import plan as plans
from jaxprune.posttraining.fingerprint import Fingerprint
from jaxprune.posttraining.methods import Method
from jaxprune.posttraining.pipeline import SegmentedProgram
from jaxprune.posttraining.plan import Plan
from jaxprune.posttraining.progress import ProgressLog
from jaxprune.posttraining.refine import Refine
from jaxprune.posttraining.sequential import Pruner
from jaxprune.posttraining.solvers import rounding as roundings
from jaxprune.posttraining.solvers.rounding import Rounding
from jaxprune.typing import Params, Pattern, Prunable


class PruneResult(NamedTuple):
    """A pruned model and the report of how it was pruned.

    Attributes:
      params: like the parameters that were given, pruned. A `jp.LazyArray` leaf that
        did not change stays one. One that changed stays one where a `directory` was
        given, which holds the new weights; otherwise it is an array.
      report: JSON-able: method, pattern, sparsity asked for and achieved, calibration,
        seconds, the leaves that no linear op uses, and a row for each weight: name,
        shape, units removed, zeros, size, relative squared error of its output on at
        most 256 samples of the first batch, damping, seconds of its solver, and which
        of its matrices were pruned by magnitude, because their input was zero in all
        samples or fewer than 16 samples reached an expert. With a correction the error
        is that against the dense model's output, so it includes what earlier weights
        lost. With `refine`, "refined" has a row for each block: its weights, the
        leaves that were trained, and the loss on held-out batches before training,
        after each pass, and of the values that were kept.
    """

    params: Params
    report: dict[str, Any]


def prune_trained(
    fn: Callable[[Params, Any], Any],
    params: Params,
    batches: Iterable[Any],
    *,
    method: Method | methods.Name,
    sparsity: float | Mapping[str, float] | None = None,
    pattern: Pattern | str | None = None,
    allocation: Allocation = "layer",
    prunable: Prunable = leaves.prunable,
    positions: Callable[[Any], jax.Array] | None = None,
    directory: str | Path | None = None,
    donate: bool = False,
    progress: bool = True,
    refine: Refine | None = None,
    rounding: Rounding | roundings.Name | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> PruneResult:
    """Prunes a trained model, with calibration batches.

    Pruned are the prunable leaves that meet an activation in a matmul or convolution,
    as `jp.trace` lists them; a tied weight is pruned at its last use, for all its
    inputs. The same call gives the same bits.

    Args:
      fn: parameters and a batch to anything; traceable by JAX.
      params: the parameters, any pytree of arrays, sharded or not. `jp.LazyArray`
        leaves are in memory from their first use to their last. With `directory` as
        well, a model larger than memory is pruned with the memory that one layer needs.
      batches: pytrees of arrays, all of one shape; their activations are kept. An
        iterator's batches are freed once they are used.
      method: "magnitude", "wanda", "ria", "sparsegpt", "alps", or a value of
        `jp.methods` with settings of your own.
      sparsity: the share to remove of the weights that are pruned, in [0, 1), or {glob
        on the weight's name: share}. None where the pattern fixes it.
      pattern: which weights are pruned together: a value of `jp.patterns`, or its name
        such as "2:4"; the method's own by default.
      allocation: how the sparsity is shared out: "layer" gives each weight the same,
        "global" ranks all magnitudes together, "erk", "owl", a value of
        `jp.allocation`, or {glob on the weight's name: share}.
      prunable: which leaves may be pruned.
      positions: a batch to booleans of the samples' shape, (batch, time) say: which
        positions count. None counts all, BOS too.
      directory: where progress is kept; the same call after a kill resumes from there.
      donate: whether the old weights are given up, each as soon as its successor is
        there; the old parameters are deleted then, and memory holds the model once.
      progress: whether to show how far it is: a bar on a terminal, a line now and then
        in a log.
      refine: gradient steps on each layer's kept weights, norms and biases after the
        layer was pruned, towards the output of the dense layer; zeros stay zeros. `fn`
        must be differentiable, and its result is what the last layer is measured by:
        return final hidden states rather than logits. None takes no such steps.
      rounding: "int4", "int8" or a `jp.Rounding`: kept weights are rounded to levels,
        which are such integers times a scale, and stored in the leaves' own dtype.
        "sparsegpt" and "alps" make up for the rounding in later inputs; the other
        methods round to the nearest level. A kept weight may become zero. The integers
        are stored by `jaxprune compact`. None leaves the weights as they are.
      mesh: devices. Each takes a batch at the same time as the others, and later a
        matrix to prune. The masks are those that one device gives, bit for bit, however
        the parameters are sharded: the parameters of a segment are gathered on every
        device while it runs. Several processes must all make the same call with the
        same batches; the first process writes. None leaves batches and parameters
        where they are.

    Returns:
      The pruned parameters, of the same structure, dtypes and sharding, and a report.

    Raises:
      ValueError: an argument does not fit, an input is not finite, a factorisation
        failed, or the directory is another job's. Only `directory` is written to then.
      TypeError: an argument is of another kind than what it takes.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import jaxprune as jp
      >>> fn = lambda params, x: jnp.tanh(x @ params["up"]) @ params["down"]
      >>> keys = jax.random.split(jax.random.key(0), 3)
      >>> params = {"up": jax.random.normal(keys[0], (4, 8)),
      ...           "down": jax.random.normal(keys[1], (8, 2))}
      >>> batches = [jax.random.normal(keys[2], (32, 4))]
      >>> pruned = jp.prune_trained(
      ...     fn, params, batches, method="sparsegpt", sparsity=0.5)
      >>> jp.sparsity(pruned.params).total
      0.5
    """
    started = time.perf_counter()
    batches = calibration.checked_batches(batches, "prune_trained")
    rounding = roundings.named(rounding)
    _check_refine(refine, rounding, len(batches))
    devices = None if mesh is None else PerDevice.of(mesh)
    if devices is not None:
        _check_mesh(batches, params, devices, refine)
    traced = trace(fn, params, batches[0])
    ops = calibration.chosen(traced, params, prunable)
    leaves = Leaves(jax.tree.leaves(params))
    plans.check_leaves(leaves, ops, donate=donate)
    prints = fingerprint.of_leaves({op.leaf: op.view.leaf for op in ops}, leaves)
    plans.check_finite(prints)
    program = SegmentedProgram(
        traced, leaves, ops, outputs=refine is not None, devices=devices
    )
    counted = [positions(batch) if positions else None for batch in batches]
    if refine is not None:
        refine.check(program, counted)
    plan = plans.planned(
        ops,
        leaves,
        methods.named(method),
        sparsity,
        pattern,
        allocation,
        lambda: calibration.calibrate(
            fn, params, batches, positions=positions, prunable=prunable, mesh=mesh
        ),
        devices,
        rounding,
    )
    for segment, own in itertools.product(program.segments, counted):
        input_statistics.counted_samples(segment, own)
    facts = {
        **_facts(plan, program, batches, counted),
        "refine": refine and repr(refine),
    }
    log = None
    if directory is not None:
        log = _progress_log(Path(directory), facts, program, counted, prints)
    taken = calibration.side_by_side(batches, devices)
    batches.clear()
    seen = calibration.side_by_side(counted, devices)
    pruner = Pruner(program, plan, taken, seen, log, donate=donate, refine=refine)
    taken.clear()  # the pipeline frees each one after its first segment
    rows = pruner.run(progress=progress)
    report = {
        **facts,
        "programs": program.programs,
        "achieved": sum(r["zeros"] for r in rows) / sum(r["size"] for r in rows),
        "seconds": time.perf_counter() - started,
        "unseen": dict(traced.unseen),
        "weights": rows,
        "refined": pruner.refined,
    }
    pruned = jax.tree.unflatten(jax.tree.structure(params), leaves.all)
    return PruneResult(pruned, report)


def _check_refine(
    refine: Refine | None, rounding: Rounding | None, batches: int
) -> None:
    """Refuses what is no `Refine`, too few batches for it, and a rounding with it."""
    if refine is None:
        return
    if not isinstance(refine, Refine):
        raise TypeError(
            f"refine must be a jp.Refine, got {refine!r}; give jp.Refine(passes=8)"
        )
    refine.split(batches)
    if rounding is not None:
        raise ValueError(
            "refine moves the weights off their levels, so it takes no rounding; "
            "leave one of them out"
        )


def _check_mesh(
    batches: Sequence[Any], params: Params, devices: PerDevice, refine: Refine | None
) -> None:
    """Refuses what cannot be done with a batch a device."""
    calibration.check_devices(batches, devices, "prune_trained")
    if refine is not None:
        raise ValueError(
            "refine trains on one batch after the other, so it takes no mesh; leave "
            "mesh out, and split parameters and batches themselves"
        )
    explicit = [
        name
        for name, leaf in tree.named_leaves(params).items()
        if isinstance(own := getattr(leaf, "sharding", None), NamedSharding)
        and AxisType.Explicit in own.mesh.axis_types
    ]
    if explicit:
        raise ValueError(
            "with a mesh each device runs the whole function, so the parameters' own "
            f"mesh must have Auto axes, but that of {listed(explicit)} has Explicit "
            "ones; leave mesh out, or place them on a mesh with axis_types=Auto"
        )


def _progress_log(
    directory: Path,
    facts: Mapping[str, Any],
    program: SegmentedProgram,
    counted: Sequence[jax.Array | None],
    known: Mapping[str, Fingerprint],
) -> ProgressLog:
    """The log of a job, which is what its arguments are; `known`: leaves to prune."""
    rest = {name: i for name, i in program.used.items() if name not in known}
    prints = {**known, **fingerprint.of_leaves(rest, program.leaves)}
    job = {
        "counted": fingerprint.of_arrays(counted),
        "program": fingerprint.of_program(program),
        "parameters": {name: own.mark for name, own in prints.items()},
    }
    return ProgressLog(directory, {**facts, **job})


def _facts(
    plan: Plan,
    program: SegmentedProgram,
    batches: Sequence[Any],
    counted: Sequence[jax.Array | None],
) -> dict[str, Any]:
    """What the report says of a job before it has begun."""
    # At the first input; each other one has as many samples.
    every = math.prod(program.segments[0].source.leading)
    samples = [every if own is None else int(own.sum()) for own in counted]
    return {
        **plan.facts(),
        "positions": "all" if counted[0] is None else "chosen",
        "samples": sum(samples),
        "batches": len(batches),
        "calibration": fingerprint.of_arrays(batches),
    }
