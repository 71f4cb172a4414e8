"""The skeleton of a job, filled in for the families of ours.

They are measured by the perplexity of texts, and can be trained again.
"""

import abc
import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from jaxprune.arrays.console_progress import Progress
from jaxprune.lm.jobs import progress_dir, recovery
from jaxprune.lm.jobs.console import Console
from jaxprune.lm.jobs.inputs import JobTexts
from jaxprune.lm.jobs.opening import read_dense
from jaxprune.lm.jobs.sane_model import check_sane
from jaxprune.lm.jobs.transformation import AnyJob, Change, Transformation
from jaxprune.lm.measure.tables import (
    describe_windows,
    format_bits,
    format_perplexity,
    measure_texts,
)
from jaxprune.lm.models.decoder.model import Decoder
from jaxprune.lm.models.loaded_model import LoadedModel
from jaxprune.lm.texts.self_calibration import self_calibration, sequences_at_once


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

    def measure(self, stage: str, model: LoadedModel) -> None:
        """Measures the model at a stage, which is noted."""
        for name, result in self.add(stage, model.decoder()).items():
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
        if not self.any_perplexity:
            suspects = "checkpoint, the tokenizer and BOS"
            check_sane(self.perplexity, self.texts.vocab_size, suspects)

    def facts(self) -> dict[str, Any]:
        """What jaxprune.json says of all stages; later ones are added to it."""
        return {"perplexity": self.perplexity}


def _never_first(texts: JobTexts) -> set[int]:
    """The tokens that nothing that is written begins with.

    Special ones, rows for no token, and beside other texts the tokens that these lack:
    most of a large vocabulary is of languages in which what is written would go on.
    """
    never: set[int] = set()
    if texts.drawn is not None:
        never |= set(range(texts.vocab_size)).difference(texts.drawn.tokens.flat)
    if texts.tokenizer is not None:
        unused = range(texts.tokenizer.vocab_size, texts.vocab_size)
        never |= {*texts.tokenizer.special, *unused}
    return never


def _bits_words(result: Mapping[str, Any]) -> str:
    """Bits per byte, where the bytes are known."""
    bits = result["bits_per_byte"]
    return "" if bits is None else f"; {format_bits(bits)} bits per byte"


@dataclasses.dataclass(kw_only=True)
class ModelTransformation(Transformation[AnyJob, LoadedModel]):
    """A job on a model of a family of ours.

    Attributes:
      model: dense model.
      texts: what is calibrated on and evaluated.
      other_teacher: the model of `--recover-teacher`, still in its files, or None.
    """

    model: LoadedModel
    texts: JobTexts
    other_teacher: LoadedModel | None = None

    @functools.cached_property
    def measurements(self) -> Measurements:
        """The perplexity of the texts."""
        return Measurements(
            self.texts,
            self.job.calibration.batch,
            self.job.evaluation.any_perplexity,
            self.console,
        )

    def look_at_dense(self) -> None:
        """Measures the dense model, while its parameters are in memory."""
        with self.costs.phase("evaluate before"):
            self.measurements.measure_dense(self.model.decoder())

    def write_calibration(self, writer: LoadedModel) -> None:
        """Lets a model write what `--calibration self` asks for.

        Args:
          writer: model whose parameters are in memory, with the tokens of the texts.
        """
        calibration, texts = self.job.calibration, self.texts
        number = calibration.self_sequences
        if not number:
            return
        shown = Progress(number, "writing", unit="sequence", leave=False)
        with self.costs.phase("write calibration"), shown as progress:
            decoder = writer.decoder()
            written = self_calibration(
                decoder,
                sequences=number,
                length=calibration.length,
                seed=calibration.seed,
                temperature=calibration.calibration_temperature,
                bos=texts.begins.token,
                never_first=_never_first(texts),
                batch=sequences_at_once(
                    decoder,
                    sequences=number,
                    length=calibration.length,
                    least=calibration.batch,
                ),
                directory=self.job.work / "self",
                progress=progress.update,
            )
        self.texts = texts._replace(written=written)

    @abc.abstractmethod
    def before(self, change: Change[LoadedModel]) -> LoadedModel:
        """The dense model, with the tokens of what became of it."""

    def with_tokens(self, model: LoadedModel) -> LoadedModel:
        """Another model with the tokens that the job leaves."""
        return model

    def teacher(self, change: Change[LoadedModel]) -> Decoder:
        """The model that a distillation follows."""
        if self.other_teacher is None:
            return self.before(change).decoder()
        return self.with_tokens(read_dense(self.other_teacher)).decoder()

    def recover(self, change: Change[LoadedModel]) -> Change[LoadedModel]:
        """The change after the recovery, where one was asked for; measured too."""
        settings, sequences = self.job.recovery, self.texts.training
        if sequences is None:
            return change
        with self.costs.phase(settings.recover_by):
            model, trained, change.record[settings.recover_by] = recovery.recover(
                settings,
                self.job.calibration,
                sequences,
                model=change.model,
                teacher=functools.partial(self.teacher, change),
                matrices=change.matrices,
                work=self.job.work / progress_dir.RECOVERY,
                written=self.texts.written,
            )
        with self.costs.phase(f"evaluate {settings.stage}"):
            self.measurements.measure(settings.stage, model)
        return change._replace(model=model, moved=change.moved | trained)
