"""`jaxprune prune`: which way a pruning goes."""

import contextlib
from typing import Any

from jaxprune.arrays import processes
from jaxprune.lm.checkpoints import rewrite
from jaxprune.lm.jobs import defaults, progress_dir
from jaxprune.lm.jobs.console import Console
from jaxprune.lm.jobs.model_pruning import begin_pruning
from jaxprune.lm.jobs.provenance import Page
from jaxprune.lm.jobs.prune_plan import plan_prune
from jaxprune.lm.jobs.prune_rules import check_prune
from jaxprune.lm.jobs.prune_settings import PruneJob
from jaxprune.lm.jobs.prune_streaming import prune_by_magnitude


def run_prune(
    job: PruneJob, console: Console, command: str, page: Page
) -> dict[str, Any]:
    """Prunes a directory.

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
    processes.on_first(lambda: progress_dir.refuse_done(job, command))
    complete = defaults.complete(job, console)
    chosen = processes.together(lambda: check_prune(complete))
    if complete.calibration != job.calibration:
        console.note(
            "calibrated on what the model writes itself; a text of the kind that it is "
            "used on does better: --calibration FILE..."
        )
    job = defaults.shorten(complete)
    # Without texts magnitude needs no code of the model.
    if job.streams:
        if job.plan:
            return plan_prune(job, chosen, None, console)
        return prune_by_magnitude(job, chosen, console, command, page)
    pruning = processes.together(lambda: begin_pruning(job, chosen, console))
    if job.plan:
        return plan_prune(job, chosen, pruning, console)
    # The first process alone holds the place; each has its part of the progress.
    with contextlib.ExitStack() as place:
        held = progress_dir.hold_progress(job.work, pruning.facts())
        processes.on_first(lambda: place.enter_context(held))
        pruning.transform(page, command)
    return processes.on_first(lambda: rewrite.read_provenance(job.out))
