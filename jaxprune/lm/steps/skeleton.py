"""The skeleton of a step: measure, change, measure, write.

Texts and headers were read before, so that all that can be refused is refused. What is
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
from jaxprune.lm.measure.machine import Costs
from jaxprune.lm.steps import progress_dir, provenance
from jaxprune.lm.steps.console import Console
from jaxprune.lm.steps.settings import Job

AnyJob = TypeVar("AnyJob", bound=Job)
AnyModel = TypeVar("AnyModel")


class Prepared(NamedTuple):
    """A step of which all that can be refused has been refused.

    Attributes:
      plan: function of nothing that says what would be done, and returns it.
      run: function of the command's words that does it, and returns the record.
    """

    plan: Callable[[], dict[str, Any]]
    run: Callable[[str], dict[str, Any]]


def run_job(
    prepare: Callable[[Any, Console], Prepared],
    job: Job,
    console: Console,
    command: str,
) -> dict[str, Any]:
    """Does a step, or says what it would do.

    Args:
      prepare: function that reads what the step needs, and refuses what does not fit.
      job: options of the step.
      console: where the step speaks.
      command: words that the record says made it, and that a second run is known by.

    Returns:
      The record, as in jaxprune.json; with `plan`, what would be done.

    Raises:
      ValueError: something does not fit; nothing was written.
    """
    processes.on_first(lambda: progress_dir.refuse_done(job, command))
    prepared = prepare(job, console)
    return prepared.plan() if job.plan else prepared.run(command)


class Change(NamedTuple, Generic[AnyModel]):
    """A changed model.

    Attributes:
      model: model with the parameters that will be written.
      moved: names of the leaves that changed.
      matrices: names of the leaves whose zeros are counted.
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
class Step(abc.ABC, Generic[AnyJob, AnyModel]):
    """A step from one model to the directory that is written.

    Attributes:
      NAME: name of the phase that changes the model.
      STAGES: names of the model before and after.
      PACKAGES: packages beside ours whose versions decide the numbers.
      job: options.
      source: directory of the model before.
      console: where the step speaks.
      costs: time and memory of each phase.
    """

    NAME: ClassVar[str]
    STAGES: ClassVar[tuple[str, str]]
    PACKAGES: ClassVar[tuple[str, ...]] = ()

    job: AnyJob
    source: CheckpointDir
    console: Console
    costs: Costs

    def run(self, command: str) -> dict[str, Any]:
        """Takes the step to its directory, and holds the place of its progress.

        Args:
          command: words that the record says made it.

        Returns:
          The record, as in jaxprune.json.
        """
        # The first process alone holds the place; each has its part of the progress.
        with contextlib.ExitStack() as place:
            held = progress_dir.hold_progress(self.job.work, self.facts())
            processes.on_first(lambda: place.enter_context(held))
            self.look_at_dense()
            with self.costs.phase(self.NAME):
                change = self.change()
            with self.costs.phase("evaluate after"):
                self.measurements.measure(self.STAGES[1], change.model)
            self.finish(change)
            # Last, so that the record has what the result was made with.
            change.record.update(step=self.NAME, **self.measurements.facts())
            change.record.update(provenance.environment(command, self.PACKAGES))
            change.record.update(self.costs.facts())
            self.write(change)
        return processes.on_first(lambda: rewrite.read_provenance(self.job.out))

    @property
    @abc.abstractmethod
    def measurements(self) -> StageMeasurements:
        """What is measured of the model."""

    @abc.abstractmethod
    def facts(self) -> dict[str, Any]:
        """What decides the result, as far as it is known without doing the step."""

    @abc.abstractmethod
    def look_at_dense(self) -> None:
        """Measures the model before, while its parameters are in memory."""

    @abc.abstractmethod
    def change(self) -> Change[AnyModel]:
        """Prunes, shrinks or trains the model."""

    @abc.abstractmethod
    def finish(self, change: Change[AnyModel]) -> None:
        """Adds to the record what is counted of the new model."""

    @abc.abstractmethod
    def write(self, change: Change[AnyModel]) -> None:
        """Writes the result with its record and its page."""

    @abc.abstractmethod
    def plan(self) -> dict[str, Any]:
        """Says what would be done, and returns it; JSON-able."""
