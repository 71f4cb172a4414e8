"""The texts of a step: sequences to calibrate on, windows to measure it by."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from jaxprune.arrays.rules import reworded
from jaxprune.lm.checkpoints.checkpoint_dir import CheckpointDir
from jaxprune.lm.corpora import text_files
from jaxprune.lm.measure import perplexity
from jaxprune.lm.measure.tables import name_texts
from jaxprune.lm.models import hf
from jaxprune.lm.steps.opening import (
    Beginning,
    needed_tokenizer,
    text_beginning,
    window_length,
)
from jaxprune.lm.steps.settings import WINDOWS, Calibration, Job, TrainingTexts

_TOKENIZER = "tokenizer.json"


class StepTexts(NamedTuple):
    """All that a step reads of texts.

    Attributes:
      tokenizer: tokenizer of the model; None where only token ids are read, or nothing.
      begins: what sequences begin with.
      calibration: texts that are calibrated on, without their held-out ends.
      drawn: sequences of them; None without any.
      windows: name of a text to the windows that are evaluated.
      roles: name of an evaluated text to what it is to the calibration.
      vocab_size: number of tokens that the model knows.
      written: int32 (sequences, length) that the model wrote itself, once it has.
    """

    tokenizer: hf.Tokenizer | None
    begins: Beginning
    calibration: list[text_files.AnyText]
    drawn: text_files.Drawn | None
    windows: dict[str, perplexity.Windows]
    roles: dict[str, str]
    vocab_size: int
    written: Int[np.ndarray, "sequences length"] | None = None

    @property
    def counts(self) -> list[int]:
        """Number of sequences of each calibration text."""
        return [] if self.drawn is None else self.drawn.counts

    @property
    def parts(self) -> list[Int[np.ndarray, "sequences length"]]:
        """The sequences of each text; last what the model wrote itself."""
        parts = [] if self.drawn is None else list(self.drawn.parts)
        return parts if self.written is None else [*parts, self.written]

    @property
    def sequences(self) -> Int[np.ndarray, "sequences length"]:
        """All that is calibrated on, the texts in turn."""
        return text_files.interleave(self.parts)

    def describe(self, calibration: Calibration) -> dict[str, Any]:
        """What jaxprune.json says of the texts that were calibrated on."""
        files = [
            {"name": text.path.name, "sha256": text.sha256, "sequences": count}
            for text, count in zip(self.calibration, self.counts, strict=True)
        ]
        return {
            "files": files,
            "self": calibration.self_sequences,
            "sequences": sum(self.counts) + calibration.self_sequences,
            "length": calibration.length,
            "seed": calibration.seed,
            "bos": self.begins.why,
        }

    def plan_lines(self, calibration: Calibration) -> list[str]:
        """Which texts `--plan` says would be calibrated and evaluated on."""
        pairs = zip(self.calibration, self.counts, strict=True)
        parts = [f"{text.path.name} {count}" for text, count in pairs]
        if count := calibration.self_sequences:
            parts.append(f"what the model writes itself {count}")
        sequences = f"sequences of {calibration.length} tokens: {', '.join(parts)}"
        windows = [f"{name} ({self.roles[name]})" for name in self.windows]
        return [
            f"calibrated on {sequences if parts else 'nothing'}",
            f"evaluated on {', '.join(windows) or 'nothing'}",
        ]


def read_texts(job: Job, source: CheckpointDir) -> StepTexts:
    """Reads the texts, draws the sequences, makes the windows.

    Args:
      job: options of the texts, and of how the model's directory is read.
      source: directory of the model.

    Returns:
      The texts; nothing of the model but its configuration and tokenizer was read.

    Raises:
      ValueError: the configuration or a text does not fit.
    """
    config = _config(source, job.loading.ignore_config)
    calibration, paths = job.calibration, job.calibration.evaluate
    read = (*calibration.files, *paths)
    if (read or calibration.self_sequences) and calibration.length > config.context:
        raise ValueError(
            f"--length must be at most the model's context {config.context}, got "
            f"{calibration.length}; give a shorter one, or leave it out"
        )
    tokenizer = needed_tokenizer(job.model, read)
    writes = tokenizer is None and calibration.self_sequences
    if writes and (source.path / _TOKENIZER).is_file():
        tokenizer = hf.load_tokenizer(source.path)
    tokenizer, begins = text_beginning(tokenizer, job.loading.bos, config.vocab_size)
    # A text in several roles is read once.
    by_path = {
        path: text_files.read_text(path, tokenizer, config.vocab_size) for path in read
    }
    files = [by_path[path] for path in calibration.files]
    _check_apart(files)
    context = window_length(config.context)
    evaluated = {
        name: by_path[path] for name, path in zip(name_texts(paths), paths, strict=True)
    }
    digests = {text.sha256 for text in files}
    roles = {
        name: "also calibrated on" if text.sha256 in digests else "given"
        for name, text in evaluated.items()
    }
    ends: list[text_files.Text | None] = []
    if not paths and files:  # the end of each text is evaluated; rows have no end
        parts = [text_files.hold_out_end(text, WINDOWS * context) for text in files]
        files, ends = [list(part) for part in zip(*parts, strict=True)]
    drawn = draw_calibration(calibration, files, begins) if files else None
    if ends and drawn is not None:
        for name, end, rows in zip(
            name_texts(calibration.files), ends, drawn.undrawn, strict=True
        ):
            if (text := end if end is not None else rows) is not None:
                evaluated[name], roles[name] = text, "held out from calibration"
        if not evaluated:  # all rows are drawn: better those than nothing
            whole = text_files.Text(files[0].path, files[0].sha256, drawn.tokens)
            evaluated, roles = {"calibration": whole}, {"calibration": "calibrated on"}
    windows = {
        name: perplexity.windows_of_text(
            text,
            context=context,
            bos=begins.token,
            limit=WINDOWS,
            longest=config.context,
            tokenizer=tokenizer,
        )
        for name, text in evaluated.items()
    }
    return StepTexts(
        *(tokenizer, begins, files, drawn, windows, roles, config.vocab_size)
    )


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
    calibration: Calibration, files: list[text_files.AnyText], begins: Beginning
) -> text_files.Drawn:
    """The sequences of these texts, and the rows that were not drawn."""
    sequences: Any = calibration.sequences - calibration.self_sequences
    if isinstance(calibration, TrainingTexts):  # which may come again
        body = calibration.length - (begins.token is not None)
        due = text_files.shares(sequences, files)
        sequences = [
            max(1, text.room(body, n)) for text, n in zip(files, due, strict=True)
        ]
    return text_files.draw_sequences(
        files,
        sequences=sequences,
        length=calibration.length,
        bos=begins.token,
        seed=calibration.seed,
        most=WINDOWS,  # rows of a text that are held out
    )
