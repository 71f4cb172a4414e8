"""Layers of a 7 B Llama are pruned inside 8 GiB; what 7 B, 70 B and 405 B cost.

The directory is written by this script: the shapes of Llama 2 7B, bfloat16 weights
drawn at random, of two layers, the embeddings and the head (`--layers`). Each method
prunes it in a process of its own, as the command does: leaves stay in their file,
progress lies on disk. Random weights say nothing of quality; seconds and bytes do not
depend on them.

`--model mixture` writes layers of Qwen3 30B A3B in their place, of 128 experts.

The rest is arithmetic. A layer's floating-point operations are counted for its
matrices, its Hessians and its solver (`operations`), by tokens and shapes. The rate is
that of the last layer, in which nothing is compiled, in seconds of the processor, all
cores together: other programs hardly change them. Calibration is small here; what
128 x 2048 tokens, the papers', cost is extrapolated.
"""

import dataclasses
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import tyro
from flax import nnx

import jaxprune as jp
from benchmarks import measure, random_checkpoint
from benchmarks.random_checkpoint import SHAPES, Shape, llama, mixture
from jaxprune.lm.checkpoints.checkpoint_dir import open_directory
from jaxprune.lm.checkpoints.prune_magnitude import prune_directory
from jaxprune.lm.models import hf
from jaxprune.posttraining.progress import ProgressLog

Method = Literal["wanda", "sparsegpt", "alps", "magnitude"]
PAPER_TOKENS = 128 * 2048  # SparseGPT's and Wanda's calibration


@dataclasses.dataclass(frozen=True)
class Config:
    """Prunes by each method and prints a JSON line for each, and one for the rest.

    Attributes:
      out: a folder for the directory and the progress; emptied at the end.
      model: the shapes of Llama 2 7B, or those of Qwen3 30B A3B, 128 experts a layer.
      methods: which; "magnitude" streams the directory tensor by tensor.
      layers: how many are written; all 32 take 13.5 GB, twice that with magnitude.
      sequences: number of sequences of calibration.
      length: tokens of each.
      batch: sequences at once.
      sparsity: what is removed.
      only: names of the matrices to prune, "k_proj" say; all of them if left out.
      alone: one method, in this process; what the script starts itself.
    """

    out: Path
    model: Literal["llama", "mixture"] = "llama"
    methods: tuple[Method, ...] = ("wanda", "sparsegpt", "alps")
    layers: int = 2
    sequences: int = 8
    length: int = 512
    batch: int = 2
    sparsity: float = 0.5
    only: tuple[str, ...] = ()
    alone: Method | None = None


def main(config: Config) -> None:
    """Writes the directory, starts a process for each method, adds up."""
    if config.alone is not None:
        print(json.dumps(prune_alone(config, config.alone)))
        return
    if config.out.exists():
        raise SystemExit(f"'{config.out}' exists; --out is emptied, so give another")
    if config.model == "llama":
        random_checkpoint.write(
            config.out / "model", llama(SHAPES["7 B"], config.layers)
        )
    else:
        random_checkpoint.write(config.out / "model", mixture(config.layers))
    try:
        for method in config.methods:
            words = [sys.executable, "-m", "benchmarks.large", *sys.argv[1:]]
            process = subprocess.run(
                [*words, "--alone", method], check=True, stdout=subprocess.PIPE
            )
            results = json.loads(process.stdout)
            if method != "magnitude" and config.model == "llama":
                results |= {"on paper": on_paper(config, method, results)}
            measure.report(
                "large",
                model=config.model,
                method=method,
                layers=config.layers,
                **results,
            )
    finally:
        shutil.rmtree(config.out)


def prune_alone(config: Config, method: Method) -> dict[str, Any]:
    """Prunes the directory; seconds, those of all cores, and the peak of memory."""
    function = _by_magnitude if method == "magnitude" else _calibrated
    results: dict[str, Any] = {}
    # Of all cores together: other programs hardly change it, as they do the wall time.
    processor_start = time.process_time()
    start = time.perf_counter()
    # Nothing ran before, so compilation is in the seconds and in the peak, as for a
    # user.
    memory = measure.peak_memory(lambda: results.update(function(config, method)))
    return results | {
        "seconds": time.perf_counter() - start,
        "processor_seconds": time.process_time() - processor_start,
        "peak_bytes": memory["extra_bytes"],
    }


def _by_magnitude(config: Config, method: str) -> dict[str, Any]:
    source = open_directory(config.out / "model")
    out = config.out / method
    prune_directory(source, out, sparsity=config.sparsity)
    shutil.rmtree(out)  # as large as the model
    return {"bytes": source.size}


