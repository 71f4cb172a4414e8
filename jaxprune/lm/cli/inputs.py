"""What a job looks at: sequences to calibrate on, windows to measure it by."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxprune.lm.checkpoints.checkpoint_dir import CheckpointDir
from jaxprune.lm.cli import models
from jaxprune.lm.cli.console import Console
from jaxprune.lm.cli.eval import described, measure, named, needed_tokenizer, number
from jaxprune.lm.cli.job_options import JobOptions
from jaxprune.lm.measure import perplexity
from jaxprune.lm.models import hf
from jaxprune.lm.texts import text_files

_TOKENIZER = "tokenizer.json"
_HELD_OUT = "held out from calibration"


class Ready(NamedTuple):
    """All that was read of texts.

    Attributes:
      tokenizer: the model's; None where only token ids are read, or nothing.
      begins: what sequences begin with.
      calibration: the texts that are calibrated on, without their held-out ends.
      drawn: sequences of them; None without any.
      own: sequences that the model wrote itself, once it has; None without.
      seen: name to what is evaluated.
      roles: name to what the text is to the calibration.
      recovery: sequences to train on afterwards, or None.
      vocab_size: the model's.
    """

    tokenizer: hf.Tokenizer | None
    begins: models.Beginning
    calibration: list[text_files.AnyText]
    drawn: text_files.Drawn | None
    seen: dict[str, perplexity.Windows]
    roles: dict[str, str]
    recovery: np.ndarray | None
    vocab_size: int
    own: np.ndarray | None = None

    @property
    def sequences(self) -> np.ndarray:
        """All that is calibrated on, int32 (sequences, length), each kind in turn."""
        parts = [] if self.drawn is None else list(self.drawn.parts)
        return text_files.interleave(parts + ([] if self.own is None else [self.own]))


def prepare(job: JobOptions, source: CheckpointDir) -> Ready:
    """Reads the texts, draws the sequences, makes the windows."""
    try:
        config = hf.decoder_config(source.config, ignore_config=job.ignore_config)
    except ValueError as error:
        raise ValueError(f"'{source.path / 'config.json'}': {error}") from None
    recovery = job.recovery
    later = recovery.texts if recovery else ()
    files = (*job.calibration_files, *job.evaluate, *later)
    if (files or job.own_sequences) and job.length > config.context:
        raise ValueError(
            f"--length must be at most the model's context {config.context}, got "
            f"{job.length}; give a shorter one, or leave it out"
        )
    tokenizer, begins = _tokenizer(job, source, files, config.vocab_size)
    whole = {
        path: text_files.read_text(path, tokenizer, config.vocab_size) for path in files
    }
    own = [whole[path] for path in job.calibration_files]
    digests = [text.sha256 for text in own]
    if twice := [str(t.path) for t in own if digests.count(t.sha256) > 1]:
        raise ValueError(
            "each --calibration text must be given once, since its sequences must not "
            f"overlap, but {', '.join(twice)} are the same; leave all but one out"
        )
    ends: list[text_files.Text | None] = [None] * len(own)
    # Without a text to evaluate, the end of each calibration text is held out for it.
    if own and not job.evaluate:
        parts = [text_files.hold_out_end(text, job.limit * job.length) for text in own]
        own, ends = [list(part) for part in zip(*parts, strict=True)]
    drawn = None
    if own:
        drawn = text_files.draw_sequences(
            own,
            sequences=job.sequences - job.own_sequences,
            length=job.length,
            bos=begins.token,
            seed=job.seed,
            most=job.limit,
        )
    evaluated, roles = _evaluated(job, whole, own, ends, drawn)
    seen = {
        name: perplexity.windows_of_text(
            text,
            context=job.length,
            bos=begins.token,
            limit=job.limit,
            longest=config.context,
        )
        for name, text in evaluated.items()
    }
    training = None
    if recovery:
        again = {} if drawn is None else _trainable(job, own, drawn)
        from_texts = [again.get(whole[path].sha256, whole[path]) for path in later]
        training = _sequences(job, recovery.steps, from_texts, begins.token)
        _say_trained_on(roles, evaluated, from_texts)
    return Ready(
        tokenizer, begins, own, drawn, seen, roles, training, config.vocab_size
    )


def _tokenizer(
    job: JobOptions, source: CheckpointDir, files: tuple[Path, ...], vocab_size: int
) -> tuple[hf.Tokenizer | None, models.Beginning]:
    """The model's tokenizer where one is needed, and what sequences begin with."""
    tokenizer = needed_tokenizer(job.model, files)
    if tokenizer is None and job.own_sequences and (source.path / _TOKENIZER).is_file():
        tokenizer = hf.load_tokenizer(job.model)
    begins = models.beginning(tokenizer, job, vocab_size)
    return models.as_begun(tokenizer, begins), begins


