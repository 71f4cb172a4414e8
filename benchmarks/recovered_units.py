"""Which way to remove neurons lasts through a recovery, and what does it take?

`python -m benchmarks.recovered_units MODEL WORK` removes as many neurons of each layer
of a Llama by each of `METHODS`, then trains each smaller model by one recovery, after
the dense model, for several numbers of steps. All are calibrated on the same token
files, of texts and of what the dense model writes itself. What is in WORK is not run
again. It needs torch and the packages of `benchmarks.texts`.
"""

import dataclasses
import io
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from benchmarks import measure, texts
from jaxprune.arrays.messages import columns
from jaxprune.files import atomic
from jaxprune.lm.checkpoints.checkpoint_dir import CONFIG
from jaxprune.lm.checkpoints.rewrite import NAME as RECORD
from jaxprune.lm.models import hf
from jaxprune.lm.texts.self_calibration import self_calibration

TRAINED = ("plays", "technical")
HELD_OUT = ("other-plays", "other-technical", "news")
METHODS = ("ours", "ours, in rounds", "wanda-sp", "flap", "from-scratch")
_LENGTH, _CALIBRATION, _OWN = 512, "calibration.npy", "own.npy"


@dataclasses.dataclass(frozen=True)
class Config:
    """Makes, recovers and measures the smaller models; prints a table.

    Attributes:
      model: a Hugging Face directory of a Llama, the dense model.
      work: the folder of texts, models and records.
      methods: names of `METHODS`.
      ffn: the share of the neurons that goes.
      steps: numbers of steps of a recovery.
      sequences: sequences of texts that are calibrated on, and half as many of what the
        dense model writes.
      batch: sequences of a step.
      learning_rate: highest learning rate of what was there before.
      scratch_rate: that of what is trained from scratch, all parameters of it.
      limit: windows of each text that are evaluated.
    """

    model: Annotated[Path, tyro.conf.Positional]
    work: Annotated[Path, tyro.conf.Positional]
    methods: tuple[str, ...] = METHODS
    ffn: float = 0.25
    steps: tuple[int, ...] = (32, 256)
    sequences: int = 64
    batch: int = 2
    learning_rate: float = 2e-4
    scratch_rate: float = 1e-3
    limit: int = 8


def main(config: Config) -> None:
    """Runs what is missing, prints the table, then one JSON line."""
    config.work.mkdir(parents=True, exist_ok=True)
    paths = texts.write_documents(config.work, (*TRAINED, *HELD_OUT))
    _write_calibration(config, paths)
    for method in config.methods:
        for steps in config.steps:
            _recovered(config, method, steps)
    rows = list(_rows(config))
    print(columns([list(rows[0]), *([*row.values()] for row in rows)], right=True))
    measure.report("recovered_units", model=config.model.name, rows=rows)


def _write_calibration(config: Config, paths: dict[str, Path]) -> None:
    """Token files: what the dense model writes, and that behind those of the texts."""
    if (config.work / _CALIBRATION).is_file():
        return
    encode = texts.encoder(config.model)
    each = config.sequences // len(TRAINED)
    drawn = [
        texts.sequences([paths[name].read_text("utf-8")], encode, each, _LENGTH)
        for name in TRAINED
    ]
    rows = np.stack(drawn, 1).reshape(-1, _LENGTH)  # the texts in turn
    # Once for all methods: what each of them wrote itself would not be the same text.
    loaded = hf.load(config.model, dtype="bfloat16")
    tokenizer = hf.load_tokenizer(config.model)
    own = self_calibration(
        loaded.model,
        sequences=each,
        length=_LENGTH,
        bos=tokenizer.bos if tokenizer.begins else None,
        special=set(tokenizer.special),
        batch=8,
    )
    _save(config.work / _OWN, own)
    _save(config.work / _CALIBRATION, np.concatenate([rows, own]))


def _save(path: Path, rows: np.ndarray) -> None:
    content = io.BytesIO()
    np.save(content, rows.astype(np.int32))
    atomic.replace(path, content.getvalue())


