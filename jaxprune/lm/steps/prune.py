"""`jaxprune prune`: a model pruned by what its layers do to texts."""

import dataclasses
import functools
import math
import re
from collections import Counter
from typing import Any

import jax
import numpy as np
from flax import nnx

import jaxprune as jp
from jaxprune.arrays import processes
from jaxprune.arrays.axes import Axes
from jaxprune.arrays.messages import columns, listed
from jaxprune.lm.checkpoints import prune_magnitude
from jaxprune.lm.checkpoints.checkpoint_dir import CheckpointDir, open_directory
from jaxprune.lm.models import hf
from jaxprune.lm.models.hf.families import FAMILIES
from jaxprune.lm.models.loaded_model import LoadedModel, device_mesh
from jaxprune.lm.steps import (
    passes,
    progress_dir,
    provenance,
    rules,
    step_texts,
)
from jaxprune.lm.steps.console import Console
from jaxprune.lm.steps.exclusions import (
    check_globs,
    prunable_leaf,
    prunable_tensor,
    why_kept,
)
from jaxprune.lm.steps.family_step import FamilyStep, open_step
from jaxprune.lm.steps.opening import as_stored, fitted
from jaxprune.lm.steps.prune_record import (
    count_zeros,
    describe_pruning,
    pruning_facts,
    write_pruned,
)
from jaxprune.lm.steps.prune_streaming import prune_by_magnitude
from jaxprune.lm.steps.settings import SELF, PruneJob
from jaxprune.lm.steps.skeleton import Change, Prepared
from jaxprune.posttraining.passes.efforts import LEVELS
from jaxprune.typing import Pattern, Prunable


def prepare_prune(job: PruneJob, console: Console) -> Prepared:
    """Reads what a pruning needs, and refuses what does not fit.

    Args:
      job: options of the pruning.
      console: where it speaks.

    Returns:
      The pruning, ready to run.

    Raises:
      ValueError: something does not fit; nothing was written.
    """
    job = choose_by_effort(job)
    if job.pruning.method is None:
        family = str(open_directory(job.model).config.get("model_type"))
        runs_model = (*job.calibration.calibration, *job.calibration.evaluate)
        known = family in FAMILIES or runs_model or job.pruning.quantize
        job = with_method(job, "sparsegpt" if known else "magnitude")
        if not known:
            console.note(
                f"pruned by magnitude, since the code of model_type {family} is not "
                "here; --method says another"
            )
    writes_itself = not (job.calibration.calibration or job.streams)
    if writes_itself:
        calibration = dataclasses.replace(job.calibration, calibration=(SELF,))
        job = dataclasses.replace(job, calibration=calibration)
    chosen = processes.together(lambda: check_prune(job))
    if writes_itself:
        console.note(
            "calibrated on what the model writes itself; a text of the kind that it is "
            "used on does better: --calibration FILE..."
        )
    if job.streams:
        return Prepared(
            functools.partial(_plan_streaming, job, chosen, console),
            functools.partial(prune_by_magnitude, job, chosen, console),
        )
    pruning = processes.together(lambda: _open(job, chosen, console))
    return Prepared(pruning.plan, pruning.run)


def choose_by_effort(job: PruneJob, *, own_text: bool = True) -> PruneJob:
    """The pruning with the method and the texts that its effort stands for."""
    effort = job.pruning.effort
    if effort is None:
        return job
    if job.pruning.method is not None:
        raise ValueError(
            f"--effort {effort} says what --method would; leave one of them out"
        )
    job, texts = with_method(job, LEVELS[effort].method), job.calibration
    own_text &= LEVELS[effort].own_text and not job.pruning.distributed
    if not own_text or SELF in texts.calibration:
        return job
    texts = dataclasses.replace(texts, calibration=(*texts.calibration, SELF))
    return dataclasses.replace(job, calibration=texts)


def with_method(job: PruneJob, method: Any) -> PruneJob:
    """The pruning by another method."""
    return dataclasses.replace(
        job, pruning=dataclasses.replace(job.pruning, method=method)
    )


