"""Cells of a table for several draws of the calibration, and their means."""

import dataclasses
import json
import math
import statistics
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from benchmarks import measure
from benchmarks.real_model import begin, cells_in, held_out, run_cell

TEXTS = ("shakespeare", "technical", "news")


@dataclasses.dataclass(frozen=True)
class Draws:
    """Where the cells of a table come from, and where they go.

    Attributes:
      model: a Hugging Face directory, as `benchmarks.gemma` writes it.
      texts: token files, as `benchmarks.texts` writes them.
      out: where the results go, one file a cell.
      calibration: the file that draws are taken from, without ".npy".
      draws: which draws of it: 0 for the first so many sequences, 1 for the next.
      calibrated: sequences of a draw.
      sequences: how many of each held-out text to evaluate on.
      threads: number of threads of torch and of XLA.
    """

    model: Annotated[Path, tyro.conf.Positional]
    texts: Annotated[Path, tyro.conf.Positional]
    out: Annotated[Path, tyro.conf.Positional]
    calibration: str = "calibration-mixed50-128"
    draws: tuple[int, ...] = (0, 1, 2)
    calibrated: int = 32
    sequences: int = 8
    threads: int = 2

    def facts(self) -> dict[str, Any]:
        """What decides a cell besides model and texts, and is not in its name."""
        names = ("calibration", "calibrated", "sequences")
        return {name: getattr(self, name) for name in names}


def prepared(config: Draws, folder: Path) -> list[str]:
    """Writes the sequences of each draw as DRAW.npy; a word for each held-out text.

    Raises:
      ValueError: the file has too few sequences for a draw.
    """
    texts = held_out(config.texts, TEXTS, config.sequences, folder)
    ids = np.load(config.texts / f"{config.calibration}.npy")
    for draw in config.draws:
        # (calibrated, length): draws do not overlap, so their spread is one of the
        # text.
        sequences = ids[draw * config.calibrated :][: config.calibrated]
        if len(sequences) < config.calibrated:
            raise ValueError(
                f"draw {draw} of {config.calibrated} sequences is past the end of "
                f"'{config.calibration}', which has {len(ids)}"
            )
        np.save(folder / f"{draw}.npy", sequences)
    return texts


def pruning(
    config: Draws, calibration: Path, pattern: str, method: str, *flags: str
) -> list[str]:
    """The arguments of a process that prunes by a draw and evaluates.

    `pattern` is a sparsity or a pattern n:m; `flags` are further flags of
    `benchmarks.jax_pruning`. A method "torch-NAME" is the competitor's NAME.
    """
    name = method.removeprefix("torch-")
    program = "jax_pruning" if name == method else "torch_pruning"
    command = [f"benchmarks.{program}", str(config.model), "--method", name]
    command += ["--pattern" if ":" in pattern else "--sparsity", pattern, *flags]
    return [*command, "--calibration", str(calibration), "--evaluate"]


def run_missing(
    config: Draws,
    cells: Callable[[Path], Iterable[tuple[str, list[str]]]],
    **facts: Any,
) -> None:
    """Runs each cell that has no file yet in a process of its own.

    Args:
      config: settings of the table.
      cells: function of the folder of draws to a name and arguments for each cell.
      **facts: settings that decide a cell too, and are not in its name.

    Raises:
      ValueError: the directory has the cells of another table.
    """
    begin(config, **config.facts(), **facts)
    # On the disk of the results, for draws are read by each of many processes.
    with tempfile.TemporaryDirectory(dir=config.out) as place:
        texts = prepared(config, Path(place))
        for cell, command in measure.progress(list(cells(Path(place))), "running"):
            run_cell(config.out / f"{cell}.json", [*command, *texts], config.threads)


def over_draws(
    names: Sequence[str],
    cells: Iterable[tuple[tuple[str, ...], Sequence[dict[str, float]]]],
) -> str:
    """Means over draws as Markdown.

    Args:
      names: headers of the columns that tell the cells apart.
      cells: values of these columns, with the perplexity on each text of each draw.

    Returns:
      A row for each: mean and spread for each text and for the geometric mean of the
      three; how many draws.
    """
    # A geometric mean: perplexities of texts differ by factors, and none should rule.
    rows = [[*names, *TEXTS, "geometric mean", "draws"]]
    for key, draws in cells:
        row = [*key]
        for text in (*TEXTS, "mean"):
            values = [with_mean(cell)[text] for cell in draws]
            row.append(measure.mean_and_spread(values, ".2f"))
        rows.append([*row, str(len(draws))])
    return measure.markdown(rows)


def of_files(folder: Path, names: Sequence[str]) -> str:
    """The table of files PATTERN_METHOD_MORE_DRAW.json, as Markdown.

    Args:
      folder: directory with a JSON line of `benchmarks.jax_pruning` a cell.
      names: headers of the parts of a file's name before the draw.

    Returns:
      What `over_draws` does.
    """
    cells: dict[tuple[str, ...], list[dict[str, float]]] = {}
    for path in cells_in(folder):
        pattern, *labels, _ = path.stem.split("_")
        perplexities = json.loads(path.read_text())["perplexities"]["after"]
        cells.setdefault((pattern.replace("of", ":"), *labels), []).append(perplexities)
    return over_draws(names, sorted(cells.items()))


def with_mean(perplexities: dict[str, float]) -> dict[str, float]:
    """Perplexities, and "mean", their geometric mean."""
    return {
        **perplexities,
        "mean": math.exp(statistics.fmean(map(math.log, perplexities.values()))),
    }