def _say_trained_on(
    roles: dict[str, str],
    evaluated: Mapping[str, text_files.AnyText],
    taught: Sequence[text_files.AnyText],
) -> None:
    """Adds to the roles of what is evaluated that it is trained on, where it is."""
    digests = {text.sha256 for text in taught}
    for name, text in evaluated.items():
        if text.sha256 in digests and roles[name] != _HELD_OUT:
            roles[name] += ", also trained on"


def _evaluated(
    job: JobOptions,
    whole: dict[Path, text_files.AnyText],
    own: list[text_files.AnyText],
    ends: list[text_files.Text | None],
    drawn: text_files.Drawn | None,
) -> tuple[dict[str, text_files.AnyText], dict[str, str]]:
    """Which texts are evaluated, by name, and what they are to the calibration."""
    if job.evaluate:
        names, digests = named(job.evaluate), {text.sha256 for text in own}
        given = {n: whole[path] for n, path in zip(names, job.evaluate, strict=True)}
        return given, {
            name: "also calibrated on" if text.sha256 in digests else "given"
            for name, text in given.items()
        }
    left = drawn.undrawn if drawn is not None else []
    evaluated: dict[str, text_files.AnyText] = {}
    roles = {}
    names = named(job.calibration_files)
    for name, end, rest in zip(names, ends, left, strict=True):
        text = end if end is not None else rest
        if text is not None:
            evaluated[name], roles[name] = text, _HELD_OUT
    if not evaluated and drawn is not None:
        text = text_files.Text(own[0].path, own[0].sha256, drawn.tokens)
        evaluated, roles = {"calibration": text}, {"calibration": "calibrated on"}
    return evaluated, roles


def _trainable(
    job: JobOptions, own: list[text_files.AnyText], drawn: text_files.Drawn
) -> dict[str, text_files.AnyText]:
    """What of each calibration text, by its digest, may be trained on.

    Nothing that is evaluated.
    """
    found = {text.sha256: text for text in own}
    for text, part in zip(own, drawn.parts, strict=True):
        if isinstance(text, text_files.Text) and text.is_rows and not job.evaluate:
            found[text.sha256] = text._replace(tokens=part)
    return found


def _sequences(
    job: JobOptions, steps: int, later: list[text_files.AnyText], bos: int | None
) -> np.ndarray:
    """Sequences to train on: all that the texts have, or as many as are used."""
    body = job.length - (bos is not None)
    wanted = steps * job.batch
    of_each = math.ceil(wanted / len(later))
    have = min(text.room(body, of_each) for text in later)
    number = max(len(later), min(have * len(later), wanted))
    found = text_files.draw_sequences(
        later, sequences=number, length=job.length, bos=bos, seed=job.seed + 1, most=0
    )
    return found.tokens


def dense(
    job: JobOptions, ready: Ready, model: models.Model, console: Console
) -> dict[str, dict[str, Any]]:
    """Measures the model as it is, and refuses one that knows nothing."""
    # For each text: how it is evaluated and, under "dense", what was measured.
    found = {
        name: described(own) | {"role": ready.roles[name]}
        for name, own in ready.seen.items()
    }
    before = measure(model, ready.seen, job.batch)
    add(found, "dense", before)
    sane = [
        perplexity.is_sane(before[name], of["by_frequency"], ready.vocab_size)
        for name, of in found.items()
    ]
    for name, of in found.items():
        console.note(
            f"dense: perplexity {number(before[name]['perplexity'])} on {name} "
            f"({of['role']}; {before[name]['tokens']} tokens, context {of['context']}, "
            f"{ready.begins.why})"
        )
    if found and not any(sane) and not job.any_perplexity:
        results = ", ".join(
            f"{number(before[name]['perplexity'])} on {name}, where guessing by "
            f"frequency has {number(of['by_frequency'])}"
            for name, of in found.items()
        )
        raise ValueError(
            "the dense model must know something before anything is removed, but its "
            f"perplexity is {results} (vocabulary {ready.vocab_size}); look at the "
            "checkpoint, the tokenizer and BOS, or give --any-perplexity"
        )
    return found


def add(
    found: dict[str, dict[str, Any]], stage: str, measured: dict[str, dict[str, Any]]
) -> None:
    """Notes in `found` what was measured at a stage, text by text."""
    for name, result in measured.items():
        found[name][stage] = result


def calibration(job: JobOptions, ready: Ready) -> dict[str, Any]:
    """What jaxprune.json says of the texts that were calibrated on."""
    counts = ready.drawn.counts if ready.drawn is not None else []
    files = [
        {"name": text.path.name, "sha256": text.sha256, "sequences": count}
        for text, count in zip(ready.calibration, counts, strict=True)
    ]
    return {
        "files": files,
        "self": job.own_sequences,
        "sequences": sum(counts) + job.own_sequences,
        "length": job.length,
        "seed": job.seed,
        "bos": ready.begins.why,
    }