def _small(config: Config, method: str) -> Path:
    """The directory of a smaller model, right after the removal."""
    out = config.work / method
    if (out / CONFIG).is_file():
        return out
    if method == "ours":
        _shrink(config, config.model, out, config.ffn)
        return out
    # A process of its own: torch's threads would stay beside those of XLA.
    _run(
        *("benchmarks.torch_shrinking", config.model, "--method", method),
        *("--ffn", config.ffn, "--calibration", config.work / _CALIBRATION),
        *("--out", out),
        *("--sequences", config.sequences * 3 // 2, "--threads", 1),
    )
    return out


def _shrink(config: Config, model: Path, out: Path, share: float) -> None:
    _run(
        *("jaxprune", "shrink", model, out, "--ffn", share, "--dtype", "bfloat16"),
        *("--calibration", config.work / _CALIBRATION),
        *("--sequences", config.sequences * 3 // 2, "--length", _LENGTH),
        *(*_evaluated(config), "--speed-rounds", 0, "--overwrite"),
    )


def _evaluated(config: Config) -> tuple[object, ...]:
    files = [config.work / f"{name}.txt" for name in HELD_OUT]
    return ("--evaluate", *files, "--limit", config.limit, "--any-perplexity")


def _recovered(config: Config, method: str, steps: int) -> Path:
    """The directory of a smaller model after so many steps."""
    out = config.work / f"{method}, {steps}"
    if (out / RECORD).is_file():
        return out
    if method == "ours, in rounds":
        # Half of what goes, half of the steps, and both again.
        first, half, narrow = (out.with_name(f"{out.name}, {i}") for i in range(3))
        count = json.loads((config.model / CONFIG).read_text())["intermediate_size"]
        gone = round(config.ffn * count)
        if not (half / RECORD).is_file():
            _shrink(config, config.model, first, gone // 2 / count)
            _recover(config, first, half, steps // 2, method)
        left = count - gone // 2
        _shrink(config, half, narrow, (gone - gone // 2) / left)
        _recover(config, narrow, out, steps - steps // 2, method)
    else:
        _recover(config, _small(config, method), out, steps, method)
    return out


def _recover(config: Config, model: Path, out: Path, steps: int, method: str) -> None:
    """Trains a smaller model after the dense one."""
    scratch = method == "from-scratch"
    rate = config.scratch_rate if scratch else config.learning_rate
    plays, prose, own = (
        config.work / name for name in ("plays.txt", "technical.txt", _OWN)
    )
    # To prune nothing is a job that trains alone, of any directory.
    _run(
        *("jaxprune", "prune", model, out, "--dtype", "bfloat16", "--sparsity", 0),
        *("--method", "magnitude", "--prompt-steps", 0, "--overwrite"),
        *("--calibration", plays, prose, "--sequences", 2, "--length", _LENGTH),
        *(*_evaluated(config), "--batch", config.batch, "--recover-steps", steps),
        *("--recover-teacher", config.model, "--recover-text", plays, prose, own),
        *("--recover-train", "all" if scratch else "matrices"),
        *("--recover-learning-rate", rate),
    )


def _run(module: str, *words: object) -> None:
    line = [sys.executable, "-m", module, *map(str, words)]
    print(*line[2:], file=sys.stderr, flush=True)
    subprocess.run(line, check=True, stdout=subprocess.DEVNULL)


def _rows(config: Config) -> Iterator[dict[str, Any]]:
    """A row for each method and number of steps, none of them first."""
    for method in config.methods:
        for index, steps in enumerate(config.steps):
            out = config.work / f"{method}, {steps}"
            record = json.loads((out / RECORD).read_text())
            # In rounds there is no model right after all of the removal.
            if not index and method != "ours, in rounds":
                yield _row(method, 0, record, "dense", _seconds(config.work / method))
            paths = [config.work / method, out, *config.work.glob(f"{out.name}, ?")]
            yield _row(method, steps, record, "distilled", sum(map(_seconds, paths)))


def _seconds(directory: Path) -> float:
    """How long a job took, without its evaluations; 0 of what no job made."""
    path = directory / RECORD
    phases = json.loads(path.read_text())["phases"] if path.is_file() else ()
    return sum(x["seconds"] for x in phases if not x["name"].startswith("evaluate"))


def _row(
    method: str, steps: int, record: dict[str, Any], stage: str, seconds: float
) -> dict[str, Any]:
    perplexities = {
        name: record["perplexity"][f"{name}.txt"][stage]["perplexity"]
        for name in HELD_OUT
    }
    shown = {name: f"{value:.2f}" for name, value in perplexities.items()}
    mean = statistics.geometric_mean(perplexities.values())
    row = {"method": method, "steps": str(steps), **shown, "mean": f"{mean:.2f}"}
    return {**row, "minutes": f"{seconds / 60:.0f}"}


if __name__ == "__main__":
    main(tyro.cli(Config))
