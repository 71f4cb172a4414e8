"""`jaxprune prune --effort`: one word in place of a method and its options."""

import dataclasses
import math
from typing import Any

from jaxprune.arrays.rules import Rule, check
from jaxprune.lm.checkpoints.checkpoint_dir import open_directory
from jaxprune.lm.jobs.option_rules import not_while, option_values
from jaxprune.lm.jobs.prune_settings import PruneJob, Pruning, Solver
from jaxprune.lm.jobs.recovery_settings import Recovery
from jaxprune.lm.jobs.settings import SELF
from jaxprune.posttraining.passes.efforts import LEVELS, Level

LARGEST = 10**9
"""Most parameters of a model that an effort trains: a training holds 16 bytes of each
weight of the matrices."""


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
    *(_undecided(Solver, option) for option in ("relative", "correction", "inputs")),
)


def choose_by_effort(job: PruneJob, *, writes: bool) -> PruneJob:
    """The job with the method and the options that its effort stands for.

    Args:
      job: what was asked for.
      writes: whether the model can write text to calibrate on, and be trained on it.

    Returns:
      The job as it would be without the word; the job itself where no effort is named.
      Options of a recovery that were given take the place of the level's.

    Raises:
      ValueError: an option that the effort decides was given too.
    """
    if job.pruning.effort is None:
        return job
    check(_DECIDED, **option_values(job))
    level = LEVELS[job.pruning.effort]
    writes = writes and not job.devices.distributed  # several processes do neither
    calibration = job.calibration
    if level.own_text and writes and SELF not in calibration.calibration:
        # Without a text the model writes all of it, whatever the effort.
        texts = (*calibration.calibration, SELF)
        calibration = dataclasses.replace(calibration, calibration=texts)
    chosen = dataclasses.replace(
        job,
        pruning=dataclasses.replace(job.pruning, method=level.method, effort=None),
        calibration=calibration,
    )
    recovery = _recovery(chosen, level) if writes else job.recovery
    solver = dataclasses.replace(job.solver, correction=level.correction)
    return dataclasses.replace(chosen, solver=solver, recovery=recovery)


def _recovery(job: PruneJob, level: Level) -> Recovery:
    """The recovery of the level where it can be, with what was asked for instead."""
    recovery, steps = job.recovery, job.recovery.recover_steps
    # What the model writes itself stands beside texts.
    texts = recovery.trained_files or job.calibration.files
    if (
        not (level.recover_steps and texts)
        or steps == 0
        or job.quantization.quantize  # comes last
        or (steps is None and _parameters(job) > LARGEST)
    ):
        return recovery
    batch = recovery.recover_batch
    if batch is None and steps is None:
        # Steps that were asked for are of --batch, as without the word.
        batch = level.recover_batch
    # What the model wrote itself is followed and not learned.
    distilled = recovery.recover_by == "distillation"
    followed = job.calibration.calibration if distilled else job.calibration.files
    return dataclasses.replace(
        recovery,
        recover_steps=steps or level.recover_steps,
        recover_batch=batch,
        recover_text=recovery.recover_text or followed,
        recover_train=recovery.recover_train or "matrices",
    )


def _parameters(job: PruneJob) -> int:
    tensors = open_directory(job.model).tensors.values()
    return sum(math.prod(info.shape) for info in tensors)
