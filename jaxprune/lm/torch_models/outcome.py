"""What is written down of a job that went through torch."""

from typing import Any

from jaxprune.lm.jobs.prune_settings import PruneJob
from jaxprune.lm.jobs.settings import Calibration
from jaxprune.lm.jobs.shrink_settings import ShrinkJob
from jaxprune.lm.measure import machine
from jaxprune.lm.torch_models.opening import TorchModel
from jaxprune.lm.torch_models.samples import JobInputs

PACKAGES = ("torch", "torchax", "transformers")
"""Packages beside those of other jobs whose versions decide the numbers."""


def describe_inputs(calibration: Calibration, inputs: JobInputs) -> dict[str, Any]:
    """What jaxprune.json says of what was calibrated on.

    Args:
      calibration: settings.
      inputs: what was read.

    Returns:
      A JSON-able record.
    """
    samples = inputs.calibration
    return {
        "files": list(inputs.files),
        "self": 0,
        "sequences": 0 if samples is None else samples.count,
        "length": inputs.length,
        "seed": calibration.seed,
        "bos": inputs.special,
        "arguments": [] if samples is None else sorted(samples.arrays),
    }


def job_facts(
    job: PruneJob | ShrinkJob, model: TorchModel, inputs: JobInputs
) -> dict[str, Any]:
    """What decides the result of a job, known without changing a weight.

    Args:
      job: what was asked for.
      model: directory, whose files are told by size and time.
      inputs: what is calibrated on.

    Returns:
      A JSON-able record; a run goes on only with the progress of an equal one.
    """
    source = model.source
    # Of the tokenizer and the processor too, which make the inputs.
    configs = [name for name in source.others if name.endswith(".json")]
    # By size and time: to hash the weights would take as long as to read them.
    files = {n: (source.path / n).stat() for n in (*source.metadata, *configs)}
    return {
        "model": str(source.path),
        "class": model.class_name,
        "files": {n: [s.st_size, s.st_mtime_ns] for n, s in files.items()},
        "dtype": job.loading.dtype,
        "calibration": describe_inputs(job.calibration, inputs),
        "batch": job.calibration.batch,
        # Where other files are evaluated, nothing is held out.
        "held_out": None
        if job.evaluation.evaluate
        else [job.evaluation.limit, job.evaluation.context],
        "versions": machine.versions(*PACKAGES),
    }
