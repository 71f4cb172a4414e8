"""`jaxprune prune --method magnitude`: tensor by tensor, without the model's code.

With `--evaluate` the model is loaded too, before and after, to measure it. OUT appears
when all of that is done.
"""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxprune.lm.checkpoints import rewrite
from jaxprune.lm.checkpoints.checkpoint_dir import CheckpointDir, open_directory
from jaxprune.lm.checkpoints.finite import check_names, nonfinite_tensors
from jaxprune.lm.checkpoints.prune_magnitude import prune_directory
from jaxprune.lm.jobs import inputs, passes, progress_dir, provenance
from jaxprune.lm.jobs.console import Console, byte_progress
from jaxprune.lm.jobs.exclusions import check_globs, prunable_tensor
from jaxprune.lm.jobs.model_transformation import Measurements
from jaxprune.lm.jobs.opening import note_ignored, open_for_job
from jaxprune.lm.jobs.prune_settings import PruneJob
from jaxprune.lm.measure.machine import Costs
from jaxprune.lm.models.decoder.model import Decoder
from jaxprune.lm.models.loaded_model import LoadedModel


def prune_by_magnitude(
    job: PruneJob,
    chosen: passes.Pass,
    console: Console,
    command: str,
    page: provenance.Page,
) -> dict[str, Any]:
    """Prunes a directory by magnitude.

    Args:
      job: what was asked for.
      chosen: pattern and sparsity.
      console: where the job speaks.
      command: words that the record says made it.
      page: function that makes report.html of the record.

    Returns:
      The record.
    """
    costs = Costs()
    with costs.phase("read"):
        source = open_directory(job.model)
        check_globs(job.pruning.exclude, source.tensors)
        # Texts are refused before all weights are read.
        look = _open_look(job, source, console) if job.runs_model else None
        progress_dir.check_room(job, source, 1)  # there is no progress
        # All of it: what is not pruned is copied later, and never looked at.
        check_names(nonfinite_tensors(source))
    if look is not None:
        with costs.phase("evaluate before"):
            look.at_dense()
    pruning = contextlib.ExitStack()  # closed where the weights are written

    def finish(
        written: Path, record: Mapping[str, Any]
    ) -> tuple[Mapping[str, Any], Mapping[str, bytes]]:
        """Measures what was written, before it takes its place."""
        pruning.close()  # its bar and its phase
        facts: dict[str, Any] = {}
        if look is not None:
            with costs.phase("evaluate after"):
                pruned = open_for_job(written, job.loading, job.devices).read()
                look.at_pruned(pruned.decoder())
            facts["perplexity"] = look.measurements.perplexity
        counts = {k: (v["zeros"], v["size"]) for k, v in record["tensors"].items()}
        facts |= {"sizes": provenance.weight_sizes(source, counts), **costs.facts()}
        return facts, provenance.page_file(page, {**record, **facts})

    with pruning:
        pruning.enter_context(costs.phase("prune"))
        progress = pruning.enter_context(byte_progress(source.size, "pruning"))
        pruned = prune_directory(
            source,
            job.out,
            sparsity=job.pruning.sparsity,
            pattern=chosen.pattern,
            prunable=prunable_tensor(job.pruning.exclude),
            provenance=provenance.environment(command)
            | {
                "excluded": list(job.pruning.exclude),
                "pattern": passes.pattern_word(chosen.pattern),
            },
            overwrite=job.overwrite,
            progress=progress,
            finish=finish,
        )
    return rewrite.read_provenance(pruned.path)


class _Look(NamedTuple):
    """What the model is before, and will be after."""

    model: LoadedModel
    measurements: Measurements

    def at_dense(self) -> None:
        decoder = self.model.read().decoder()
        self.measurements.measure_dense(decoder)

    def at_pruned(self, decoder: Decoder) -> None:
        self.measurements.add("pruned", decoder)


def _open_look(job: PruneJob, source: CheckpointDir, console: Console) -> _Look:
    """The model, what it will be measured on, and what it will continue."""
    texts = inputs.read_texts(job, source)
    model = open_for_job(job.model, job.loading, job.devices)
    note_ignored(model, console)
    measurements = Measurements(
        texts, job.calibration.batch, job.evaluation.any_perplexity, console
    )
    return _Look(model, measurements)
