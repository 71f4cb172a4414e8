"""`jaxprune prune`: which way a pruning goes."""

import functools

from jaxprune.arrays import processes
from jaxprune.lm.jobs import defaults
from jaxprune.lm.jobs.console import Console
from jaxprune.lm.jobs.effort import choose_by_effort
from jaxprune.lm.jobs.model_pruning import begin_pruning
from jaxprune.lm.jobs.prune_plan import plan_prune
from jaxprune.lm.jobs.prune_rules import check_prune
from jaxprune.lm.jobs.prune_settings import PruneJob
from jaxprune.lm.jobs.prune_streaming import prune_by_magnitude
from jaxprune.lm.jobs.transformation import Prepared


def prepare_prune(job: PruneJob, console: Console) -> Prepared:
    """Reads what a pruning needs, and refuses what does not fit.

    Args:
      job: what was asked for.
      console: where the job speaks.

    Returns:
      The pruning, with its plan.

    Raises:
      ValueError: something does not fit.
    """
    complete = defaults.complete(choose_by_effort(job, writes=True), console)
    chosen = processes.together(lambda: check_prune(complete))
    if complete.calibration.calibration and not job.calibration.calibration:
        console.note(
            "calibrated on what the model writes itself; a text of the kind that it is "
            "used on does better: --calibration FILE..."
        )
    job = defaults.shorten(complete)
    # Without texts magnitude needs no code of the model.
    if job.streams:
        return Prepared(
            functools.partial(plan_prune, job, chosen, None, console),
            functools.partial(prune_by_magnitude, job, chosen, console),
        )
    pruning = processes.together(lambda: begin_pruning(job, chosen, console))
    return Prepared(
        functools.partial(plan_prune, job, chosen, pruning, console), pruning.run
    )
