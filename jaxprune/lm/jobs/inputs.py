"""What a job looks at: sequences to calibrate on, windows to measure it by."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from jaxprune.arrays.rules import reworded
from jaxprune.lm.checkpoints.checkpoint_dir import CheckpointDir
from jaxprune.lm.jobs.opening import Beginning, needed_tokenizer, text_beginning
from jaxprune.lm.jobs.prune_settings import PruneJob
from jaxprune.lm.jobs.recovery_settings import Recovery
from jaxprune.lm.jobs.settings import Calibration, Evaluation
from jaxprune.lm.jobs.shrink_settings import ShrinkJob
from jaxprune.lm.measure import perplexity
from jaxprune.lm.measure.tables import name_texts
from jaxprune.lm.models import hf
from jaxprune.lm.texts import text_files

_TOKENIZER = "tokenizer.json"
_HELD_OUT = "held out from calibration"


class JobTexts(NamedTuple):
    """All that a job reads of texts.

    Attributes:
      tokenizer: tokenizer of the model; None where only token ids are read, or nothing.
      begins: what sequences begin with.
      calibration: texts that are calibrated on, without their held-out ends.
      drawn: sequences of them; None without any.
      windows: name of a text to the windows that are evaluated.
      roles: name of an evaluated text to what it is to the calibration.
      training: int32 (sequences, length) to train on afterwards, or None.
      vocab_size: number of tokens that the model knows.
      written: int32 (sequences, length) that the model wrote itself, once it has.
    """

    tokenizer: hf.Tokenizer | None
    begins: Beginning
    calibration: list[text_files.AnyText]
    drawn: text_files.Drawn | None
    windows: dict[str, perplexity.Windows]
    roles: dict[str, str]
    training: Int[np.ndarray, "sequences length"] | None
    vocab_size: int
    written: Int[np.ndarray, "sequences length"] | None = None

    @property
    def counts(self) -> list[int]:
        """Number of sequences of each calibration text."""
        return [] if self.drawn is None else self.drawn.counts

    @property
    def trained_tokens(self) -> int:
        """Number of tokens of all sequences that are trained on afterwards."""
        return 0 if self.training is None else self.training.size

    @property
    def sequences(self) -> Int[np.ndarray, "sequences length"]:
        """All that is calibrated on, the texts in turn."""
        parts = [] if self.drawn is None else list(self.drawn.parts)
        if self.written is not None:
            parts.append(self.written)
        return text_files.interleave(parts)


def read_texts(job: PruneJob | ShrinkJob, source: CheckpointDir) -> JobTexts:
    """Reads the texts, draws the sequences, makes the windows.

    Args:
      job: settings of the texts, and of how the model's directory is read.
      source: directory of the model.

    Returns:
      The texts; nothing of the model but its configuration and tokenizer was read.

    Raises:
      ValueError: the configuration or a text does not fit.
    """
    config = _config(source, job.loading.ignore_config)
    calibration, evaluation, recovery = job.calibration, job.evaluation, job.recovery
    trained: tuple[Path, ...] = ()
    if recovery.recover_steps:
        trained = recovery.trained_files or calibration.files
    paths = (*calibration.files, *evaluation.evaluate, *trained)
    reads = bool(paths or calibration.self_sequences)
    if reads and not calibration.length <= config.context:
        raise ValueError(
            f"--length must be at most the model's context {config.context}, got "
            f"{calibration.length}; give a shorter one, or leave it out"
        )
    tokenizer = needed_tokenizer(job.model, paths)
    if tokenizer is None and calibration.self_sequences:
        tokenizer = optional_tokenizer(source)
    tokenizer, begins = text_beginning(tokenizer, job.loading, config.vocab_size)
    # A text in several roles is read once.
    by_path = {
        path: text_files.read_text(path, tokenizer, config.vocab_size) for path in paths
    }
    files = [by_path[path] for path in calibration.files]
    _check_apart(files)
    ends: list[text_files.Text | None] = [None] * len(files)
    if files and not evaluation.evaluate:  # the end of each text is evaluated
        most = evaluation.limit * evaluation.context
        parts = [
            text_files.hold_out_end(text, most) for text in files
        ]  # of rows no end
        files, ends = [list(part) for part in zip(*parts, strict=True)]
    drawn = (
        draw_calibration(calibration, files, begins, evaluation.limit)
        if files
        else None
    )
    evaluated, roles = _evaluated(
        evaluation.evaluate, by_path, name_texts(calibration.files), files, ends, drawn
    )
    training = None
    if trained:
        # Some rows that were not drawn measure, unless other texts are evaluated.
        measured = drawn.undrawn if drawn and not evaluation.evaluate else ()
        from_texts = without_rows([by_path[path] for path in trained], files, measured)
        training = draw_training(recovery, calibration, from_texts, begins.token)
        roles = _roles_of_trained(roles, evaluated, from_texts)
    windows = _windows(evaluation, config.context, begins, evaluated, tokenizer)
    return JobTexts(
        *(tokenizer, begins, files, drawn, windows, roles, training),
        vocab_size=config.vocab_size,
    )


def _windows(
    evaluation: Evaluation,
    longest: int,
    begins: Beginning,
    evaluated: Mapping[str, text_files.AnyText],
    tokenizer: hf.Tokenizer | None,
) -> dict[str, perplexity.Windows]:
    """The windows of each text that is evaluated."""
    return {
        name: perplexity.windows_of_text(
            text,
            context=evaluation.context,
            bos=begins.token,
            limit=evaluation.limit,
            longest=longest,
            tokenizer=tokenizer,
        )
        for name, text in evaluated.items()
    }


def optional_tokenizer(source: CheckpointDir) -> hf.Tokenizer | None:
    """The tokenizer of a directory that has one, or None."""
    if not (source.path / _TOKENIZER).is_file():
        return None
    return hf.load_tokenizer(source.path)


def describe_calibration(calibration: Calibration, inputs: JobTexts) -> dict[str, Any]:
    """What jaxprune.json says of the texts that were calibrated on."""
    files = [
        {"name": text.path.name, "sha256": text.sha256, "sequences": count}
        for text, count in zip(inputs.calibration, inputs.counts, strict=True)
    ]
    return {
        "files": files,
        "self": calibration.self_sequences,
        "sequences": sum(inputs.counts) + calibration.self_sequences,
        "length": calibration.length,
        "seed": calibration.seed,
        "bos": inputs.begins.why,
    }


def _config(source: CheckpointDir, ignore_config: tuple[str, ...]) -> Any:
    try:
        return hf.decoder_config(source.config, ignore_config=ignore_config)
    except ValueError as error:
        raise reworded(
            error, ValueError, f"'{source.path / 'config.json'}': "
        ) from None


def _check_apart(files: Sequence[text_files.AnyText]) -> None:
    """Refuses one text under two names."""
    digests = [text.sha256 for text in files]  # a link or a copy has another name
    repeated = [str(t.path) for t in files if digests.count(t.sha256) > 1]
    if repeated:
        raise ValueError(
            "each --calibration text must be given once, since its sequences must not "
            f"overlap, but {', '.join(repeated)} are the same; leave all but one out"
        )


def draw_calibration(
    calibration: Calibration,
    files: list[text_files.AnyText],
    begins: Beginning,
    most: int,
) -> text_files.Drawn:
    """The calibration's sequences.

    Args:
      calibration: settings of how many, how long, and of the seed.
      files: texts that are drawn from.
      begins: what sequences begin with.
      most: greatest number of rows of a text that are held out.

    Returns:
      The sequences, and what was not drawn.
    """
    return text_files.draw_sequences(
        files,
        sequences=calibration.sequences - calibration.self_sequences,
        length=calibration.length,
        bos=begins.token,
        seed=calibration.seed,
        most=most,
    )


def _evaluated(
    paths: tuple[Path, ...],
    by_path: Mapping[Path, text_files.AnyText],
    names: Sequence[str],
    files: Sequence[text_files.AnyText],
    ends: Sequence[text_files.Text | None],
    drawn: text_files.Drawn | None,
) -> tuple[dict[str, text_files.AnyText], dict[str, str]]:
    """Which texts are evaluated, by name, and what they are to the calibration."""
    if paths:
        digests = {text.sha256 for text in files}
        pairs = zip(name_texts(paths), paths, strict=True)
        asked = {name: by_path[path] for name, path in pairs}
        return asked, {
            name: "also calibrated on" if text.sha256 in digests else "given"
            for name, text in asked.items()
        }
    undrawn = [] if drawn is None else drawn.undrawn
    evaluated: dict[str, text_files.AnyText] = {}
    for name, end, rows in zip(names, ends, undrawn, strict=True):
        text = end if end is not None else rows  # rows have no end: some are not drawn
        if text is not None:
            evaluated[name] = text
    # All rows are drawn: better to measure on those than on nothing.
    if not evaluated and drawn is not None:
        text = text_files.Text(files[0].path, files[0].sha256, drawn.tokens)
        return {"calibration": text}, {"calibration": "calibrated on"}
    return evaluated, dict.fromkeys(evaluated, _HELD_OUT)


def without_rows(
    trained: Sequence[text_files.AnyText],
    files: Sequence[text_files.AnyText],
    measured: Sequence[text_files.Text | None],
) -> list[text_files.AnyText]:
    """The texts to train on, without what of them is evaluated.

    Args:
      trained: texts to train on, whole.
      files: texts that are calibrated on, without their held-out ends.
      measured: rows of each that the model is measured on; () where none are.

    Returns:
      The texts, those that are calibrated on without the end, or without these rows.
    """
    allowed = {text.sha256: text for text in files}
    for text, held_out in zip(files, measured, strict=False):  # (): nothing held out
        if isinstance(text, text_files.Text) and held_out is not None:
            gone = {row.tobytes() for row in held_out.tokens}
            stays = [row.tobytes() not in gone for row in text.tokens]
            allowed[text.sha256] = text._replace(tokens=text.tokens[stays])
    return [allowed.get(text.sha256, text) for text in trained]


def _roles_of_trained(
    roles: Mapping[str, str],
    evaluated: Mapping[str, text_files.AnyText],
    trained: Sequence[text_files.AnyText],
) -> dict[str, str]:
    """The roles, with a word for texts that are evaluated and trained on."""
    digests = {text.sha256 for text in trained}
    return {
        name: f"{role}, also trained on"
        if evaluated[name].sha256 in digests and role != _HELD_OUT
        else role
        for name, role in roles.items()
    }


def draw_training(
    recovery: Recovery,
    calibration: Calibration,
    trained: list[text_files.AnyText],
    bos: int | None,
) -> Int[np.ndarray, "sequences length"]:
    """Sequences to train on, as many of each text as are used.

    A text that has fewer gives its sequences again and again.

    Args:
      recovery: settings that say how many steps are made.
      calibration: settings of the sequences' length, the batch and the seed.
      trained: texts that are drawn from.
      bos: token that each sequence begins with, or None.

    Returns:
      int32 (sequences, length).
    """
    body = calibration.length - (bos is not None)  # tokens of the text
    used = recovery.steps * recovery.batch(calibration)  # each once, if there are
    # What the model wrote itself has the share of a text.
    used = math.ceil(used * len(trained) / (len(trained) + recovery.own_text))
    due = text_files.shares(max(used, len(trained)), trained)
    available = [
        max(1, text.room(body, n)) for text, n in zip(trained, due, strict=True)
    ]
    drawn = text_files.draw_sequences(
        trained,
        sequences=available,
        length=calibration.length,
        bos=bos,
        seed=calibration.seed + 1,  # other sequences than those calibrated on
        most=0,
    )
    longest = max(available)
    parts = [
        np.resize(part, (min(n, longest), calibration.length))
        for part, n in zip(drawn.parts, due, strict=True)
    ]
    return text_files.interleave(parts)  # (number, length)
