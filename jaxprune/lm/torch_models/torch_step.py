"""The skeleton of a step, filled in for models that go through torch."""

import dataclasses
import functools
from typing import Any, ClassVar

from jaxprune.lm.checkpoints.checkpoint_dir import open_directory
from jaxprune.lm.measure import machine
from jaxprune.lm.measure.machine import Costs
from jaxprune.lm.steps import progress_dir
from jaxprune.lm.steps.console import Console
from jaxprune.lm.steps.skeleton import AnyJob, Step
from jaxprune.lm.torch_models.measures import TorchMeasurements
from jaxprune.lm.torch_models.model_inputs import check_input_files, read_inputs
from jaxprune.lm.torch_models.opening import TorchModel, open_torch_model
from jaxprune.lm.torch_models.samples import JobInputs

PACKAGES = ("torch", "torchax", "transformers")
"""Packages beside those of other steps whose versions decide the numbers."""


def open_torch_step(job: AnyJob, console: Console, *, copies: int) -> dict[str, Any]:
    """Opens what every step on a torch module needs.

    Args:
      job: options of the step.
      console: where the step speaks.
      copies: number of copies of the model that are written, the result included.

    Returns:
      The attributes of a `TorchStep`.

    Raises:
      ValueError: the model or an input does not fit.
      OSError: the disk has less room.
    """
    costs = Costs()
    check_input_files((*job.calibration.files, *job.calibration.evaluate))
    with costs.phase("read"):
        source = open_directory(job.model)
        progress_dir.check_room(job, source.size * copies)
        model = open_torch_model(source, job.loading.dtype)
        inputs = read_inputs(job.calibration, model)
    fields = {"job": job, "source": source, "console": console, "costs": costs}
    return fields | {"model": model, "inputs": inputs}


@dataclasses.dataclass(kw_only=True)
class TorchStep(Step[AnyJob, Any]):
    """A step on a torch module, which has been checked and is in memory.

    Attributes:
      model: directory and module.
      inputs: what is calibrated on and measured.
    """

    PACKAGES: ClassVar = PACKAGES

    model: TorchModel
    inputs: JobInputs

    @functools.cached_property
    def measurements(self) -> TorchMeasurements:
        """What the module is measured by."""
        batch = self.job.calibration.batch
        return TorchMeasurements(self.inputs.measured, batch, None, self.console)

    def facts(self) -> dict[str, Any]:
        """What decides the result of any step, known without changing a weight."""
        return {
            "model": str(self.source.path),
            "class": self.model.class_name,
            "files": progress_dir.file_times(self.source),
            "dtype": self.job.loading.dtype,
            "calibration": self.described_inputs,
            "batch": self.job.calibration.batch,
            # Where other files are evaluated, nothing is held out.
            "held_out": not self.job.calibration.evaluate,
            "versions": machine.versions(*PACKAGES),
        }

    @property
    def described_inputs(self) -> dict[str, Any]:
        """What jaxprune.json says of what was calibrated on."""
        samples, inputs = self.inputs.calibration, self.inputs
        return {
            "files": list(inputs.files),
            "self": 0,
            "sequences": 0 if samples is None else samples.count,
            "length": inputs.length,
            "seed": self.job.calibration.seed,
            "bos": inputs.special,
            "arguments": [] if samples is None else sorted(samples.arrays),
        }

    def look_at_dense(self) -> None:
        """Measures the module as it is."""
        # A run that goes on measures the dense model again, which is cheap.
        with self.costs.phase("evaluate before"):
            self.measurements.measure(self.STAGES[0], self.model.module)
