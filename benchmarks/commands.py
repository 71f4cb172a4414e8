"""Texts, runs and records of the benchmarks that call the project's own commands."""

import io
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import texts
from jaxprune.files import atomic
from jaxprune.lm.checkpoints import rewrite
from jaxprune.lm.corpora.self_calibration import self_calibration
from jaxprune.lm.models import hf

TRAINED = ("plays", "technical")
HELD_OUT = ("other-plays", "other-technical", "news")
LENGTH = 512


class Calibration(NamedTuple):
    """Files to calibrate and to train on.

    Attributes:
      texts: the texts themselves, by name of `TRAINED`.
      own: tokens that the dense model wrote, (sequences, length).
      tokens: tokens of the texts in turn, and `own` behind them.
      sequences: number of sequences in `tokens`.
    """

    texts: tuple[Path, ...]
    own: Path
    tokens: Path
    sequences: int


def write_calibration(model: Path, work: Path, sequences: int) -> Calibration:
    """Writes texts and tokens to calibrate on, and those to be measured on.

    Args:
      model: a Hugging Face directory, which writes half as many sequences itself.
      work: the folder of the files; what is there is left as it is.
      sequences: number of sequences of the texts.

    Returns:
      The files.
    """
    paths = texts.write_documents(work, (*TRAINED, *HELD_OUT))
    each = sequences // len(TRAINED)
    read = tuple(paths[name] for name in TRAINED)
    # Of what the model writes there is as much as of each text.
    files = Calibration(
        read, work / "own.npy", work / "calibration.npy", each * (len(TRAINED) + 1)
    )
    if files.tokens.is_file():
        return files
    encode = texts.encoder(model)
    drawn = [
        texts.sequences([path.read_text("utf-8")], encode, each, LENGTH)
        for path in read
    ]
    rows = np.stack(drawn, 1).reshape(-1, LENGTH)  # the texts in turn
    # Once for all methods: what each of them wrote itself would not be the same text.
    own = own_sequences(model, rows, each, dtype="bfloat16", batch=8)
    save_rows(files.own, own)
    save_rows(files.tokens, np.concatenate([rows, own]))
    return files


def own_sequences(
    model: Path,
    text: np.ndarray,
    sequences: int,
    *,
    dtype: str,
    batch: int,
    progress: Callable[[int], Any] = lambda sequences: None,
) -> np.ndarray:
    """What a model writes beside a text, each sequence from a token of the text on.

    Args:
      model: a Hugging Face directory.
      text: tokens of the text, int32 (rows, length).
      sequences: number of sequences.
      dtype: dtype of parameters and products.
      batch: number of sequences that are written at once.
      progress: function that is called with the number of sequences of a batch.

    Returns:
      Tokens, int32 (sequences, length).
    """
    loaded, tokenizer = hf.load(model, dtype=dtype), hf.load_tokenizer(model)
    absent = set(range(loaded.config.vocab_size)).difference(text.flat)
    return self_calibration(
        loaded.model,
        sequences=sequences,
        length=text.shape[1],
        bos=tokenizer.bos if tokenizer.begins else None,
        never_first=absent.union(tokenizer.special),
        batch=batch,
        progress=progress,
    )


def save_rows(path: Path, rows: np.ndarray) -> None:
    """Writes tokens as int32 .npy, whole or not at all."""
    content = io.BytesIO()
    np.save(content, rows.astype(np.int32))
    atomic.replace(path, content.getvalue())


def run_module(module: str, *words: object) -> None:
    """Runs a module of Python with these words, in a process of its own.

    Raises:
      subprocess.CalledProcessError: it failed; what it said is on stderr.
    """
    line = [sys.executable, "-m", module, *map(str, words)]
    print(*line[2:], file=sys.stderr, flush=True)
    subprocess.run(line, check=True, stdout=subprocess.DEVNULL)


def recover(
    model: Path, out: Path, teacher: Path, files: Calibration, *words: object
) -> None:
    """Trains what is left of a model after the dense one, and measures it.

    Args:
      model: directory of the smaller or pruned model.
      out: directory to write.
      teacher: directory of the dense model.
      files: what is trained on.
      *words: options of the recovery, and what measures it.

    Raises:
      subprocess.CalledProcessError: it failed; what it said is on stderr.
    """
    # To prune nothing is a job that trains alone, of any directory.
    run_module(
        *("jaxprune", "prune", model, out, "--dtype", "bfloat16", "--sparsity", 0),
        *("--method", "magnitude", "--overwrite"),
        *("--calibration", *files.texts, "--sequences", 2, "--length", LENGTH),
        *("--recover-teacher", teacher, "--recover-text", *files.texts, files.own),
        *words,
    )


def evaluation(work: Path, limit: int) -> tuple[object, ...]:
    """Options that measure a model on so many windows of each held-out text."""
    files = [work / f"{name}.txt" for name in HELD_OUT]
    # What is left right after a removal may be worse than guessing.
    return ("--evaluate", *files, "--limit", limit, "--any-perplexity")


def is_done(directory: Path) -> bool:
    """Whether a job has written its record there."""
    return (directory / rewrite.NAME).is_file()


def perplexity_columns(directory: Path, stage: str) -> dict[str, str]:
    """The perplexity of each held-out text and their geometric mean, as cells.

    Args:
      directory: what a job wrote.
      stage: when it was measured: "dense" or a later one, "pruned", say.

    Returns:
      Text name, and "mean", to the number.
    """
    measured = rewrite.read_provenance(directory)["perplexity"]
    values = {name: measured[f"{name}.txt"][stage]["perplexity"] for name in HELD_OUT}
    values["mean"] = statistics.geometric_mean(values.values())
    return {name: f"{value:.2f}" for name, value in values.items()}


def work_seconds(directory: Path) -> float:
    """How long a job took, without its evaluations; 0 of what no job made."""
    # Evaluations are the same for all methods, and no part of any of them.
    done = is_done(directory)
    phases = rewrite.read_provenance(directory)["phases"] if done else ()
    return sum(x["seconds"] for x in phases if not x["name"].startswith("evaluate"))


def peak_gigabytes(directory: Path) -> str:
    """The highest memory of the process that wrote a directory, as a cell, in GB."""
    return f"{rewrite.read_provenance(directory)['peak_memory_bytes'] / 1e9:.1f}"
