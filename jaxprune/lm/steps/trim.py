"""`jaxprune trim`: a model with fewer tokens, as a directory that every loader reads.

Those stay that the texts have most and that the model expects along them, and what any
text needs. The model is measured by bits per byte: two vocabularies split a text into
other tokens.
"""

import dataclasses
import functools
from typing import Any

import numpy as np
from jaxtyping import Float, Int

import jaxprune as jp
from jaxprune.arrays.console_progress import Progress
from jaxprune.lm.measure import perplexity
from jaxprune.lm.models.decoder.model import Decoder
from jaxprune.lm.models.loaded_model import LoadedModel
from jaxprune.lm.steps import rules
from jaxprune.lm.steps.console import Console
from jaxprune.lm.steps.family_step import FamilyStep, open_step
from jaxprune.lm.steps.opening import read_dense
from jaxprune.lm.steps.settings import TrimJob
from jaxprune.lm.steps.shrink import add_sizes, write_smaller
from jaxprune.lm.steps.skeleton import Change, Prepared
from jaxprune.lm.steps.step_texts import StepTexts
from jaxprune.lm.vocabulary.expected_counts import expected_counts
from jaxprune.lm.vocabulary.new_vocabulary import (
    NewVocabulary,
    choose_vocabulary,
    count_tokens,
)
from jaxprune.posttraining.progress import ProgressLog

_COUNTED = 2**22  # tokens of a text, from its beginning
_EXPECTED = "expected"  # in the progress
PREDICTED = 64
"""The most sequences of the calibration along which tokens are expected."""


def prepare_trim(job: TrimJob, console: Console) -> Prepared:
    """Reads what a smaller vocabulary needs, and refuses what does not fit.

    Args:
      job: options of the vocabulary.
      console: where it speaks.

    Returns:
      The step, ready to run.

    Raises:
      ValueError: something does not fit; nothing was written.
    """
    rules.check_options(job, rules.TRIM)
    trimming = Trimming(**open_step(job, console, copies=1))
    size, rows = job.tokens, trimming.texts.vocab_size
    if size >= rows:
        raise ValueError(
            f"--tokens must be less than the {rows} that there are, got {size}"
        )
    trimming.choose(None)  # refuses a tokenizer that is not understood
    return Prepared(trimming.plan, trimming.run)


@dataclasses.dataclass(kw_only=True)
class Trimming(FamilyStep[TrimJob]):
    """A model that loses the rows of some tokens; all else is copied bit for bit."""

    NAME, STAGES = "trim", ("dense", "trimmed")

    def facts(self) -> dict[str, Any]:
        """What decides the smaller vocabulary, known without reading a weight."""
        return {**super().facts(), "tokens": self.job.tokens}

    def look_at_dense(self) -> None:
        """Reads the model once; see `FamilyStep`."""
        self.model = read_dense(self.model)
        super().look_at_dense()

    def choose(self, expected: Float[np.ndarray, " rows"] | None) -> NewVocabulary:
        """The tokens that stay."""
        counts, size = _count_mixture(self.texts), self.job.tokens
        tokenizer: Any = self.texts.tokenizer  # token ids alone were refused before
        return choose_vocabulary(self.source, tokenizer, counts, size, expected)

    @functools.cached_property
    def vocabulary(self) -> NewVocabulary:
        """The tokens that stay, by the texts and by what the model expects."""
        vocabulary = self.choose(self._expect(self.model.decoder()))
        self.console.note(
            f"{len(vocabulary.kept):,} of {vocabulary.rows:,} tokens stay; of the "
            f"calibration's tokens they are {vocabulary.covered:.2%}"
        )
        return vocabulary

    def change(self) -> Change[LoadedModel]:
        """Takes the rows of the tokens that stay, and splits the windows anew."""
        vocabulary = self.vocabulary
        small = self.model.with_tokens(vocabulary.kept)
        windows = {
            name: perplexity.retokenize_windows(text, vocabulary.tokenizer)
            for name, text in self.texts.windows.items()
        }
        self.measurements.texts = self.texts._replace(windows=windows)
        record = {
            "method": "vocabulary by counts and expected counts",
            "pattern": "whole tokens",
            "sparsity": {"tokens": self.job.tokens},
            "calibration": self.texts.describe(self.job.calibration),
            "vocabulary": vocabulary.facts,
            "ignored_config": list(self.model.ignored),
            "layers": {"kept": [*range(self.model.config.layers)]},
        }
        return Change(small, set(jp.tree.names(small.params)), set(), record)

    def finish(self, change: Change[LoadedModel]) -> None:
        """Adds the sizes of both models."""
        add_sizes(change.record, self.model, change.model)

    def write(self, change: Change[LoadedModel]) -> None:
        """Writes the smaller directory with its tokenizer."""
        kept, settings = change.record["layers"]["kept"], self.vocabulary.settings
        write_smaller(self, change, kept=kept, settings=settings)

    def plan(self) -> dict[str, Any]:
        """Says how many tokens would stay, and by which texts."""
        rows, size = self.texts.vocab_size, self.job.tokens
        self.console.say(f"{size:,} of {rows:,} tokens would stay")
        for line in self.texts.plan_lines(self.job.calibration):
            self.console.say(line)
        self.console.say("nothing was written")
        return {"plan": {"tokens": [rows, size]}}

    def _expect(self, model: Decoder) -> Float[np.ndarray, " rows"]:
        """How often the model expects each token along the calibration."""
        log = ProgressLog(self.job.work / "vocabulary", {})
        if (kept := log.read(_EXPECTED)) is not None:
            return kept[0][_EXPECTED]
        sequences, batch = self.texts.sequences[:PREDICTED], self.job.calibration.batch
        with Progress(len(sequences), "expecting tokens", unit="sequence") as shown:
            counts = expected_counts(
                model, sequences, batch=batch, progress=shown.update
            )
        log.write(_EXPECTED, {_EXPECTED: counts}, {"tokens": sequences.size})
        return counts


def _count_mixture(texts: StepTexts) -> Int[np.ndarray, " rows"]:
    """Number of times that each token is in the texts, all of which weigh alike."""
    rows = texts.vocab_size
    counts = [count_tokens(t.first(_COUNTED), rows) for t in texts.calibration]
    if texts.written is not None:  # counts as a text
        counts.append(count_tokens(texts.written.ravel(), rows))
    totals = [max(int(count.sum()), 1) for count in counts]
    scaled = [
        np.rint(count * (max(totals) / total)).astype(np.int64)
        for count, total in zip(counts, totals, strict=True)
    ]
    return np.sum(scaled, axis=0)
