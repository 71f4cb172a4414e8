"""`jaxprune prune` of a model that goes through torch: measured, pruned, written.

The module is the JAX function of `jp.torch.function`, so every method prunes it,
segment by segment. What is done is kept beside OUT, and the same command goes on there.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

import jaxprune as jp
from jaxprune.arrays.messages import columns
from jaxprune.arrays.rules import Rule, check, reworded
from jaxprune.lm.checkpoints import rewrite
from jaxprune.lm.checkpoints.checkpoint_dir import open_directory
from jaxprune.lm.jobs import passes, progress_dir, provenance
from jaxprune.lm.jobs.console import Console
from jaxprune.lm.jobs.exclusions import check_globs
from jaxprune.lm.jobs.provenance import Page
from jaxprune.lm.jobs.prune_settings import PruneJob
from jaxprune.lm.measure.machine import Costs
from jaxprune.lm.torch_models import measures, writing
from jaxprune.lm.torch_models.model_inputs import read_inputs
from jaxprune.lm.torch_models.opening import (
    TorchModel,
    open_torch_model,
    prunable_parameter,
    round_as_stored,
)
from jaxprune.lm.torch_models.option_rules import check_torch_prune
from jaxprune.lm.torch_models.outcome import describe_inputs, job_facts, torch_versions
from jaxprune.lm.torch_models.routing import begin_through_torch
from jaxprune.lm.torch_models.samples import JobInputs, as_tensors
from jaxprune.torch.comparison import relative_difference
from jaxprune.typing import Prunable


@dataclasses.dataclass(frozen=True)
class TorchPruning:
    """A pruning that has been checked, with all that it needs in memory.

    Attributes:
      job: settings.
      chosen: method, pattern and what else is done.
      model: directory and module.
      inputs: what is calibrated on and measured.
      fn: JAX function of the parameters and a batch.
      params: {torch name: array}.
      prunable: which parameters may be pruned.
    """

    job: PruneJob
    chosen: passes.Pass
    model: TorchModel
    inputs: JobInputs
    fn: Callable[[Any, Any], Any]
    params: Mapping[str, Any]
    prunable: Prunable

    def facts(self) -> dict[str, Any]:
        """What decides the pruned weights, known without pruning."""
        words = self.chosen.facts()
        return {
            **job_facts(self.job, self.model, self.inputs),
            **words,
            "method": f"{self.job.pruning.method}: {words['settings']}",
            "sparsity": self.job.pruning.sparsity,
            "allocation": self.job.pruning.allocation,
            "excluded": list(self.job.pruning.exclude),
        }

    def prune(self) -> Any:
        """Prunes the parameters; the result of `jp.prune_trained`."""
        samples = self.inputs.calibration
        # A rule asks for a calibration, so there are samples.
        batches = samples.batches(self.job.calibration.batch) if samples else ()
        return jp.prune_trained(
            self.fn,
            self.params,
            map(jp.torch.as_arrays, map(as_tensors, batches)),
            self.chosen.chain,
            sparsity=self.chosen.sparsity,
            pattern=self.chosen.pattern,
            allocation=self.chosen.allocation,
            prunable=self.prunable,
            directory=self.job.work,
        )


def run_torch_prune(
    job: PruneJob, console: Console, command: str, page: Page
) -> dict[str, Any]:
    """Prunes a directory of transformers, through torch.

    Args:
      job: what was asked for.
      console: where the job speaks.
      command: words that the record says made it, and that a second run is known by.
      page: function that makes report.html of the record.

    Returns:
      The record, as in jaxprune.json; with `plan`, what would be done.

    Raises:
      ValueError: something does not fit; nothing was written.
    """
    progress_dir.refuse_done(job, command)
    begin_through_torch(job.model, console)
    method = job.pruning.method or "sparsegpt"
    job = dataclasses.replace(
        job, pruning=dataclasses.replace(job.pruning, method=method)
    )
    chosen = check_torch_prune(job)
    # A module of the user's that is not there is said before the model is read.
    metric = measures.load_metric(job.evaluation.metric)
    costs = Costs()
    with costs.phase("read"):
        pruning = begin_pruning(job, chosen)
    if pruning.model.unread:
        console.note(
            f"{pruning.model.class_name} does not read {len(pruning.model.unread)} "
            "tensors, which are copied"
        )
    if job.plan:
        return _plan(pruning, console)
    measurements = measures.TorchMeasurements(
        pruning.inputs.measured, job.calibration.batch, metric, console
    )
    with progress_dir.hold_progress(job.work, pruning.facts()):
        module = pruning.model.module
        # A run that goes on measures the dense model again, which is cheap.
        with costs.phase("evaluate before"):
            measurements.measure("dense", module)
            measurements.check_sane(module, job.evaluation.any_perplexity)
        with costs.phase("prune"):
            result = pruning.prune()
            jp.torch.load(module, result.params)
            round_as_stored(pruning.model.source, module)
        # The same module by now, with the weights that will be written.
        with costs.phase("evaluate after"):
            measurements.measure("pruned", module)
        record = _pruning_record(pruning, result.report) | measurements.facts()
        record |= provenance.environment(command) | {"versions": torch_versions()}
        writing.write_pruned(job, pruning.model, record, costs, page)
    return rewrite.read_provenance(job.out)


def begin_pruning(job: PruneJob, chosen: passes.Pass) -> TorchPruning:
    """Reads model and inputs, traces the model, and refuses what does not fit."""
    source = open_directory(job.model)
    # The result and the progress.
    progress_dir.check_room(job, job.recovery, source, 2)
    model = open_torch_model(source, job.loading.dtype)
    inputs = read_inputs(job, model)
    # One sample shows the program; its batches may be larger.
    samples = inputs.calibration or next(iter(inputs.measured.values())).samples
    fn, params = traced_function(model, next(samples.batches(1)))
    # A convolution is pruned too, where its use is known.
    check_globs(
        job.pruning.exclude,
        params,
        lambda name, leaf: (
            None
            if prunable_parameter(model.module, ())(name, leaf)
            else "no matrix of a layer"
        ),
    )
    prunable = prunable_parameter(model.module, job.pruning.exclude)
    return TorchPruning(job, chosen, model, inputs, fn, params, prunable)


def traced_function(model: TorchModel, batch: Mapping[str, Any]) -> Any:
    """The module as a JAX function, tried in torch and traced on one batch.

    Args:
      model: directory and module.
      batch: {argument: array}, what it is called with.

    Returns:
      The function and its parameters.

    Raises:
      ValueError: the module cannot be called with the inputs, or cannot be traced; the
        sentence names the operation and the submodule.
    """
    example = as_tensors(batch)
    module, class_name = model.module, model.class_name
    # In torch first: what fails there is no fault of the tracing.
    try:
        reference = measures.run_module(module, batch)
    except Exception as failure:
        reason = (str(failure).strip().splitlines() or [""])[0]
        raise ValueError(
            f"{class_name} must take the inputs {', '.join(example)}, but fails "
            f"({type(failure).__name__}: {reason}); give all its arguments, as .npz"
        ) from failure
    try:
        fn, params = jp.torch.function(module, example)
    except TypeError as failure:  # which is a defect where nobody expects it
        raise reworded(failure, ValueError, f"{class_name}: ") from failure
    # What is pruned is the function, and what is written is the module.
    result = fn(params, jp.torch.as_arrays(example))
    difference = relative_difference(result, reference)
    check(
        [_SAME],
        same=difference <= _tolerance(reference),
        class_name=class_name,
        difference=f"{difference:.1e}",
    )
    return fn, params


def _tolerance(reference: Any) -> float:
    """Largest difference of outputs, relative to the largest, by their dtypes."""
    leaves = jax.tree.leaves(reference)
    floating = [x.dtype for x in leaves if jnp.issubdtype(x.dtype, jnp.floating)]
    # Layer after layer rounds what the one before has rounded.
    return max([1e-3, *(64 * float(jnp.finfo(dtype).eps) for dtype in floating)])


def _pruning_record(pruning: TorchPruning, report: Mapping[str, Any]) -> dict[str, Any]:
    """What jaxprune.json says besides what was measured."""
    job, chosen, words = pruning.job, pruning.chosen, pruning.chosen.facts()
    bits, group = job.quantization.bits, job.quantization.group
    solver = job.solver
    return {
        "through": f"torch, as {pruning.model.class_name}",
        "method": job.pruning.method,
        "settings": words["settings"],
        "pattern": words["pattern"],
        "sparsity": chosen.sparsity,
        "allocation": job.pruning.allocation,
        "rounding": {"bits": bits, "group": group} if bits else None,
        "excluded": list(job.pruning.exclude),
        "calibration": {
            **describe_inputs(job.calibration, pruning.inputs),
            "positions": report["positions"],
        },
        "unseen": report["unseen"],
        # The page names rows by the tensors, which here are called as the parameters.
        "weights": [{**row, "leaf": row["name"]} for row in report["weights"]],
        "refine": solver.refine
        and {
            "passes": solver.refine,
            "learning_rate": solver.refine_learning_rate,
            "blocks": report["refined"],
        },
    }


def _plan(pruning: TorchPruning, console: Console) -> dict[str, Any]:
    """Says what would be pruned, and on what."""
    batch = jp.torch.as_arrays(
        as_tensors(next(pruning.inputs.calibration.batches(1)))  # type: ignore[union-attr]
    )
    trace = jp.trace(pruning.fn, pruning.params, batch)
    matrices = dict.fromkeys(op.leaf for op in trace.linear_ops)
    rows = [
        {"tensor": name, "shape": list(leaf.shape), "count": 1, "weights": leaf.size}
        for name in matrices
        if pruning.prunable(name, leaf := pruning.params[name])
    ]
    cells = [
        [row["tensor"], " x ".join(map(str, row["shape"])), f"{row['weights']:,}"]
        for row in rows
    ]
    console.say(columns([["to be pruned", "shape", "weights"], *cells], right=True))
    total = sum(row["weights"] for row in rows)
    method, disk = pruning.job.pruning.method, 2 * pruning.model.source.size
    console.say(
        f"\n{total:,} weights in {len(rows)} tensors would be pruned by {method}; "
        f"about {disk:,} bytes of disk"
    )
    return {
        "plan": rows,
        "method": method,
        "pattern": pruning.chosen.facts()["pattern"],
        "sparsity": pruning.chosen.sparsity,
        "allocation": pruning.job.pruning.allocation,
        "disk_bytes": disk,
    }


_SAME = Rule(
    lambda v: v.same,
    "JAX must compute what torch computes, but the outputs of {class_name} differ by "
    "{difference} of the largest; it may write in place into what it reads later",
    "prune it by magnitude, without --calibration",
)
