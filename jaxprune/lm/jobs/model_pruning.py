"""`jaxprune prune` of a loaded model: measured, pruned, trained again, written."""

import dataclasses
from typing import Any

import jax
import numpy as np

import jaxprune as jp
from jaxprune.arrays import lazy
from jaxprune.arrays.axes import Axes
from jaxprune.arrays.messages import listed
from jaxprune.lm.checkpoints.checkpoint_dir import open_directory
from jaxprune.lm.jobs import (
    inputs,
    passes,
    progress_dir,
    provenance,
)
from jaxprune.lm.jobs.console import Console
from jaxprune.lm.jobs.exclusions import check_globs, prunable_leaf
from jaxprune.lm.jobs.model_transformation import ModelTransformation
from jaxprune.lm.jobs.opening import note_ignored, open_for_job, read_dense
from jaxprune.lm.jobs.provenance import Page
from jaxprune.lm.jobs.prune_record import (
    count_zeros,
    describe_pruning,
    pruning_facts,
    write_pruned,
)
from jaxprune.lm.jobs.prune_settings import PruneJob
from jaxprune.lm.jobs.recovery import as_stored
from jaxprune.lm.jobs.teacher import open_teacher
from jaxprune.lm.jobs.transformation import Change
from jaxprune.lm.measure.machine import Costs
from jaxprune.lm.models import hf
from jaxprune.lm.models.loaded_model import LoadedModel, device_mesh
from jaxprune.typing import Pattern, Prunable


def begin_pruning(
    job: PruneJob, chosen: passes.Pass, console: Console
) -> "ModelPruning":
    """Reads the texts and the model's headers, and refuses what does not fit."""
    costs = Costs()
    with costs.phase("read"):
        source = open_directory(job.model)
        # By names and shapes, before a text is tokenized.
        check_globs(job.pruning.exclude, source.tensors)
        model = open_for_job(job.model, job.loading, job.devices)
        other_teacher = open_teacher(job, source, model)
        texts = inputs.read_texts(job, source)
        names = model.names
        prunable = prunable_leaf(lambda leaf: names[leaf].names, job.pruning.exclude)
        _check_pattern(chosen.pattern, model, prunable)
        progress_dir.check_room(job, source, 2, texts.trained_tokens)
    note_ignored(model, console)
    return ModelPruning(
        job=job,
        source=source,
        console=console,
        costs=costs,
        model=model,
        texts=texts,
        other_teacher=other_teacher,
        chosen=chosen,
        prunable=prunable,
    )


@dataclasses.dataclass(kw_only=True)
class ModelPruning(ModelTransformation[PruneJob]):
    """A pruning of a loaded model after a look at calibration texts.

    Attributes:
      chosen: method, pattern and what else is done.
      prunable: which leaves may be pruned.
    """

    NAME, STAGE = "prune", "pruned"

    chosen: passes.Pass
    prunable: Prunable

    def facts(self) -> dict[str, Any]:
        """What decides the pruned weights, as far as it is known without reading."""
        return {
            **progress_dir.job_facts(self.job, self.source, self.texts),
            **pruning_facts(self.job, self.chosen),
        }

    def look_at_dense(self) -> None:
        """Measures the dense model and lets it write a calibration."""
        with self.costs.phase("evaluate before"):
            dense = read_dense(self.model)  # freed when this is done
            self.measurements.measure_dense(dense.decoder())
        self.write_calibration(dense)

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
        mesh = device_mesh(job.devices.mesh)
        params, report = passes.prune_states(
            self.chosen, model, embedded, self.prunable, job.work, mesh
        )
        leaves = {row["name"] for row in report["weights"]}
        pruned = as_stored(model._replace(params=params).read(), leaves)
        calibration = inputs.describe_calibration(job.calibration, self.texts)
        record = describe_pruning(
            job,
            self.chosen,
            calibration,
            report,
            lambda leaf: model.names[leaf].name,
        )
        record["dtype"] = model.config.dtype
        return Change(pruned, leaves, leaves, record)

    def before(self, change: Change[LoadedModel]) -> LoadedModel:
        """The dense model; what has not moved is shared with the pruned one."""
        model = change.model
        before = jp.tree.named_leaves(self.model.params)
        params = [
            lazy.array(before[name]) if name in change.moved else leaf
            for name, leaf in jp.tree.named_leaves(model.params).items()
        ]
        structure = jax.tree.structure(model.params)
        return model._replace(params=jax.tree.unflatten(structure, params))

    def finish(self, change: Change[LoadedModel]) -> None:
        """Adds the sizes of the pruned model."""
        counts = count_zeros(change.model, change.matrices)
        change.record["ignored_config"] = list(self.model.ignored)
        change.record["sizes"] = provenance.weight_sizes(
            self.source, counts, self.job.quantization
        )

    def write(self, change: Change[LoadedModel], page: Page) -> None:
        """Writes the leaves that moved; the zeros of those that were pruned count."""
        write_pruned(self.job, self.source, change, page)


def _check_pattern(pattern: Pattern, model: LoadedModel, prunable: Prunable) -> None:
    """Refuses matrices that the pattern does not fit, by the directory's names."""
    problems: dict[str, list[str]] = {}
    for name, leaf in jp.tree.named_leaves(model.params).items():
        if prunable(name, leaf) and (problem := pattern.problem(leaf.shape, Axes())):
            problems.setdefault(problem, []).append(model.names[name].name)
    if problems:
        places = (f"{why} at {listed(names)}" for why, names in problems.items())
        raise ValueError(f"{'; '.join(places)}; leave such tensors out with --exclude")
