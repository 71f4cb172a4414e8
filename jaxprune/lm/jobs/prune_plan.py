"""`jaxprune prune --plan`: which matrices would be pruned, and how."""

import math
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

from jaxprune.arrays import tree
from jaxprune.arrays.messages import columns
from jaxprune.lm.checkpoints import prune_magnitude
from jaxprune.lm.checkpoints.checkpoint_dir import CheckpointDir, open_directory
from jaxprune.lm.jobs import inputs, passes, progress_dir
from jaxprune.lm.jobs.console import Console
from jaxprune.lm.jobs.exclusions import check_globs, prunable_tensor, why_kept
from jaxprune.lm.jobs.inputs import JobTexts
from jaxprune.lm.jobs.model_pruning import ModelPruning
from jaxprune.lm.jobs.plan_words import say_texts
from jaxprune.lm.jobs.prune_settings import PruneJob
from jaxprune.typing import Pattern


class _Plan(NamedTuple):
    """What a pruning would do.

    Attributes:
      source: directory of the model.
      names: names of the tensors that would be pruned.
      texts: what would be calibrated and evaluated on, or None.
    """

    source: CheckpointDir
    names: set[str]
    texts: JobTexts | None


def plan_prune(
    job: PruneJob,
    chosen: passes.Pass,
    pruning: ModelPruning | None,
    console: Console,
) -> dict[str, Any]:
    """Says what `jaxprune prune` would do.

    Args:
      job: what was asked for.
      chosen: method, pattern and what else would be done.
      pruning: pruning that was begun, or None where the model is not loaded.
      console: where it is said.

    Returns:
      A JSON-able plan.
    """
    if pruning is None:
        plan = _plan_streaming(job, chosen.pattern)
    else:
        plan = _plan_pruning(pruning)
    rows = _matrices(plan.source, plan.names)
    pattern, sparsity = passes.pattern_word(chosen.pattern), job.pruning.sparsity
    asked = pattern if sparsity is None else f"sparsity {sparsity:g}, {pattern}"
    total = sum(row["weights"] for row in rows)
    console.say(_table(rows))
    console.say(
        f"\n{total:,} weights in {len(plan.names)} matrices would be pruned by "
        f"{job.pruning.method} ({asked}, allocation {job.pruning.allocation})"
    )
    if reasons := _reasons(plan, job.pruning.exclude):
        counts = ", ".join(f"{count} ({why})" for why, count in reasons.items())
        console.say(f"left alone: {counts}")
    say_texts(job, plan.texts, console)
    return {
        "plan": rows,
        "method": job.pruning.method,
        "pattern": pattern,
        "sparsity": chosen.sparsity,
        "allocation": job.pruning.allocation,
    }


def _plan_pruning(pruning: ModelPruning) -> _Plan:
    model = pruning.model
    names = {  # experts are several
        tensor
        for name, leaf in tree.named_leaves(model.params).items()
        if pruning.prunable(name, leaf)
        for tensor in model.names[name].names
    }
    return _Plan(pruning.source, names, pruning.texts)


def _plan_streaming(job: PruneJob, pattern: Pattern) -> _Plan:
    source = open_directory(job.model)
    exclude = job.pruning.exclude
    check_globs(exclude, source.tensors)
    progress_dir.check_room(job, source, 1)
    prune_magnitude.to_prune(source, pattern, prunable_tensor(exclude))
    names = {
        name
        for name, info in source.tensors.items()
        if why_kept(name, info, exclude) is None
    }
    if not job.runs_model:
        return _Plan(source, names, None)
    texts = inputs.read_texts(job, source)
    return _Plan(source, names, texts)


def _matrices(source: CheckpointDir, names: set[str]) -> list[dict[str, Any]]:
    """The matrices, those of a name but for its numbers together, in their order."""
    counts: Counter[tuple[str, tuple[int, ...]]] = Counter(
        (re.sub(r"(?<=[./])\d+(?=[./])", "*", name), info.shape)
        for name, info in source.tensors.items()
        if name in names
    )
    return [
        {
            "tensor": name,
            "shape": list(shape),
            "count": count,
            "weights": count * math.prod(shape),
        }
        for (name, shape), count in counts.items()
    ]


def _table(rows: Iterable[dict[str, Any]]) -> str:
    cells = [
        [
            row["tensor"],
            " x ".join(map(str, row["shape"])),
            str(row["count"]),
            f"{row['weights']:,}",
        ]
        for row in rows
    ]
    header = ["to be pruned", "shape", "count", "weights"]
    return columns([header, *cells], right=True)


def _reasons(plan: _Plan, exclude: tuple[str, ...]) -> Counter[str]:
    """Why tensors stay as they are, and how many for each reason."""
    return Counter(
        why_kept(name, info, exclude) or "not the matrix of a linear op"
        for name, info in plan.source.tensors.items()
        if name not in plan.names
    )