def check_prune(job: PruneJob, *, through_torch: bool = False) -> passes.Pass:
    """Refuses what can be refused of a pruning without opening the model.

    Args:
      job: options of the pruning, with its method.
      through_torch: whether the model is of no family of ours.

    Returns:
      What its words mean.

    Raises:
      ValueError: a rule is broken; the sentence names the option.
    """
    pattern = passes.choose_pattern(job.pruning)
    mesh = device_mesh(job.loading.mesh)
    rules.check_options(
        job,
        rules.PRUNE,
        through_torch=through_torch,
        pattern=passes.pattern_word(pattern),
        units=pattern,
        fixed=pattern.sparsity,
        streams=job.streams,
        device_count=None if mesh is None else mesh.size,
    )
    return passes.choose_pass(job)


def _open(job: PruneJob, chosen: passes.Pass, console: Console) -> "FamilyPruning":
    # By names and shapes, before a text is tokenized.
    check_globs(job.pruning.exclude, open_directory(job.model).tensors)
    fields = open_step(job, console, copies=2)
    names = fields["model"].names
    prunable = prunable_leaf(lambda leaf: names[leaf].names, job.pruning.exclude)
    _check_pattern(chosen.pattern, fields["model"], prunable)
    return FamilyPruning(**fields, chosen=chosen, prunable=prunable)


def _check_pattern(pattern: Pattern, model: LoadedModel, prunable: Prunable) -> None:
    """Refuses matrices that the pattern does not fit, by the directory's names."""
    problems: dict[str, list[str]] = {}
    for name, leaf in jp.tree.named_leaves(model.params).items():
        if prunable(name, leaf) and (problem := pattern.problem(leaf.shape, Axes())):
            problems.setdefault(problem, []).append(model.names[name].name)
    if problems:
        places = (f"{why} at {listed(names)}" for why, names in problems.items())
        raise ValueError(f"{'; '.join(places)}; leave such tensors out with --exclude")


