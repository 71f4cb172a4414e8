"""A real model, ours and plain torch in turn: perplexity, time and memory.

`python -m benchmarks.real_model MODEL TEXTS OUT` runs each cell of the table in a
process of its own, torch's and ours of one setting after each other, on the same
sequences and as many threads. Each cell is one JSON line in OUT; what is there is not
run again. Both sides get the same settings of the allocator.
"""

import dataclasses
import inspect
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from benchmarks import measure
from jaxprune.files import atomic

_TABLE = "table.json"
# glibc: one arena, so that the peak is of what is used and not of how it is scattered.
_ALLOCATOR = {"MALLOC_ARENA_MAX": "1"}


@dataclasses.dataclass(frozen=True)
class Config:
    """Runs the table of a model beside torch, and prints it.

    Attributes:
      model: a Hugging Face directory, as `benchmarks.gemma` writes it.
      texts: token files, as `benchmarks.texts` writes them.
      out: where the results go, one file a cell.
      calibration: the calibration file of the comparison, without ".npy".
      mixtures: calibration files that are compared by `mixed_by`.
      mixed_by: method and sparsity of that comparison.
      held_out: the texts to evaluate on, without "held-out-" and ".npy".
      sequences: how many sequences of each.
      cells: the names of the cells to run; all if left out.
      threads: number of threads of both sides.
    """

    model: Annotated[Path, tyro.conf.Positional]
    texts: Annotated[Path, tyro.conf.Positional]
    out: Annotated[Path, tyro.conf.Positional]
    calibration: str = "calibration-shakespeare-32"
    mixtures: tuple[str, ...] = (
        "calibration-mixed50-32",
        "calibration-technical-32",
        "calibration-mixed50-64",
        "calibration-mixed75-32",
        "calibration-mixed25-32",
        "calibration-shakespeare-64",
    )
    mixed_by: tuple[str, str] = ("sparsegpt", "0.6")
    held_out: tuple[str, ...] = ("shakespeare", "news")
    sequences: int = 8
    threads: int = 2
    cells: tuple[str, ...] = ()


def main(config: Config) -> None:
    """Runs what is missing and prints the table."""
    facts = {f: getattr(config, f) for f in ("calibration", "sequences", "held_out")}
    begin(config, **facts)
    with tempfile.TemporaryDirectory() as folder:
        texts = held_out(config.texts, config.held_out, config.sequences, Path(folder))
        cells = _cells(config, texts)
        if unknown := {*config.cells} - {name for name, _ in cells}:
            raise SystemExit(f"there is no cell {', '.join(sorted(unknown))}")
        chosen = [c for c in cells if c[0] in config.cells or not config.cells]
        for name, command in measure.progress(chosen, "running", "cell"):
            run_cell(config.out / f"{name}.json", command, config.threads)
    print(cells_table(config.out))


def begin(config: Any, **facts: Any) -> None:
    """Makes the directory of a table, and notes in it which one that is.

    Args:
      config: settings of the table, with `out`, `model` and `texts`.
      **facts: settings that decide its cells too, and are not in their names.

    Raises:
      ValueError: it has the cells of another table.
    """
    places = {
        "model": str(config.model.resolve()),
        "texts": str(config.texts.resolve()),
    }
    # What `benchmarks.texts` says of the sequences, and the shape of the model.
    for file in (config.texts / "manifest.json", config.model / "config.json"):
        if file.exists():
            # By content: a directory may be filled anew under the same path.
            places[file.name] = atomic.digest(file)
    config.out.mkdir(parents=True, exist_ok=True)
    table = Path(inspect.getfile(type(config))).stem
    atomic.begin_or_resume(config.out / _TABLE, {"table": table, **places, **facts})


def cells_in(folder: Path) -> list[Path]:
    """The files of a table's cells, in order."""
    return [path for path in sorted(folder.glob("*.json")) if path.name != _TABLE]


def held_out(
    texts: Path, names: Sequence[str], sequences: int, folder: Path
) -> list[str]:
    """NAME=FILE of the first few sequences of each held-out text.

    Args:
      texts: token files, as `benchmarks.texts` writes them.
      names: names of the texts, without "held-out-" and ".npy".
      sequences: number of sequences of each.
      folder: directory of the files to write.

    Returns:
      A word for each text.
    """
    arguments = []
    for name in names:
        ids = np.load(texts / f"held-out-{name}.npy")
        np.save(folder / f"{name}.npy", ids[:sequences])
        arguments.append(f"{name}={folder / name}.npy")
    return arguments


