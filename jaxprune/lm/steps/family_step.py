"""The skeleton of a step, filled in for the families of ours.

They are measured by the perplexity of texts.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from jaxprune.arrays.console_progress import Progress
from jaxprune.lm.checkpoints.checkpoint_dir import open_directory
from jaxprune.lm.corpora.self_calibration import self_calibration, sequences_at_once
from jaxprune.lm.measure import perplexity
from jaxprune.lm.measure.machine import Costs
from jaxprune.lm.measure.tables import (
    describe_windows,
    format_bits,
    format_perplexity,
    measure_texts,
)
from jaxprune.lm.models.loaded_model import LoadedModel
from jaxprune.lm.steps import progress_dir, step_texts
from jaxprune.lm.steps.console import Console
from jaxprune.lm.steps.opening import (
    fitted,
    note_ignored,
    open_for_job,
    read_dense,
)
from jaxprune.lm.steps.skeleton import AnyJob, Step
from jaxprune.lm.steps.step_texts import StepTexts


def note_insane(
    texts: Mapping[str, Mapping[str, Any]], stage: str, vocab_size: int, note: Any
) -> None:
    """Warns of a model that predicts no text better than a guess by frequency.

    Args:
      texts: name of a text to what was measured on it.
      stage: name of the stage that was measured.
      vocab_size: number of tokens of the model.
      note: function that says it.
    """
    if texts and not any(
        perplexity.is_sane(text[stage], text["by_frequency"], vocab_size)
        for text in texts.values()
    ):
        note(
            "warning: the model predicts no text better than guessing each token by "
            "its frequency; look at the checkpoint, the tokenizer and --bos"
        )


@dataclasses.dataclass
class Measurements:
    """The perplexity of a step's texts, stage by stage.

    Attributes:
      texts: what is evaluated.
      batch: number of windows that the model sees at once.
      console: where a result is noted.
      perplexity: name of a text to how it is evaluated and what each stage gave.
    """

    texts: StepTexts
    batch: int
    console: Console
    perplexity: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)

    def measure(self, stage: str, model: LoadedModel) -> None:
        """Measures the model at a stage, which is noted; the first is before."""
        is_first = not self.perplexity
        for name, windows in self.texts.windows.items() if is_first else ():
            role = {"role": self.texts.roles[name]}
            self.perplexity[name] = describe_windows(windows) | role
        results = measure_texts(model.decoder(), self.texts.windows, self.batch)
        for name, result in results.items():
            text, bits = self.perplexity[name], result["bits_per_byte"]
            text[stage] = result
            described = (
                f" ({text['role']}; {result['tokens']} tokens, context "
                f"{text['context']}, {self.texts.begins.why})"
            )
            self.console.note(
                f"{stage}: perplexity {format_perplexity(result['perplexity'])} on "
                f"{name}{described if is_first else ''}"
                + ("" if bits is None else f"; {format_bits(bits)} bits per byte")
            )
        if is_first:
            note = self.console.note
            note_insane(self.perplexity, stage, self.texts.vocab_size, note)

    def facts(self) -> dict[str, Any]:
        """What jaxprune.json says of all stages."""
        return {"perplexity": self.perplexity}


def open_step(
    job: AnyJob, console: Console, copies: int, more_bytes: int = 0
) -> dict[str, Any]:
    """Opens what every step on a family of ours needs; reads headers and texts alone.

    Args:
      job: options of the step.
      console: where the step speaks.
      copies: number of copies of the model that are written, the result included.
      more_bytes: bytes that its progress takes besides.

    Returns:
      The attributes of a `FamilyStep`.

    Raises:
      ValueError: the model or a text does not fit.
      OSError: the disk has less room.
    """
    costs = Costs()
    with costs.phase("read"):
        source = open_directory(job.model)
        calibration = fitted(job.calibration, source, job.loading.ignore_config)
        job = dataclasses.replace(job, calibration=calibration)
        model = open_for_job(job.model, job.loading)
        texts = step_texts.read_texts(job, source)
        progress_dir.check_room(job, source.size * copies + more_bytes)
    note_ignored(model, console)
    fields = {"job": job, "source": source, "console": console, "costs": costs}
    return fields | {"model": model, "texts": texts}


@dataclasses.dataclass(kw_only=True)
class FamilyStep(Step[AnyJob, LoadedModel]):
    """A step on a model of a family of ours.

    Attributes:
      model: model before, whose parameters may still be in its files.
      texts: what is calibrated on and evaluated.
    """

    model: LoadedModel
    texts: StepTexts

    @functools.cached_property
    def measurements(self) -> Measurements:
        """The perplexity of the texts."""
        return Measurements(self.texts, self.job.calibration.batch, self.console)

    def facts(self) -> dict[str, Any]:
        """What decides the result of any step, known without reading a weight."""
        return progress_dir.job_facts(self.job, self.source, self.texts)

    def look_at_dense(self) -> None:
        """Measures the model before, and lets it write a part of the calibration."""
        with self.costs.phase("evaluate before"):
            dense = read_dense(self.model)  # freed when this is done
            self.measurements.measure(self.STAGES[0], dense)
        self.write_calibration(dense)

    def write_calibration(self, writer: LoadedModel) -> None:
        """Lets a model write the calibration's own sequences, where it has any."""
        calibration, texts = self.job.calibration, self.texts
        number = calibration.self_sequences
        if not number:
            return
        shown = Progress(number, "writing", unit="sequence", leave=False)
        with self.costs.phase("write calibration"), shown as progress:
            decoder = writer.decoder()
            size = {"sequences": number, "length": calibration.length}
            written = self_calibration(
                decoder,
                **size,
                seed=calibration.seed,
                bos=texts.begins.token,
                never_first=_never_first(texts),
                batch=sequences_at_once(decoder, **size, least=calibration.batch),
                directory=self.job.work / "self",
                progress=progress.update,
            )
        self.texts = texts._replace(written=written)


def _never_first(texts: StepTexts) -> set[int]:
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
