"""What is written of a pruned model: its tensors, and what jaxprune.json says."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jaxprune as jp
from jaxprune.arrays import processes
from jaxprune.lm.checkpoints import rewrite
from jaxprune.lm.checkpoints.checkpoint_dir import CheckpointDir
from jaxprune.lm.models.loaded_model import LoadedModel
from jaxprune.lm.steps import passes, provenance
from jaxprune.lm.steps.console import byte_progress
from jaxprune.lm.steps.settings import Job, PruneJob
from jaxprune.lm.steps.skeleton import Change


def pruning_facts(job: PruneJob, chosen: passes.Pass) -> dict[str, Any]:
    """What decides the pruned weights beside the model and its inputs; JSON-able."""
    words, pruning = chosen.facts(), job.pruning
    return {
        **words,
        "method": f"{pruning.method}: {words['settings']}",
        "sparsity": pruning.sparsity,
        "allocation": pruning.allocation,
        "excluded": list(pruning.exclude),
    }


def describe_pruning(
    job: PruneJob,
    chosen: passes.Pass,
    calibration: Mapping[str, Any],
    report: Mapping[str, Any],
    tensor_name: Callable[[str], str] = str,
) -> dict[str, Any]:
    """What jaxprune.json says besides what was measured.

    Args:
      job: what was asked for.
      chosen: method, pattern and what else was done.
      calibration: what is said of what was calibrated on.
      report: report of `jp.prune_trained`.
      tensor_name: function of a leaf's name to the name of its tensor, which the page
        names rows by.

    Returns:
      A JSON-able record.
    """
    pruning, words = job.pruning, chosen.facts()
    rounding = {"bits": pruning.bits, "group": pruning.group}
    return {
        "method": job.pruning.method,
        "settings": words["settings"],
        "pattern": words["pattern"],
        "sparsity": chosen.sparsity,
        "allocation": job.pruning.allocation,
        "rounding": rounding if pruning.quantize else None,
        "excluded": list(job.pruning.exclude),
        "calibration": {**calibration, "positions": report["positions"]},
        "unseen": report["unseen"],
        "weights": [
            {**row, "name": tensor_name(row["name"]), "leaf": row["name"]}
            for row in report["weights"]
        ],
    }


def count_zeros(model: LoadedModel, leaves: set[str]) -> dict[str, tuple[int, int]]:
    """Tensor name to zeros and size, of the pruned leaves."""
    named = jp.tree.named_leaves(model.params)
    tensors = {  # an expert's matrix is a tensor of its own
        tensor: named[name][i] if model.names[name].experts else named[name]
        for name in leaves
        for i, tensor in enumerate(model.names[name].names)
    }
    return jp.sparsity(tensors).by_leaf


def write_pruned(job: Job, source: CheckpointDir, change: Change[LoadedModel]) -> None:
    """Writes the directory of a pruned model; each process hands over its parts.

    Args:
      job: place of the result, and whether an earlier one is replaced.
      source: directory of the dense model, which all else is copied from.
      change: model whose leaves that moved are written.
    """
    model = change.model
    named = jp.tree.named_leaves(model.params)

    def stored(leaf: str, i: int) -> Any:
        return model.names[leaf].stored(processes.fetch(named[leaf]), i)

    replaced: dict[str, Any] = {}  # tensor name to what gives it when it is due
    for name in sorted(change.moved):
        origin = model.names[name]
        for i, tensor in enumerate((*origin.names, *origin.copies)):
            replaced[tensor] = functools.partial(stored, name, i)
    if not processes.is_first():  # hands over its parts, in the order of writing
        for name in rewrite.order(source, replaced):
            replaced[name]()
        return
    pruned = {tensor for name in change.matrices for tensor in model.names[name].names}
    write_replaced(job, source, replaced, pruned, change.record)


def write_replaced(
    job: Job,
    source: CheckpointDir,
    replaced: Mapping[str, Any],
    pruned: set[str],
    record: Mapping[str, Any],
) -> None:
    """Writes a directory with new values of some tensors, with its record and page.

    Args:
      job: place of the result, and whether an earlier one is replaced.
      source: directory of the dense model, which all else is copied from.
      replaced: tensor name to its values, or to a function that gives them.
      pruned: names of those tensors whose zeros count.
      record: what jaxprune.json says.
    """
    with byte_progress(source.size, "writing") as progress:
        rewrite.write_directory(
            source,
            job.out,
            replaced,
            # A recovery moves norms, biases and embeddings too.
            uncounted=replaced.keys() - pruned,
            provenance=record,
            overwrite=job.overwrite,
            progress=progress,
            finish=lambda _, facts: ({}, provenance.page_file(facts)),
        )
