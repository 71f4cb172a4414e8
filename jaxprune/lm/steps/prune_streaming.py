"""`jaxprune prune --method magnitude`: tensor by tensor, without the model's code.

With `--evaluate` the model is loaded too, before and after, to measure it. OUT appears
when all of that is done.
"""

import contextlib
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxprune.lm.checkpoints import rewrite
from jaxprune.lm.checkpoints.checkpoint_dir import open_directory
from jaxprune.lm.checkpoints.finite import check_names, nonfinite_tensors
from jaxprune.lm.checkpoints.prune_magnitude import prune_directory
from jaxprune.lm.measure.machine import Costs
from jaxprune.lm.steps import passes, progress_dir, provenance, step_texts
from jaxprune.lm.steps.console import Console, byte_progress
from jaxprune.lm.steps.exclusions import check_globs, prunable_tensor
from jaxprune.lm.steps.family_step import Measurements
from jaxprune.lm.steps.opening import fitted, note_ignored, open_for_job
from jaxprune.lm.steps.settings import PruneJob


def prune_by_magnitude(
    job: PruneJob,
    chosen: passes.Pass,
    console: Console,
    command: str,
) -> dict[str, Any]:
    """Prunes a directory by magnitude.

    Args:
      job: options of the pruning.
      chosen: pattern and sparsity.
      console: where it speaks.
      command: words that the record says made it.

    Returns:
      The record.
    """
    costs, measurements, model = Costs(), None, None
    with costs.phase("read"):
        source = open_directory(job.model)
        check_globs(job.pruning.exclude, source.tensors)
        # Texts are refused before all weights are read.
        if job.calibration.evaluate:
            calibration = fitted(job.calibration, source, job.loading.ignore_config)
            texts = step_texts.read_texts(
                dataclasses.replace(job, calibration=calibration), source
            )
            model = open_for_job(job.model, job.loading)
            note_ignored(model, console)
            measurements = Measurements(texts, calibration.batch, console)
        progress_dir.check_room(job, source.size)  # there is no progress
        # All of it: what is not pruned is copied later, and never looked at.
        check_names(nonfinite_tensors(source))
    if measurements is not None and model is not None:
        with costs.phase("evaluate before"):
            measurements.measure("dense", model.read())
    pruning = contextlib.ExitStack()  # closed where the weights are written

    def finish(
        written: Path, record: Mapping[str, Any]
    ) -> tuple[Mapping[str, Any], Mapping[str, bytes]]:
        """Measures what was written, before it takes its place."""
        pruning.close()  # its bar and its phase
        facts: dict[str, Any] = {}
        if measurements is not None:
            with costs.phase("evaluate after"):
                pruned = open_for_job(written, job.loading).read()
                measurements.measure("pruned", pruned)
            facts |= measurements.facts()
        counts = {k: (v["zeros"], v["size"]) for k, v in record["tensors"].items()}
        facts |= {"sizes": provenance.weight_sizes(source, counts), **costs.facts()}
        return facts, provenance.page_file({**record, **facts})

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
                "step": "prune",
                "excluded": list(job.pruning.exclude),
                "pattern": passes.pattern_word(chosen.pattern),
            },
            overwrite=job.overwrite,
            progress=progress,
            finish=finish,
        )
    return rewrite.read_provenance(pruned.path)
