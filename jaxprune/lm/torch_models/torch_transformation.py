"""The skeleton of a job, filled in for models that go through torch."""

import abc
import dataclasses
import functools
from typing import Any, ClassVar

from jaxprune.lm.checkpoints.checkpoint_dir import CheckpointDir
from jaxprune.lm.jobs import progress_dir
from jaxprune.lm.jobs.prune_settings import PruneJob
from jaxprune.lm.jobs.shrink_settings import ShrinkJob
from jaxprune.lm.jobs.transformation import AnyJob, Transformation
from jaxprune.lm.torch_models.measures import Metric, TorchMeasurements, load_metric
from jaxprune.lm.torch_models.model_inputs import read_inputs
from jaxprune.lm.torch_models.opening import TorchModel, open_torch_model
from jaxprune.lm.torch_models.outcome import PACKAGES, job_facts
from jaxprune.lm.torch_models.samples import JobInputs


def read_torch_job(
    job: PruneJob | ShrinkJob, source: CheckpointDir, *, copies: int
) -> dict[str, Any]:
    """Reads what any job on a torch module needs.

    Args:
      job: what was asked for.
      source: directory of the model.
      copies: number of copies of the model that are written, the result included.

    Returns:
      Fields of a `TorchTransformation`, by name.

    Raises:
      ValueError: something does not fit.
    """
    # A module of the user's that is not there is said before the model is read.
    metric = load_metric(job.evaluation.metric)
    progress_dir.check_room(job, source, copies)
    model = open_torch_model(source, job.loading.dtype)
    inputs = read_inputs(job, model)
    return dict(job=job, source=source, model=model, inputs=inputs, metric=metric)


@dataclasses.dataclass(kw_only=True)
class TorchTransformation(Transformation[AnyJob, Any]):
    """A job on a torch module, which has been checked and is in memory.

    Attributes:
      model: directory and module.
      inputs: what is calibrated on and measured.
      metric: a user's own measure, or None.
    """

    PACKAGES: ClassVar = PACKAGES

    model: TorchModel
    inputs: JobInputs
    metric: Metric | None

    @functools.cached_property
    def measurements(self) -> TorchMeasurements:
        """What the module is measured by."""
        batch = self.job.calibration.batch
        return TorchMeasurements(self.inputs.measured, batch, self.metric, self.console)

    def facts(self) -> dict[str, Any]:
        """What decides the result of any job, known without changing a weight."""
        return job_facts(self.job, self.model, self.inputs)

    def look_at_dense(self) -> None:
        """Measures the module as it is, and refuses one that knows nothing."""
        module = self.model.module
        # A run that goes on measures the dense model again, which is cheap.
        with self.costs.phase("evaluate before"):
            self.measurements.measure("dense", module)
            if not self.job.evaluation.any_perplexity:
                self.measurements.check_sane(module)

    @abc.abstractmethod
    def plan(self) -> dict[str, Any]:
        """Says what would be done; JSON-able."""
