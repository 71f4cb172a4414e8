"""What a model's directory decides where the options of a job leave it open.

The method is magnitude for families whose code is not here. Sequences are at most as
long as the model's context. jaxprune.json has what was chosen.
"""

import dataclasses
from typing import TypeVar

from jaxprune.lm.checkpoints.checkpoint_dir import open_directory
from jaxprune.lm.jobs import settings
from jaxprune.lm.jobs.console import Console
from jaxprune.lm.jobs.opening import model_context
from jaxprune.lm.jobs.prune_settings import MethodName, PruneJob
from jaxprune.lm.models.hf.families import FAMILIES

_Evaluation = TypeVar("_Evaluation", bound=settings.Evaluation)
_Calibration = TypeVar("_Calibration", bound=settings.Calibration)


def complete(job: PruneJob, console: Console) -> PruneJob:
    """The job with a method and something to calibrate on.

    Args:
      job: what was asked for.
      console: where a method that the directory decided is noted.

    Returns:
      The job whose method is SparseGPT, or magnitude where nothing else is there, and
      which calibrates on what the model writes itself where no text was given.
    """
    # The method first: magnitude needs no text.
    if job.pruning.method is None:
        pruning = dataclasses.replace(job.pruning, method=_method(job, console))
        job = dataclasses.replace(job, pruning=pruning)
    if job.calibration.calibration or job.streams:
        return job
    calibration = dataclasses.replace(job.calibration, calibration=(settings.SELF,))
    return dataclasses.replace(job, calibration=calibration)


def _method(job: PruneJob, console: Console) -> MethodName:
    family = str(open_directory(job.model).config.get("model_type"))
    # What these do takes the model's code; without it the reading of it says so.
    runs_model = (
        job.calibration.calibration
        or job.runs_model
        or job.quantization.quantize
        or job.recovery.recover_steps
    )
    if family in FAMILIES or runs_model:
        return "sparsegpt"
    console.note(
        f"pruned by magnitude, since the code of model_type {family} is not here; "
        "--method says another"
    )
    return "magnitude"


def shorten(job: PruneJob) -> PruneJob:
    """The job with sequences that fit the model, unless a length was given."""
    if job.streams and not job.runs_model:
        return job
    source = open_directory(job.model)
    context = model_context(source, job.loading.ignore_config)
    return dataclasses.replace(
        job,
        calibration=shorten_sequences(job.calibration, context),
        evaluation=shorten_windows(job.evaluation, context),
    )


def shorten_sequences(calibration: _Calibration, context: int | None) -> _Calibration:
    """The calibration with sequences that fit a context, unless a length was given."""
    if context is None or not calibration.length == type(calibration).length > context:
        return calibration
    if context < 8:  # no sequence may be so short
        return calibration
    return dataclasses.replace(calibration, length=context)


def shorten_windows(evaluation: _Evaluation, context: int | None) -> _Evaluation:
    """The evaluation with windows that fit a context, unless a size was given."""
    if context is None or not evaluation.context == settings.CONTEXT > context:
        return evaluation
    return dataclasses.replace(evaluation, context=context)
