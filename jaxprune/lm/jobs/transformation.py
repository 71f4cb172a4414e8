"""The skeleton of a job: measure, change, measure, recover, write.

Inputs and headers were read before, so that all that can be refused is refused. What is
measured is what will be written. What a model is, and what it is measured by, say the
classes that fill the skeleton in.
"""

import abc
import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Generic, NamedTuple, Protocol, TypeVar

from jaxprune.arrays import processes
from jaxprune.lm.checkpoints import rewrite
from jaxprune.lm.checkpoints.checkpoint_dir import CheckpointDir
from jaxprune.lm.jobs import progress_dir, provenance
from jaxprune.lm.jobs.console import Console
from jaxprune.lm.jobs.provenance import Page
from jaxprune.lm.jobs.prune_settings import PruneJob
from jaxprune.lm.jobs.shrink_settings import ShrinkJob
from jaxprune.lm.measure.machine import Costs

AnyJob = TypeVar("AnyJob", PruneJob, ShrinkJob)
AnyModel = TypeVar("AnyModel")


class Prepared(NamedTuple):
    """A job of which all that can be refused has been refused.

    Attributes:
      plan: function of nothing that says what would be done, and returns it.
      run: function of the command's words and of the page that does it, and returns the
        record.
    """

    plan: Callable[[], dict[str, Any]]
    run: Callable[[str, Page], dict[str, Any]]


def run_job(
    prepare: Callable[[AnyJob, Console], Prepared],
    job: AnyJob,
    console: Console,
    command: str,
    page: Page,
) -> dict[str, Any]:
    """Carries a job out, or says what it would do.

    Args:
      prepare: function that reads what the job needs, and refuses what does not fit.
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
    prepared = prepare(job, console)
    return prepared.plan() if job.plan else prepared.run(command, page)


class Change(NamedTuple, Generic[AnyModel]):
    """What became of a model.

    Attributes:
      model: model with the parameters that will be written.
      moved: names of the leaves that changed.
      matrices: names of the leaves that were pruned, or of those that "matrices" and
        "lora" of a recovery mean.
      record: what jaxprune.json says of it.
    """

    model: AnyModel
    moved: set[str]
    matrices: set[str]
    record: dict[str, Any]


class StageMeasurements(Protocol):
    """What is measured of a model, stage by stage."""

    def measure(self, stage: str, model: Any) -> None:
        """Measures the model at a stage, which is noted."""

    def facts(self) -> dict[str, Any]:
        """What jaxprune.json says of all stages so far; JSON-able."""


@dataclasses.dataclass(kw_only=True)
class Transformation(abc.ABC, Generic[AnyJob, AnyModel]):
    """A job from the dense model to the directory that is written.

    Attributes:
      NAME: what the job does, which is the name of its phase.
      STAGE: what the model then is.
      PACKAGES: packages beside ours whose versions decide the numbers.
      job: settings.
      source: directory of the dense model.
      console: where the job speaks.
      costs: time and memory of each phase.
    """

    NAME: ClassVar[str]
    STAGE: ClassVar[str]
    PACKAGES: ClassVar[tuple[str, ...]] = ()

    job: AnyJob
    source: CheckpointDir
    console: Console
    costs: Costs

    def run(self, command: str, page: Page) -> dict[str, Any]:
        """Takes the job to its directory, and holds the place of its progress.

        Args:
          command: words that the record says made it.
          page: function that makes report.html of the record.

        Returns:
          The record, as in jaxprune.json.
        """
        # The first process alone holds the place; each has its part of the progress.
        with contextlib.ExitStack() as place:
            held = progress_dir.hold_progress(self.job.work, self.facts())
            processes.on_first(lambda: place.enter_context(held))
            self._transform(command, page)
        return processes.on_first(lambda: rewrite.read_provenance(self.job.out))

    def _transform(self, command: str, page: Page) -> None:
        self.look_at_dense()
        with self.costs.phase(self.NAME):
            change = self.change()
        with self.costs.phase("evaluate after"):
            self.measurements.measure(self.STAGE, change.model)
        change.record.update(self.measurements.facts())
        change = self.recover(change)
        self.finish(change)
        # Last, so that the record has what the result was made with.
        change.record.update(provenance.environment(command, self.PACKAGES))
        change.record.update(self.costs.facts())
        self.write(change, page)

    @property
    @abc.abstractmethod
    def measurements(self) -> StageMeasurements:
        """What is measured of the model."""

    @abc.abstractmethod
    def facts(self) -> dict[str, Any]:
        """What decides the result, as far as it is known without doing the job."""

    @abc.abstractmethod
    def look_at_dense(self) -> None:
        """Measures the dense model, while its parameters are in memory."""

    @abc.abstractmethod
    def change(self) -> Change[AnyModel]:
        """Prunes or shrinks the model."""

    def recover(self, change: Change[AnyModel]) -> Change[AnyModel]:
        """The change after a training that makes up for it; none if not defined."""
        return change

    @abc.abstractmethod
    def finish(self, change: Change[AnyModel]) -> None:
        """Adds to the record what is measured of the last model."""

    @abc.abstractmethod
    def write(self, change: Change[AnyModel], page: Page) -> None:
        """Writes the result with its record and its page."""