def _cells(config: Config, texts: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Name and arguments of each process, in an order that serves a first look."""
    default = config.texts / f"{config.calibration}.npy"  # left out of a cell's name

    def cell(
        side: str, method: str, pattern: str, calibration: Path = default
    ) -> tuple[str, list[str]]:
        flag = "--pattern" if ":" in pattern else "--sparsity"
        command = [f"benchmarks.{side}_pruning", str(config.model)]
        command += ["--method", method, flag, pattern, "--evaluate", *texts]
        command += ["--calibration", str(calibration)]
        name = f"{side}_{method}_{pattern.replace(':', 'of')}"
        if calibration != default:
            name += f"_{calibration.stem.removeprefix('calibration-')}"
        return name, command

    for pattern in ("0.5", "0.6", "2:4"):
        for method in ("wanda", "sparsegpt"):
            yield cell("torch", method, pattern)
            yield cell("jax", method, pattern)
            name, command = cell("jax", method, pattern)
            # A sequence at a time, as torch has it: a whole layer is seen at once.
            yield f"{name}_dense", [*command, "--inputs", "dense", "--batch", "1"]
        yield cell("jax", "alps", pattern)
    for method in ("sparsegpt", "alps"):
        yield cell("jax", method, "0.7")
    yield cell("torch", "none", "0.5")
    for mixture in config.mixtures:
        yield cell("jax", *config.mixed_by, config.texts / f"{mixture}.npy")


def run_cell(place: Path, command: Sequence[str], threads: int) -> None:
    """Runs a process unless it was; its JSON line is kept once it is whole.

    Args:
      place: path of the line's file.
      command: the module and its arguments.
      threads: number of threads of torch and of XLA.
    """
    if place.exists():
        return
    atomic.replace(place, f"{json_line(command, threads)}\n".encode())


def json_line(command: Sequence[str], threads: int) -> str:
    """Runs a benchmark in a process of its own.

    Args:
      command: the module and its arguments.
      threads: number of threads of torch and of XLA.

    Returns:
      The last line that it printed.

    Raises:
      subprocess.CalledProcessError: it failed; what it said is on stderr.
    """
    environment = {**os.environ, **_ALLOCATOR, "JAX_PLATFORMS": "cpu"}
    for name in ("OMP_NUM_THREADS", "NPROC"):  # torch's, and what XLA counts
        environment[name] = str(threads)
    if "torch_pruning" in command[0]:
        # torch takes the number of threads from a call as well as from the environment.
        command = [*command, "--threads", str(threads)]
    process = subprocess.run(
        [sys.executable, "-m", *command],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    # Libraries may print before it; the JSON line is the last.
    return process.stdout.strip().splitlines()[-1]


def cells_table(folder: Path) -> str:
    """The results as Markdown.

    Args:
      folder: directory with a JSON line a cell.

    Returns:
      A row for each cell: perplexities, seconds, peak memory.
    """
    cells = {path.stem: json.loads(path.read_text()) for path in cells_in(folder)}
    # Cells of another run may have been measured on more texts.
    texts = sorted({t for c in cells.values() for t in _perplexities(c)})
    rows = [["cell", *texts, "prune s", "prune peak MiB", "load peak MiB"]]
    for name, cell in sorted(cells.items()):
        perplexities = _perplexities(cell)
        rows.append(
            [
                name,
                *(f"{perplexities[text]:.2f}" for text in texts),
                f"{cell['seconds']['prune']:.0f}",
                f"{cell['peak_bytes']['prune'] / 2**20:.0f}",
                f"{cell['peak_bytes']['load'] / 2**20:.0f}",
            ]
        )
    return measure.markdown(rows)


def _perplexities(cell: dict[str, Any]) -> dict[str, float]:
    by_stage: dict[str, dict[str, float]] = cell["perplexities"]
    # "torch_none" prunes nothing, so it has the dense model's alone.
    return by_stage.get("after", by_stage.get("before", {}))


if __name__ == "__main__":
    main(tyro.cli(Config))
