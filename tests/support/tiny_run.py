"""One tiny run of the main job, shared by the tests of what it does and writes."""

import atexit
import functools
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tyro

from experiments import scaled_down_llm

MODULE = "experiments.scaled_down_llm"
STEPS, RETRAIN, BATCH, CONTEXT, TOKENS = 12, 10, 2, 64, 512
SEEDS = (0, 1)
CELLS = [(c, s) for c in ("preconditioned_magnitude", "magnitude") for s in (0.5, 0.9)]
RETRAINED = ("preconditioned_magnitude", 0.9)
TINY = [
    *("--seeds", "0", "1"),
    *("--criteria", "preconditioned_magnitude", "magnitude"),
    *("--retrain-criteria", "preconditioned_magnitude"),
    *("--sparsities", "0.5", "0.9"),
    *("--retrain-sparsities", "0.9"),
    *("--show-sparsity", "0.9"),
    *("--batch-size", str(BATCH)),
    *("--steps", str(STEPS)),
    *("--retrain-steps", str(RETRAIN)),
    *("--eval-tokens", str(TOKENS)),
    *("--sample-length", "8"),
    *("--checkpoint-every", "4"),
]


def write_text(path, characters="abcdefghij klmnop.\n", length=6000):
    path.parent.mkdir(parents=True, exist_ok=True)
    picked = np.random.default_rng(0).choice(list(characters), length)
    path.write_text("".join(picked))
    return path


def flags(text, out, *more):
    return ["--text", str(text), "--out", str(out), *TINY, *more]


class Run(NamedTuple):
    """A whole run: its folder, its text, and the seconds that it took."""

    out: Path
    text: Path
    seconds: float


@functools.cache
def undisturbed():
    """The run, made once in a session of tests."""
    folder = Path(tempfile.mkdtemp(prefix="jaxprune-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    text, out = write_text(folder / "tiny.txt"), folder / "undisturbed"
    config = tyro.cli(scaled_down_llm.Config, args=flags(text, out))
    start = time.perf_counter()
    scaled_down_llm.main(config)
    return Run(out, text, time.perf_counter() - start)


def metrics(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    for entry in entries:
        entry.pop("tokens_per_second", None)
    return entries


def files(folder):
    """Every file's name, less what names a process or a moment."""
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
    return {name for name in found if not name.startswith(("tensorboard", "seed-"))}


def snapshot(folder):
    return {
        path: (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else None)
        for path in sorted(folder.rglob("*"))
    }
