"""`jaxprune prune --effort`: one word in place of a method and its options."""

import dataclasses
from typing import Any

from jaxprune.arrays.rules import Rule, check
from jaxprune.lm.jobs.option_rules import not_while, option_values
from jaxprune.lm.jobs.prune_settings import PruneJob, Pruning, Solver
from jaxprune.lm.jobs.settings import SELF
from jaxprune.posttraining.passes.efforts import LEVELS


def _undecided(group: type[Any], option: str) -> Rule:
    """A rule that an option which the effort decides is left at its default."""
    default = getattr(group, option)  # a dataclass keeps it on the class
    return not_while(
        "effort",
        option,
        "--effort {effort} says what {flag} would",
        "leave one of them out",
        lambda v: getattr(v, option) != default,
    )


_DECIDED = (
    _undecided(Pruning, "method"),
    *(
        _undecided(Solver, option)
        for option in ("relative", "correction", "refine", "inputs")
    ),
)


def choose_by_effort(job: PruneJob, *, writes: bool) -> PruneJob:
    """The job with the method and the options that its effort stands for.

    Args:
      job: what was asked for.
      writes: whether the model can write text to calibrate on.

    Returns:
      The job as it would be without the word; the job itself where no effort is named.

    Raises:
      ValueError: an option that the effort decides was given too.
    """
    if job.pruning.effort is None:
        return job
    check(_DECIDED, **option_values(job))
    level = LEVELS[job.pruning.effort]
    pruning = dataclasses.replace(job.pruning, method=level.method, effort=None)
    solver = dataclasses.replace(
        job.solver, correction=level.correction, refine=level.refine
    )
    calibration = job.calibration
    if level.own_text and writes and SELF not in calibration.calibration:
        # Without a text the model writes all of it, whatever the effort.
        texts = (*calibration.calibration, SELF)
        calibration = dataclasses.replace(calibration, calibration=texts)
    return dataclasses.replace(
        job, pruning=pruning, solver=solver, calibration=calibration
    )