@dataclasses.dataclass(kw_only=True)
class FamilyPruning(FamilyStep[PruneJob]):
    """A pruning of a model of a family of ours.

    Attributes:
      chosen: method, pattern and what else is done.
      prunable: which leaves may be pruned.
    """

    NAME, STAGES = "prune", ("dense", "pruned")

    chosen: passes.Pass
    prunable: Prunable

    def facts(self) -> dict[str, Any]:
        """What decides the pruned weights, as far as it is known without reading."""
        return {**super().facts(), **pruning_facts(self.job, self.chosen)}

    def change(self) -> Change[LoadedModel]:
        """Prunes the model segment by segment, its parameters read as they are due."""
        job, model = self.job, self.model
        self.console.note(f"what is done is kept in '{job.work}' until the end")
        tokens = self.texts.sequences  # (sequences, length)
        # (batch, length, width) each. The table of embeddings stays in its file.
        embedded = (
            hf.embedded(job.model, model.names, model.config, part, job.loading.dtype)
            for part in np.split(tokens, len(tokens) // job.calibration.batch)
        )
        result = jp.prune_trained(
            functools.partial(_final_states, model.graphdef),
            model.params,
            embedded,
            self.chosen.chain,
            prunable=self.prunable,
            directory=job.work,
            mesh=device_mesh(job.loading.mesh),
        )
        leaves = {row["name"] for row in result.report["weights"]}
        pruned = as_stored(model._replace(params=result.params).read(), leaves)
        record = describe_pruning(
            job,
            self.chosen,
            self.texts.describe(job.calibration),
            result.report,
            lambda leaf: model.names[leaf].name,
        )
        return Change(pruned, leaves, leaves, record | {"dtype": model.config.dtype})

    def finish(self, change: Change[LoadedModel]) -> None:
        """Adds the sizes of the pruned model."""
        counts = count_zeros(change.model, change.matrices)
        change.record["ignored_config"] = list(self.model.ignored)
        sizes = provenance.weight_sizes(self.source, counts, self.job.pruning)
        change.record["sizes"] = sizes

    def write(self, change: Change[LoadedModel]) -> None:
        """Writes the leaves that moved; the zeros of those that were pruned count."""
        write_pruned(self.job, self.source, change)

    def plan(self) -> dict[str, Any]:
        """Says which matrices would be pruned, and by which texts."""
        names = {  # experts are several
            tensor
            for name, leaf in jp.tree.named_leaves(self.model.params).items()
            if self.prunable(name, leaf)
            for tensor in self.model.names[name].names
        }
        plan = say_plan(self.job, self.chosen, self.source, names, self.console)
        for line in self.texts.plan_lines(self.job.calibration):
            self.console.say(line)
        return plan


def _final_states(graphdef: Any, params: Any, embedded: jax.Array) -> jax.Array:
    """The final states (batch, length, width): all that is pruned is before them."""
    return nnx.merge(graphdef, params).states(embedded)[0]


def _plan_streaming(
    job: PruneJob, chosen: passes.Pass, console: Console
) -> dict[str, Any]:
    source = open_directory(job.model)
    exclude = job.pruning.exclude
    check_globs(exclude, source.tensors)
    progress_dir.check_room(job, source.size)
    prune_magnitude.to_prune(source, chosen.pattern, prunable_tensor(exclude))
    kept = {name: why_kept(name, x, exclude) for name, x in source.tensors.items()}
    names = {name for name, why in kept.items() if why is None}
    plan = say_plan(job, chosen, source, names, console)
    if job.calibration.evaluate:
        texts = fitted(job.calibration, source, job.loading.ignore_config)
        job = dataclasses.replace(job, calibration=texts)
        for line in step_texts.read_texts(job, source).plan_lines(texts):
            console.say(line)
    return plan


def say_plan(
    job: PruneJob,
    chosen: passes.Pass,
    source: CheckpointDir,
    names: set[str],
    console: Console,
) -> dict[str, Any]:
    """Says which tensors would be pruned and which would be left alone.

    Args:
      job: options of the pruning.
      chosen: what they mean.
      source: directory of the model.
      names: names of the tensors that would be pruned.
      console: where it is said.

    Returns:
      The plan; JSON-able.
    """
    counts: Counter[tuple[str, tuple[int, ...]]] = Counter(
        (re.sub(r"(?<=[./])\d+(?=[./])", "*", name), info.shape)
        for name, info in source.tensors.items()
        if name in names
    )
    rows: list[dict[str, Any]] = [
        {
            "tensor": name,
            "shape": list(shape),
            "count": count,
            "weights": count * math.prod(shape),
        }
        for (name, shape), count in counts.items()
    ]
    cells = [
        [
            r["tensor"],
            " x ".join(map(str, r["shape"])),
            str(r["count"]),
            f"{r['weights']:,}",
        ]
        for r in rows
    ]
    header = ["to be pruned", "shape", "count", "weights"]
    console.say(
        columns([header, *([str(c) for c in row] for row in cells)], right=True)
    )
    pattern, sparsity = passes.pattern_word(chosen.pattern), job.pruning.sparsity
    asked = pattern if sparsity is None else f"sparsity {sparsity:g}, {pattern}"
    console.say(
        f"\n{sum(row['weights'] for row in rows):,} weights in {len(names)} matrices "
        f"would be pruned by {job.pruning.method} ({asked}, allocation "
        f"{job.pruning.allocation}); nothing was written"
    )
    reasons = Counter(
        why_kept(name, info, job.pruning.exclude) or "not the matrix of a linear op"
        for name, info in source.tensors.items()
        if name not in names
    )
    if reasons:
        words = ", ".join(f"{count} ({why})" for why, count in reasons.items())
        console.say(f"left alone: {words}")
    return {
        "plan": rows,
        "method": job.pruning.method,
        "pattern": pattern,
        "sparsity": chosen.sparsity,
        "allocation": job.pruning.allocation,
    }