def _calibrated(config: Config, method: Any) -> dict[str, Any]:
    model, progress = config.out / "model", config.out / method
    loaded = hf.load(model, compute_dtype="float32", lazy=True)
    graphdef, params = nnx.split(loaded.model, nnx.Param)
    shape = (config.sequences // config.batch, config.batch, config.length)
    tokens = np.random.default_rng(1).integers(0, 32000, shape)
    batches = (
        hf.embedded(model, loaded.names, loaded.config, batch) for batch in tokens
    )

    def states(params: Any, x: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, params).states(x)[0]

    ends = _noted_ends()
    result = jp.prune_trained(
        states,
        params,
        batches,
        method=method,
        sparsity=config.sparsity,
        prunable=lambda name, leaf: (
            jp.tree.prunable(name, leaf) and _is_wanted(config, name)
        ),
        directory=progress,
    )
    shutil.rmtree(progress)
    # Layers are alike, so each has as many segments and as many rows.
    segments_a_layer, rows = len(ends) // config.layers, result.report["weights"]
    # The last layer's: the first one compiles what all others run.
    last = rows[-len(rows) // config.layers :]
    return {
        "achieved": result.report["achieved"],
        "layer": {
            "seconds": ends[-1][0] - ends[-1 - segments_a_layer][0],
            "processor_seconds": ends[-1][1] - ends[-1 - segments_a_layer][1],
        },
        "solver_seconds": {row["name"].split("/")[-2]: row["seconds"] for row in last},
    }


def _is_wanted(config: Config, name: str) -> bool:
    matrices = [word.removesuffix("_proj") for word in config.only]
    # The flag has the checkpoint's names, the leaf the decoder's.
    matrices = ["out" if word == "o" else word for word in matrices]
    return not matrices or name.split("/")[-2] in matrices


def _noted_ends() -> list[tuple[float, float]]:
    """A list to which the end of each segment is added, on both clocks."""
    ends: list[tuple[float, float]] = []
    write = ProgressLog.write

    def noted(*arguments: Any) -> None:
        write(*arguments)
        ends.append((time.perf_counter(), time.process_time()))

    ProgressLog.write = noted  # type: ignore[method-assign]
    return ends


def operations(
    shape: Shape, method: str, tokens: int, only: Sequence[str] = ()
) -> dict[str, float]:
    """Floating-point operations of a layer: calibration, by tokens, and the solver.

    Args:
      shape: sizes of the model.
      method: name of the method.
      tokens: number of tokens of the calibration.
      only: names of the matrices that are pruned; all if there are none.

    Returns:
      "calibration" and "solving".
    """
    # A multiplication and an addition for each weight and token.
    calibration = 2.0 * shape.weights * tokens
    sizes = [
        (n, out)
        for name, n, out in shape.matrices
        if not only or name.split(".")[1] in only
    ]
    if method != "wanda":  # half of X^T X; q, k and v, gate and up share theirs
        inputs = [shape.width] * 3 + [shape.ffn]
        inputs = inputs if not only else sorted({n for n, _ in sizes})
        calibration += sum(float(n) ** 2 * tokens for n in inputs)
    solving = 0.0
    for n, out in sizes:
        if method == "sparsegpt":  # a factor, and each input's update of later ones
            solving += n**3 / 3 + float(n) ** 2 * out
        elif method == "alps":  # 4 inverses, 21 products of ADMM, 6 of the gradients
            solving += 4 * 2 * n**3 + 27 * 2 * float(n) ** 2 * out
    return {"calibration": calibration, "solving": solving}


def on_paper(config: Config, method: str, measured: dict[str, Any]) -> dict[str, Any]:
    """What each model costs with 128 x 2048 tokens, at the rate that was measured."""
    tokens = config.sequences * config.length
    # Of what was measured; everything below scales with the ratio to it.
    small = operations(SHAPES["7 B"], method, tokens, config.only)
    layer, solver_seconds = measured["layer"], sum(measured["solver_seconds"].values())
    # What the solvers took of the layer's seconds, they took of the processor's.
    solver_seconds *= layer["processor_seconds"] / layer["seconds"]
    calibration_seconds = layer["processor_seconds"] - solver_seconds
    rows = {}
    for name, shape in SHAPES.items():
        counts = operations(shape, method, PAPER_TOKENS)
        seconds = calibration_seconds * counts["calibration"] / small["calibration"]
        # Wanda's solving is reading and counting: as many seconds a weight.
        weights = shape.weights / SHAPES["7 B"].weights
        ratio = counts["solving"] / small["solving"] if small["solving"] else weights
        rows[name] = {
            "processor_hours": shape.layers * (seconds + solver_seconds * ratio) / 3600,
            "operations": shape.layers * sum(counts.values()),
            "weights_bytes": 2 * shape.layers * shape.weights,  # bfloat16
            # float32 (tokens, width), and gate and up in bfloat16.
            "activations_bytes": 4 * PAPER_TOKENS * shape.width,
            "segment_bytes": 2 * 2 * shape.width * shape.ffn,
            "hessian_bytes": 4 * shape.ffn**2,  # float32; the largest is that of `down`
        }
    rates = {
        "calibration": small["calibration"] / calibration_seconds,
        "solving": small["solving"] / solver_seconds,
    }
    return {"operations_per_processor_second": rates, "models": rows}


if __name__ == "__main__":
    main(tyro.cli(Config))
