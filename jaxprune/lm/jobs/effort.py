"""`jaxprune prune --effort`: one word in place of a method and its options."""

import dataclasses
import math

from jaxprune.lm.checkpoints.checkpoint_dir import open_directory
from jaxprune.lm.jobs.prune_settings import PruneJob
from jaxprune.lm.jobs.recovery_settings import Recovery
from jaxprune.lm.jobs.settings import SELF
from jaxprune.posttraining.passes.efforts import LEVELS, Level

LARGEST = 10**9
"""Most parameters of a model that an effort trains: a training holds 16 bytes of each
weight of the matrices."""


def choose_by_effort(job: PruneJob, *, writes: bool) -> PruneJob:
    """The job with the method and the options that its effort stands for.

    Args:
      job: what was asked for.
      writes: whether the model can write text to calibrate on, and be trained on it.

    Returns:
      The job with the method of its effort; the job itself where no effort is named.
      Options of a recovery that were given take the place of the level's.

    Raises:
      ValueError: a method was given too.
    """
    if job.pruning.effort is None:
        return job
    if job.pruning.method is not None:
        raise ValueError(
            f"--effort {job.pruning.effort} says what --method would; leave one of "
            "them out"
        )
    level = LEVELS[job.pruning.effort]
    writes = writes and not job.devices.distributed  # several processes do neither
    calibration = job.calibration
    if level.own_text and writes and SELF not in calibration.calibration:
        # Without a text the model writes all of it, whatever the effort.
        texts = (*calibration.calibration, SELF)
        calibration = dataclasses.replace(calibration, calibration=texts)
    chosen = dataclasses.replace(
        job,
        pruning=dataclasses.replace(job.pruning, method=level.method),
        calibration=calibration,
    )
    recovery = _recovery(chosen, level) if writes else job.recovery
    return dataclasses.replace(chosen, recovery=recovery)


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
