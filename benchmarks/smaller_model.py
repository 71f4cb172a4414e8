"""Fewer neurons, heads and layers of a real model: ours beside the papers' methods.

`python -m benchmarks.smaller_model MODEL TEXTS OUT` runs each cell of the table in
processes of its own. Ours is written as a checkpoint, which torch then reads: all cells
are evaluated by one program, `benchmarks.torch_shrinking`. Each cell is one JSON line
in OUT; what is there is not run again.
"""

import dataclasses
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import tyro

from benchmarks import measure
from benchmarks.draws import TEXTS, Draws, over_draws
from benchmarks.real_model import begin, cells_in, held_out, json_line
from jaxprune.files import atomic

REMOVED = {
    "ffn25": ("--ffn", "0.25"),
    "heads25": ("--heads", "0.25"),
    "both25": ("--ffn", "0.25", "--heads", "0.25"),
    "ffn50": ("--ffn", "0.5"),
    "heads50": ("--heads", "0.5"),
    "both50": ("--ffn", "0.5", "--heads", "0.5"),
    "layers2": ("--drop", "2"),
    "layers4": ("--drop", "4"),
}
# Names of the papers' code: structured pruning by weights, by Wanda's scores, FLAP.
WIDTH = ("magnitude-sp", "wanda-sp", "flap", "flap-adaptive", "ours")
DEPTH = ("block-influence", "ours")


@dataclasses.dataclass(frozen=True)
class Config(Draws):
    """Runs the cells that are missing, and prints the table.

    Attributes:
      removed: what is removed, names of `REMOVED`.
      methods: which methods; all if left out.
      recover: steps of the same recovery after each, `benchmarks.torch_recovery`.
    """

    removed: tuple[str, ...] = tuple(REMOVED)
    methods: tuple[str, ...] = ()
    recover: int = 0


def main(config: Config) -> None:
    """Runs what is missing and prints the table."""
    begin(config, **config.facts())
    cells = [c for c in _cells(config) if not (config.out / f"{c[0]}.json").exists()]
    # The smaller checkpoint is as large as half the model: on the disk of the results.
    with tempfile.TemporaryDirectory(dir=config.out) as folder:
        texts = held_out(config.texts, TEXTS, config.sequences, Path(folder))
        for name, method, arguments in measure.progress(cells, "running", "cell"):
            line = _run(config, Path(folder) / "small", method, arguments, texts)
            atomic.replace(config.out / f"{name}.json", f"{line}\n".encode())
    print(perplexity_table(config.out))


def _cells(config: Config) -> Iterator[tuple[str, str, list[str]]]:
    """Name, method and arguments, in an order that serves a first look."""
    calibration = str(config.texts / f"{config.calibration}.npy")
    yield "dense_none_0", "none", []
    for draw in config.draws:
        for removed in config.removed:
            for method in DEPTH if removed.startswith("layers") else WIDTH:
                if config.methods and method not in config.methods:
                    continue
                if method == "magnitude-sp" and draw:
                    continue  # it looks at no text
                arguments = [*REMOVED[removed], "--draw", str(draw)]
                arguments += ["--calibration", calibration]
                arguments += ["--sequences", str(config.calibrated)]
                word = f"+{config.recover}" * bool(config.recover)
                yield f"{removed}_{method}{word}_{draw}", method, arguments


def _run(
    config: Config, small: Path, method: str, arguments: list[str], texts: list[str]
) -> str:
    """One cell: a JSON line, of ours with what the making of the model said."""
    evaluate = ["--evaluate", *texts, "--threads", str(config.threads)]
    if arguments:  # of all but the dense model
        evaluate += ["--recover", str(config.recover), "--dense", str(config.model)]
    competitor = "benchmarks.torch_shrinking"
    if method != "ours":
        command = [competitor, str(config.model), "--method", method]
        return json_line([*command, *arguments, *evaluate], config.threads)
    command = ["benchmarks.jax_shrinking", str(config.model), str(small)]
    conversion = json.loads(json_line([*command, *arguments], config.threads))
    command = [
        competitor,
        str(small),
        "--method",
        "none",
        *calibration_arguments(arguments),
    ]
    line = json.loads(json_line([*command, *evaluate], config.threads))
    shutil.rmtree(small)  # the next cell writes there
    # torch only evaluates here: the seconds of the removal are those of ours.
    line["seconds"]["prune"] = conversion["prune_seconds"]
    return json.dumps({**line, "made": conversion})


def calibration_arguments(arguments: list[str]) -> list[str]:
    """Those arguments that say which sequences are calibrated on."""
    return arguments[arguments.index("--draw") :]


def perplexity_table(folder: Path) -> str:
    """The results as Markdown.

    Args:
      folder: directory with a JSON line a cell.

    Returns:
      A row for what is removed and each method: the perplexity on each text, and the
      geometric mean of the three, means over draws with their spread; how many draws.
    """
    cells: dict[tuple[str, str], list[dict[str, float]]] = {}
    for path in cells_in(folder):
        removed, method, _ = path.stem.split("_")
        perplexities = json.loads(path.read_text())["perplexities"]
        cells.setdefault((removed, method), []).append(perplexities)
    order = ["dense", *REMOVED]  # of the rows
    ordered = sorted(cells.items(), key=lambda x: (order.index(x[0][0]), x[0][1]))
    return over_draws(["removed", "method"], ordered)


if __name__ == "__main__":
    main(tyro.cli(Config))
