"""The skeleton of a job: measure, change, measure, recover, measure, write.

Texts and headers were read before, so that all that can be refused is refused. What is
measured is what will be written.
"""

import abc
import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import numpy as np
from jaxtyping import Int

from jaxprune.arrays.rules import Rule, check
from jaxprune.lm.checkpoints.checkpoint_dir import CheckpointDir
from jaxprune.lm.jobs import provenance, recovery
from jaxprune.lm.jobs.console import Console
from jaxprune.lm.jobs.inputs import JobTexts
from jaxprune.lm.jobs.provenance import Page
from jaxprune.lm.jobs.prune_settings import PruneJob
from jaxprune.lm.jobs.shrink_settings import ShrinkJob
from jaxprune.lm.measure import perplexity
from jaxprune.lm.measure.machine import Costs
from jaxprune.lm.measure.tables import (
    describe_windows,
    format_bits,
    format_perplexity,
    measure_texts,
)
from jaxprune.lm.models.decoder.model import Decoder
from jaxprune.lm.models.loaded_model import LoadedModel


class Change(NamedTuple):
    """What became of a model.

    Attributes:
      model: model with the parameters that will be written.
      moved: names of the leaves that changed.
      matrices: names of the leaves that "matrices" and "lora" of a recovery mean.
      record: what jaxprune.json says of it.
    """

    model: LoadedModel
    moved: set[str]
    matrices: set[str]
    record: dict[str, Any]


_SANE = Rule(  # one text that it knows is enough
    lambda v: v.sane,
    "the dense model must know something before anything is removed, but its "
    "perplexity is {results} (vocabulary {vocab_size})",
    "look at the checkpoint, the tokenizer and BOS, or give --any-perplexity",
)


@dataclasses.dataclass
class Measurements:
    """The perplexity of a job's texts, stage by stage.

    Attributes:
      texts: what is evaluated.
      batch: number of windows that the model sees at once.
      any_perplexity: whether a dense model that knows nothing is accepted.
      console: where a result is noted.
      perplexity: name of a text to how it is evaluated and what each stage gave.
    """

    texts: JobTexts
    batch: int
    any_perplexity: bool
    console: Console
    perplexity: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)

    def measure(self, stage: str, decoder: Decoder) -> None:
        """Measures the model at a stage, which is noted."""
        for name, result in self.add(stage, decoder).items():
            shown = format_perplexity(result["perplexity"])
            self.console.note(
                f"{stage}: perplexity {shown} on {name}{_bits_words(result)}"
            )

    def add(self, stage: str, decoder: Decoder) -> dict[str, dict[str, Any]]:
        """Measures the model at a stage; the results by text."""
        results = measure_texts(decoder, self.texts.windows, self.batch)
        for name, result in results.items():
            self.perplexity[name][stage] = result
        return results

    def measure_dense(self, decoder: Decoder) -> None:
        """Measures the model as it is, and refuses one that knows nothing.

        Args:
          decoder: dense model.

        Raises:
          ValueError: it predicts no text better than a guess by frequency.
        """
        for name, windows in self.texts.windows.items():
            role = self.texts.roles[name]
            self.perplexity[name] = describe_windows(windows) | {"role": role}
        for name, result in self.add("dense", decoder).items():
            text = self.perplexity[name]
            self.console.note(
                f"dense: perplexity {format_perplexity(result['perplexity'])} on "
                f"{name} ({text['role']}; {result['tokens']} tokens, context "
                f"{text['context']}, {self.texts.begins.why}){_bits_words(result)}"
            )
        self._check_sane()

    def _check_sane(self) -> None:
        # A model may know one kind of text and not another.
        size = self.texts.vocab_size
        texts = self.perplexity
        sane = [
            perplexity.is_sane(text["dense"], text["by_frequency"], size)
            for text in texts.values()
        ]
        results = ", ".join(
            f"{format_perplexity(text['dense']['perplexity'])} on {name}, where "
            f"guessing by frequency has {format_perplexity(text['by_frequency'])}"
            for name, text in texts.items()
        )
        accepted = self.any_perplexity or not texts or any(sane)
        check([_SANE], sane=accepted, results=results, vocab_size=size)


def _bits_words(result: Mapping[str, Any]) -> str:
    """Bits per byte, where the bytes are known."""
    bits = result["bits_per_byte"]
    return "" if bits is None else f"; {format_bits(bits)} bits per byte"


AnyJob = TypeVar("AnyJob", PruneJob, ShrinkJob)


@dataclasses.dataclass
class Transformation(abc.ABC, Generic[AnyJob]):
    """A job from the dense model to the directory that is written.

    Attributes:
      NAME: what the job does, which is the name of its phase.
      STAGE: what the model then is.
      job: settings.
      source: directory of the dense model.
      model: dense model.
      texts: what is calibrated on and evaluated.
      console: where the job speaks.
      costs: time and memory of each phase.
    """

    NAME: ClassVar[str]
    STAGE: ClassVar[str]

    job: AnyJob
    source: CheckpointDir
    model: LoadedModel
    texts: JobTexts
    console: Console
    costs: Costs

    def __post_init__(self) -> None:
        """Begins with nothing measured."""
        self.measurements = Measurements(
            self.texts,
            self.job.calibration.batch,
            self.job.evaluation.any_perplexity,
            self.console,
        )

    def transform(self, page: Page, command: str) -> None:
        """Takes the job from the dense model to its directory.

        Args:
          page: function that makes report.html of the record.
          command: the words that the record says made it.
        """
        self.look_at_dense()
        with self.costs.phase(self.NAME):
            change = self.change()
        # The same object: later stages are added to it.
        change.record["perplexity"] = self.measurements.perplexity
        with self.costs.phase("evaluate after"):
            self.measurements.measure(self.STAGE, change.model.decoder())
        if self.texts.training is not None:
            change = self._recover(change, self.texts.training)
        self.finish(change)
        # Last, so that the record has what the result was made with.
        change.record.update(provenance.environment(command))
        self.write(change, page)

    def look_at_dense(self) -> None:
        """Measures the dense model, while its parameters are in memory."""
        with self.costs.phase("evaluate before"):
            self.measurements.measure_dense(self.model.decoder())

    @abc.abstractmethod
    def change(self) -> Change:
        """Prunes or shrinks the model."""

    @abc.abstractmethod
    def teacher(self, change: Change) -> Decoder:
        """The dense model, for a distillation of what became of it."""

    @abc.abstractmethod
    def finish(self, change: Change) -> None:
        """Adds to the record what is measured of the last model."""

    @abc.abstractmethod
    def write(self, change: Change, page: Page) -> None:
        """Writes the result with its record and its page."""

    @property
    def last_stage(self) -> str:
        """What the model is in the end."""
        return self.STAGE if self.texts.training is None else self.job.recovery.stage

    def _recover(
        self, change: Change, sequences: Int[np.ndarray, "sequences length"]
    ) -> Change:
        """The change after the recovery, which is measured too."""
        settings = self.job.recovery
        with self.costs.phase(settings.recover_by):
            model, trained, change.record[settings.recover_by] = recovery.recover(
                settings,
                self.job.calibration,
                sequences,
                change.model,
                functools.partial(self.teacher, change),
                change.matrices,
                self.job.work,
            )
        with self.costs.phase(f"evaluate {settings.stage}"):
            self.measurements.measure(settings.stage, model.decoder())
        return change._replace(model=model, moved=change.moved | trained)
