"""A job's vocabulary: the tokens that its texts need, and its texts split by them.

That enough can stay is known before the weights are read. Which do, the dense model
says too: it is measured by its own tokens, writes text with them, and expects others
along all of the calibration.
All that follows, calibration, search, recovery and the second measurement, is by the
new ones, on the same stretches of text.
"""

import dataclasses

import numpy as np
from jaxtyping import Float, Int

from jaxprune.arrays.console_progress import Progress
from jaxprune.lm.checkpoints.checkpoint_dir import CheckpointDir
from jaxprune.lm.jobs import inputs
from jaxprune.lm.jobs.console import Console
from jaxprune.lm.jobs.inputs import JobTexts
from jaxprune.lm.jobs.opening import text_beginning
from jaxprune.lm.jobs.shrink_settings import ShrinkJob
from jaxprune.lm.measure import perplexity
from jaxprune.lm.models.decoder.model import Decoder
from jaxprune.lm.models.hf import Tokenizer
from jaxprune.lm.texts import text_files
from jaxprune.lm.texts.long_text import LongText, encode_text
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


def check_vocabulary(job: ShrinkJob, source: CheckpointDir, texts: JobTexts) -> None:
    """Refuses a vocabulary that cannot become as small, without reading a weight.

    Args:
      job: what was asked for.
      source: directory of the model.
      texts: texts by the model's tokenizer.

    Raises:
      ValueError: the tokenizer is not understood, or so few tokens cannot stay.
    """
    size, tokenizer = job.removal.vocab, texts.tokenizer
    if size is not None and tokenizer is not None:
        choose_vocabulary(source, tokenizer, _count_mixture(texts), size)


def choose_for_job(
    job: ShrinkJob,
    source: CheckpointDir,
    texts: JobTexts,
    model: Decoder,
    console: Console,
) -> tuple[NewVocabulary, JobTexts] | None:
    """The vocabulary that a job asks for, and its texts by the new tokenizer.

    Args:
      job: what was asked for.
      source: directory of the model.
      texts: texts by the model's tokenizer.
      model: dense model.
      console: where it is said what stays.

    Returns:
      Both, or None where all tokens stay.

    Raises:
      ValueError: as `check_vocabulary`.
    """
    size, tokenizer = job.removal.vocab, texts.tokenizer
    if size is None or tokenizer is None:  # token ids alone were refused before
        return None
    vocabulary = choose_vocabulary(
        source, tokenizer, _count_mixture(texts), size, _expect(job, texts, model)
    )
    console.note(
        f"{len(vocabulary.kept):,} of {vocabulary.rows:,} tokens stay; of the "
        f"calibration's tokens they are {vocabulary.covered:.2%}"
    )
    return vocabulary, _split_anew(job, texts, tokenizer, vocabulary)


def _expect(
    job: ShrinkJob, texts: JobTexts, model: Decoder
) -> Float[np.ndarray, " rows"]:
    """How often the dense model expects each token; kept in the progress."""
    log = ProgressLog(job.work / "vocabulary", {})
    if (kept := log.read(_EXPECTED)) is not None:
        return kept[0][_EXPECTED]
    # The texts in turn, and enough: all logits of a token take most of the job.
    sequences, batch = texts.sequences[:PREDICTED], job.calibration.batch
    with Progress(len(sequences), "expecting tokens", unit="sequence") as shown:
        counts = expected_counts(model, sequences, batch=batch, progress=shown.update)
    log.write(_EXPECTED, {_EXPECTED: counts}, {"tokens": sequences.size})
    return counts


def _count_mixture(texts: JobTexts) -> Int[np.ndarray, " rows"]:
    """How often the calibration has each token, where each text counts alike."""
    rows = texts.vocab_size
    counts = [count_tokens(t.first(_COUNTED), rows) for t in texts.calibration]
    if texts.written is not None:  # counts as a text
        counts.append(count_tokens(texts.written.ravel(), rows))
    longest = max(int(count.sum()) for count in counts)
    # A short text of a kind says as much of that kind as a long one.
    return sum(
        (
            np.rint(count * (longest / max(int(count.sum()), 1))).astype(np.int64)
            for count in counts
        ),
        np.zeros(rows, np.int64),
    )


def _split_anew(
    job: ShrinkJob, texts: JobTexts, before: Tokenizer, vocabulary: NewVocabulary
) -> JobTexts:
    """The same texts as the new tokenizer splits them."""
    size, tokenizer = len(vocabulary.kept), vocabulary.tokenizer
    _, begins = text_beginning(tokenizer, job.loading, size)
    tokenizer = dataclasses.replace(tokenizer, begins=begins.token is not None)
    calibration = [_retokenized(t, before, tokenizer, size) for t in texts.calibration]
    calibrating, most = job.calibration, job.evaluation.limit
    drawn = inputs.draw_calibration(calibrating, calibration, begins, most)
    written = texts.written
    if written is not None:
        written = written[:, int(texts.begins.token is not None) :]
        written = _written_anew(written, before, tokenizer, begins.token)
    training = None
    if texts.training is not None:
        paths = job.recovery.trained_files or calibrating.files
        trained = [text_files.read_text(path, tokenizer, size) for path in paths]
        # Without the ends that are held out of those that are calibrated on.
        trained = inputs.without_rows(trained, calibration, ())
        training = inputs.draw_training(
            job.recovery, calibrating, trained, begins.token
        )
    windows = {
        name: perplexity.retokenize_windows(text, tokenizer)
        for name, text in texts.windows.items()
    }
    return texts._replace(
        tokenizer=tokenizer,
        begins=begins,
        calibration=calibration,
        drawn=drawn,
        windows=windows,
        training=training,
        vocab_size=size,
        written=written,
    )


def _written_anew(
    written: Int[np.ndarray, "sequences body"],
    before: Tokenizer,
    after: Tokenizer,
    bos: int | None,
) -> Int[np.ndarray, "sequences length"]:
    """What the dense model wrote, each sequence as another tokenizer splits it."""
    rows = []
    for row in written.tolist():
        tokens = after.encode(before.decode(row, special=True), bos=False)
        # Mostly more tokens than before. Where they are fewer, since the model did not
        # write them as its tokenizer splits them, the first ones fill the row.
        rows.append(np.resize(np.asarray(tokens, np.int32), len(row)))
    anew = np.stack(rows)
    return anew if bos is None else np.insert(anew, 0, bos, axis=1)


def _retokenized(
    text: text_files.AnyText, before: Tokenizer, after: Tokenizer, size: int
) -> text_files.AnyText:
    """A text as another tokenizer splits it."""
    if isinstance(text, LongText):
        return dataclasses.replace(text, tokenizer=after, vocab_size=size)
    words = before.decode(text.tokens.tolist(), special=True)
    return text._replace(tokens=encode_text(words, text.path, after, size))
