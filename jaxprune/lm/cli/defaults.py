"""What a model's directory decides where the options leave it open.

The method is magnitude for families whose code is not here. Sequences are at most as
long as the model's context. jaxprune.json has what was chosen.
"""

import dataclasses
from typing import Any, TypeVar

from jaxprune.lm.checkpoints.checkpoint_dir import CheckpointDir, open_directory
from jaxprune.lm.cli import job_options, prune_options
from jaxprune.lm.cli.console import Console
from jaxprune.lm.models import hf
from jaxprune.lm.models.hf.families import FAMILIES

_Job = TypeVar("_Job", bound=job_options.JobOptions)
_VISION = "phi3_v"  # it is read, but the command runs language models


def method(job: prune_options.Job, console: Console) -> prune_options.Job:
    """The job with a method: SparseGPT, or magnitude where nothing else is there."""
    if job.method is not None:
        return job
    kind = str(open_directory(job.model).config.get("model_type"))
    later = job.refine or job.bits or job.retrain_steps or job.distill_steps
    needs_model = job.calibration or job.evaluate or later
    if (kind in FAMILIES and kind != _VISION) or needs_model:
        return dataclasses.replace(job, method="sparsegpt")
    console.note(
        f"pruned by magnitude, since the code of model_type {kind} is not here; "
        "--method says another"
    )
    return dataclasses.replace(job, method="magnitude")


def lengths(job: _Job) -> _Job:
    """The job with sequences and samples that fit the model, unless they were given."""
    source = open_directory(job.model)
    changes: dict[str, Any] = {}
    if (context := _context(source, job.ignore_config)) is None:
        return job  # what is wrong is told where the model is read
    defaults: dict[str, Any] = {f.name: f.default for f in dataclasses.fields(job)}
    if job.length == defaults["length"] > context >= 8:
        changes["length"] = context
    if getattr(job, "prompt_steps", None) == defaults.get("prompt_steps", 0) >= context:
        changes["prompt_steps"] = context // 2
    return dataclasses.replace(job, **changes) if changes else job


def _context(source: CheckpointDir, ignored: tuple[str, ...]) -> int | None:
    try:
        return hf.decoder_config(source.config, ignore_config=ignored).context
    except ValueError:
        return None
