"""`jaxprune prune` of a model that goes through torch: measured, pruned, written.

The module is the JAX function of `jp.torch.function`, so every method prunes it,
segment by segment. What is done is kept beside OUT, and the same command goes on there.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

import jaxprune as jp
from jaxprune.arrays.messages import first_line
from jaxprune.arrays.rules import reworded
from jaxprune.lm.steps import passes, provenance
from jaxprune.lm.steps.console import Console
from jaxprune.lm.steps.exclusions import check_globs
from jaxprune.lm.steps.prune import (
    check_prune,
    choose_by_effort,
    say_plan,
    with_method,
)
from jaxprune.lm.steps.prune_record import (
    describe_pruning,
    pruning_facts,
    write_replaced,
)
from jaxprune.lm.steps.settings import PruneJob
from jaxprune.lm.steps.skeleton import Change, Prepared
from jaxprune.lm.torch_models import measures
from jaxprune.lm.torch_models.opening import (
    TorchModel,
    changed_tensors,
    parameters_of_tensors,
    prunable_parameter,
    round_as_stored,
    stored_tensors,
)
from jaxprune.lm.torch_models.routing import begin_through_torch
from jaxprune.lm.torch_models.samples import as_tensors
from jaxprune.lm.torch_models.torch_step import TorchStep, open_torch_step
from jaxprune.torch.comparison import module_difference
from jaxprune.torch.conversion import as_numpy
from jaxprune.typing import Prunable


def prepare_torch_prune(job: PruneJob, console: Console) -> Prepared:
    """A pruning through torch, for `run_job`: all is read and checked."""
    begin_through_torch(job.model, console)
    job = choose_by_effort(job, own_text=False)
    job = with_method(job, job.pruning.method or "sparsegpt")
    if not job.calibration.calibration:
        raise ValueError(
            "a model that goes through torch is pruned by what it does to inputs, and "
            "none are given; give --calibration with a text, a folder of pictures or "
            "of wav files, or .npz of its arguments; or --method magnitude without "
            "options that run the model"
        )
    chosen = check_prune(job, through_torch=True)
    fields = open_torch_step(job, console, copies=2)  # the result and the progress
    model, inputs = fields["model"], fields["inputs"]
    with fields["costs"].phase("trace"):
        # One sample shows the program; its batches may be larger.
        samples = inputs.calibration or next(iter(inputs.measured.values())).samples
        fn, params = traced_function(model, next(samples.batches(1)))
        check_globs(job.pruning.exclude, params, _why_never_pruned(model))
    if model.unread:
        console.note(
            f"{model.class_name} does not read {len(model.unread)} tensors, which are "
            "copied"
        )
    pruning = TorchPruning(**fields, chosen=chosen, fn=fn, params=params)
    return Prepared(pruning.plan, pruning.run)


def _why_never_pruned(model: TorchModel) -> Callable[[str, Any], str | None]:
    # A convolution is pruned too, where its use is known.
    may_be_pruned = prunable_parameter(model.module, ())
    return lambda name, leaf: (
        None if may_be_pruned(name, leaf) else "no matrix of a layer"
    )


@dataclasses.dataclass(kw_only=True)
class TorchPruning(TorchStep[PruneJob]):
    """A pruning of a module by what it does to inputs.

    Attributes:
      chosen: method, pattern and what else is done.
      fn: JAX function of the parameters and a batch.
      params: {torch name: array}.
    """

    NAME, STAGES = "prune", ("dense", "pruned")

    chosen: passes.Pass
    fn: Callable[[Any, Any], Any]
    params: Mapping[str, Any]

    def facts(self) -> dict[str, Any]:
        """What decides the pruned weights, known without pruning."""
        return {**super().facts(), **pruning_facts(self.job, self.chosen)}

    @functools.cached_property
    def prunable(self) -> Prunable:
        """Which parameters may be pruned."""
        return prunable_parameter(self.model.module, self.job.pruning.exclude)

    def change(self) -> Change[Any]:
        """Prunes the module in place, and rounds it to what its directory can hold."""
        samples, module = self.inputs.calibration, self.model.module
        # A rule asks for a calibration, so there are samples.
        batches = samples.batches(self.job.calibration.batch) if samples else ()
        result = jp.prune_trained(
            self.fn,
            self.params,
            map(jp.torch.as_arrays, map(as_tensors, batches)),
            self.chosen.chain,
            prunable=self.prunable,
            directory=self.job.work,
        )
        jp.torch.load(module, result.params)
        by_tensor = parameters_of_tensors(module)
        round_as_stored(self.source, module, by_tensor)
        parameters = {_parameter_of(row["name"]) for row in result.report["weights"]}
        pruned = {
            n for n in self.source.tensors if by_tensor.get(n, set()) & parameters
        }
        moved = {*changed_tensors(self.source, stored_tensors(module))}
        record = describe_pruning(
            self.job,
            self.chosen,
            self.described_inputs,
            result.report,
            functools.partial(_tensor_name, by_tensor),
        )
        record["through"] = f"torch, as {self.model.class_name}"
        return Change(module, pruned | moved, pruned, record)

    def finish(self, change: Change[Any]) -> None:
        """Adds the sizes of the result."""
        stored = stored_tensors(change.model)
        counts = jp.sparsity({n: as_numpy(stored[n]) for n in change.matrices}).by_leaf
        change.record["sizes"] = provenance.weight_sizes(
            self.source, counts, self.job.pruning
        )

    def write(self, change: Change[Any]) -> None:
        """Writes the tensors that moved, in the form that they were read in."""
        stored = stored_tensors(change.model)
        replaced = {name: as_numpy(stored[name]) for name in change.moved}
        write_replaced(self.job, self.source, replaced, change.matrices, change.record)

    def plan(self) -> dict[str, Any]:
        """Says what would be pruned, and on what."""
        samples: Any = self.inputs.calibration  # a rule asks for one
        batch = jp.torch.as_arrays(as_tensors(next(samples.batches(1))))
        trace = jp.trace(self.fn, self.params, batch)
        matrices = {
            op.leaf
            for op in trace.linear_ops
            if self.prunable(op.leaf, self.params[op.leaf])
        }
        by_tensor = parameters_of_tensors(self.model.module)
        names = {n for n in self.source.tensors if by_tensor.get(n, set()) & matrices}
        return say_plan(self.job, self.chosen, self.source, names, self.console)


def _parameter_of(weight: str) -> str:
    """The parameter of a weight, which may be one matrix of it ("experts/3") or a part.

    Names of torch have neither a slash nor a bracket.
    """
    return re.split(r"[/\[]", weight)[0]


def _tensor_name(by_tensor: Mapping[str, set[str]], weight: str) -> str:
    """The tensor that holds a weight; its own name where that is split or joined."""
    parameter = _parameter_of(weight)
    # Old directories have other names than the class of today.
    tensors = [name for name, parts in by_tensor.items() if parts == {parameter}]
    # Of several, experts that were read one by one, none is the whole parameter.
    name = tensors[0] if len(tensors) == 1 else parameter
    return name + weight.removeprefix(parameter)


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
        raise ValueError(
            f"{class_name} must take the inputs {', '.join(example)}, but fails "
            f"({type(failure).__name__}: {first_line(failure)}); give all its "
            "arguments, as .npz"
        ) from failure
    try:
        fn, params = jp.torch.function(module, example)
    except TypeError as failure:  # which is a defect where nobody expects it
        raise reworded(failure, ValueError, f"{class_name}: ") from failure
    # What is pruned is the function, and what is written is the module.
    result = fn(params, jp.torch.as_arrays(example))
    difference = module_difference(result, reference)
    if not difference <= _tolerance(reference):
        raise ValueError(
            f"JAX must compute what torch computes, but the outputs of {class_name} "
            f"differ by {difference:.1e} of the largest; it may write in place into "
            "what it reads later; prune it by magnitude, without --calibration"
        )
    return fn, params


def _tolerance(reference: Any) -> float:
    """Largest difference of outputs, relative to the largest, by their dtypes."""
    leaves = jax.tree.leaves(reference)
    floating = [x.dtype for x in leaves if jnp.issubdtype(x.dtype, jnp.floating)]
    # Layer after layer rounds what the one before has rounded.
    return max([1e-3, *(64 * float(jnp.finfo(dtype).eps) for dtype in floating)])
