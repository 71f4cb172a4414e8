"""Prunes a trained model, segment by segment of its program, with calibration batches.

Here the arguments are checked and the result is reported; what is in between is
`jaxprune.posttraining.pruner`.
"""

import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import AxisType, NamedSharding

from jaxprune import leaves
from jaxprune.arrays import tree
from jaxprune.arrays.messages import listed
from jaxprune.arrays.per_device import PerDevice
from jaxprune.masking.counts import Sparsity
from jaxprune.posttraining import fingerprint
from jaxprune.posttraining import plan as plans
from jaxprune.posttraining.calibration import calibrate
from jaxprune.posttraining.fingerprint import Fingerprint
from jaxprune.posttraining.passes.base import Pass
from jaxprune.posttraining.passes.chaining import as_chain
from jaxprune.posttraining.passes.pruning import Name
from jaxprune.posttraining.pipeline import preparation
from jaxprune.posttraining.pipeline.segmented_program import SegmentedProgram
from jaxprune.posttraining.pipeline.sequential_pipeline import SequentialPipeline
from jaxprune.posttraining.pipeline.sums import Sums
from jaxprune.posttraining.progress import ProgressLog
from jaxprune.posttraining.pruner import prune_segments
from jaxprune.typing import Params, PrunableLike


class PruneResult(NamedTuple):
    """A pruned model and the report of how it was pruned.

    Attributes:
      params: parameters of the same structure, pruned. A `jp.LazyArray` leaf that did
        not change stays one. One that changed stays one where a `directory` was
        given, which holds the new weights; otherwise it is an array.
      report: JSON-able dictionary: method, pattern, sparsity asked for and achieved,
        calibration, seconds, the leaves that no linear op uses, and a row for each
        weight: name, shape, units removed, zeros, size, relative squared error of its
        output on at
        most 256 samples of the first batch, damping, seconds of its solver, and which
        of its matrices were pruned by magnitude, because their input was zero in all
        samples or fewer than 16 samples reached an expert. With a correction the error
        is that against the dense model's output, so it includes what earlier weights
        lost.
    """

    params: Params
    report: dict[str, Any]


def prune_trained(
    fn: Callable[[Params, Any], Any],
    params: Params,
    batches: Iterable[Any],
    method: Pass | Name,
    sparsity: Sparsity = None,
    *,
    prunable: PrunableLike = leaves.prunable,
    positions: Callable[[Any], jax.Array] | None = None,
    directory: str | Path | None = None,
    donate: bool = False,
    mesh: jax.sharding.Mesh | None = None,
) -> PruneResult:
    """Prunes a trained model, with calibration batches.

    Pruned are the prunable leaves that meet an activation in a matmul or convolution,
    as `jp.trace` lists them; a tied weight is pruned at its last use, for all its
    inputs. The same call gives the same bits.

    Args:
      fn: function of parameters and a batch to anything; traceable by JAX.
      params: parameters, any pytree of arrays, sharded or not. `jp.LazyArray` leaves
        are in memory from their first use to their last. With `directory` as well, a
        model larger than memory is pruned with the memory that one layer needs.
      batches: pytrees of arrays, all of one shape; their activations are kept. An
        iterator's batches are freed once they are used.
      method: "magnitude", "wanda", "ria", "sparsegpt", "alps"; or a pass of
        `jp.passes` such as `jp.passes.sparsegpt(0.5, pattern="2:4")`; or several with
        `jp.passes.chain`, which also corrects and quantizes.
      sparsity: share to remove, in [0, 1), or {glob on the weight's name: share}; None
        is the pass's own, or what its pattern fixes.
      prunable: function of a leaf's name and the leaf to whether it may be pruned.
      positions: function of a batch to booleans of the samples' shape, (batch, time)
        say: which positions count. None counts all, BOS too.
      directory: directory where progress is kept; the same call after a kill resumes
        from there.
      donate: whether the old weights are given up, each as soon as its successor is
        there; the old parameters are deleted then, and memory holds the model once.
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
      >>> pruned = jp.prune_trained(fn, params, batches, "sparsegpt", sparsity=0.5)
      >>> jp.sparsity(pruned.params).total
      0.5
      >>> quantized = jp.prune_trained(fn, params, batches, jp.passes.chain(
      ...     jp.passes.alps(pattern="2:4"), jp.passes.quantize("int4")))
      >>> quantized.report["achieved"] >= 0.5
      True
    """
    started = time.perf_counter()
    chain = as_chain(method, sparsity)
    devices = None if mesh is None else PerDevice.of(mesh)
    batches = preparation.check_batches(batches, "prune_trained", devices)
    if devices is not None:
        explicit = listed(_on_explicit_axes(params))
        if explicit:
            raise ValueError(
                "with a mesh each device runs the whole function, so the parameters' "
                f"own mesh must have Auto axes, but that of {explicit} has Explicit "
                "ones; leave mesh out, or place them on a mesh with axis_types=Auto"
            )
    program = preparation.prepare(fn, params, batches[0], prunable, devices=devices)
    prints = _checked_leaves(program, donate=donate)
    plan = plans.make_plan(
        program,
        chain,
        lambda: calibrate(
            fn, params, batches, positions=positions, prunable=prunable, mesh=mesh
        ),
    )
    calibration = fingerprint.of_arrays(batches)
    sums = Sums(
        hessian="hessian" in chain.observes,
        relative=chain.pruning.relative,
        drift="drift" in chain.observes,
        devices=devices,
    )
    pipeline = SequentialPipeline(program, batches, positions, sums)
    facts = plan.facts() | _calibration_facts(pipeline) | {"calibration": calibration}
    log = None
    if directory is not None:
        job = fingerprint.of_job(program, pipeline.counted, prints)
        log = ProgressLog(Path(directory), {**facts, **job})
    rows = prune_segments(plan, pipeline, log, donate=donate)
    results = {
        "programs": program.programs,
        "achieved": sum(r["zeros"] for r in rows) / sum(r["size"] for r in rows),
        "seconds": time.perf_counter() - started,
        "unseen": dict(program.trace.unseen),
        "weights": rows,
    }
    pruned = jax.tree.unflatten(jax.tree.structure(params), program.leaves.all)
    return PruneResult(pruned, facts | results)


def _checked_leaves(
    program: SegmentedProgram, *, donate: bool
) -> dict[str, Fingerprint]:
    """The fingerprints of the leaves to prune, none of which is damaged or shared."""
    plans.check_leaves(program.leaves, program.ops, donate=donate)
    names = {op.leaf: op.view.leaf for op in program.ops}
    prints = fingerprint.of_leaves(names, program.leaves)
    plans.check_finite(prints)
    return prints


def _on_explicit_axes(params: Params) -> list[str]:
    """The names of the leaves that lie on a mesh with Explicit axes."""
    shardings = {
        name: getattr(leaf, "sharding", None)
        for name, leaf in tree.named_leaves(params).items()
    }
    return [
        name
        for name, sharding in shardings.items()
        if isinstance(sharding, NamedSharding)
        and AxisType.Explicit in sharding.mesh.axis_types
    ]


def _calibration_facts(pipeline: SequentialPipeline) -> dict[str, Any]:
    """What the report says of the batches, before the job has begun."""
    # At the first input; each other one has as many samples.
    size = math.prod(pipeline.program.segments[0].source.leading)
    counted = pipeline.counted
    samples = [size if mask is None else int(mask.sum()) for mask in counted]
    return {
        "positions": "all" if counted[0] is None else "chosen",
        "samples": sum(samples),
        "batches": len(counted),
    }
