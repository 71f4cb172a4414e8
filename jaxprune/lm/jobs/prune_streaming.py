"""`jaxprune prune --method magnitude`: tensor by tensor, without the model's code.

With `--evaluate` or `--prompt` the model is loaded too, before and after, to measure it
and to let it write. OUT appears when all of that is done.
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
from jaxprune.lm.jobs.samples import Samples, prepare_samples
from jaxprune.lm.measure.machine import Costs


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
        source = _open_source(job)
    look = _look_at_dense(job, source, console, costs) if job.runs_model else None
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
                look.measurements.add("pruned", pruned.decoder())
                look.samples.add("pruned", pruned.decoder())
            facts["perplexity"] = look.measurements.perplexity
            facts["samples"] = look.samples.written
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

    measurements: Measurements
    samples: Samples


def _open_source(job: PruneJob) -> CheckpointDir:
    """The directory, after all has been refused that can be before it is pruned."""
    source = open_directory(job.model)
    check_globs(job.pruning.exclude, source.tensors)
    progress_dir.check_room(job, source, 1)  # there is no progress
    # All of it: what is not pruned is copied later, and never looked at.
    check_names(nonfinite_tensors(source))
    return source


def _look_at_dense(
    job: PruneJob, source: CheckpointDir, console: Console, costs: Costs
) -> _Look:
    """Loads the dense model for once, measures it and lets it write."""
    texts = inputs.read_texts(job, source)
    model = open_for_job(job.model, job.loading, job.devices)
    note_ignored(model, console)
    measurements = Measurements(
        texts, job.calibration.batch, job.evaluation.any_perplexity, console
    )
    samples = prepare_samples(job, source, texts, model.config.context)
    with costs.phase("evaluate before"):
        decoder = model.read().decoder()
        measurements.measure_dense(decoder)
        samples.add("dense", decoder)
    return _Look(measurements, samples)
