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
from typing import Any, Literal, NamedTuple

import jax
import ml_dtypes
import numpy as np
import tyro
from flax import nnx

import jaxprune as jp
from benchmarks import measure
from jaxprune.files import safetensors_file
from jaxprune.lm.checkpoints.checkpoint_dir import open_directory
from jaxprune.lm.checkpoints.prune_magnitude import prune_directory
from jaxprune.lm.models import hf
from jaxprune.posttraining.progress import ProgressLog

Method = Literal["wanda", "sparsegpt", "alps", "magnitude"]
PAPER_TOKENS = 128 * 2048


@dataclasses.dataclass(frozen=True)
class Shape:
    """A Llama: layers, width, neurons, features of the keys, tokens."""

    layers: int
    width: int
    ffn: int
    keys: int
    vocabulary: int

    @property
    def matrices(self) -> list[tuple[str, int, int]]:
        """Name, inputs and outputs of a layer's matrices."""
        w, f, k = self.width, self.ffn, self.keys
        return [
            ("self_attn.q_proj", w, w),
            ("self_attn.k_proj", w, k),
            ("self_attn.v_proj", w, k),
            ("self_attn.o_proj", w, w),
            ("mlp.gate_proj", w, f),
            ("mlp.up_proj", w, f),
            ("mlp.down_proj", f, w),
        ]

    @property
    def weights(self) -> int:
        """Of a layer."""
        return sum(inputs * outputs for _, inputs, outputs in self.matrices)


SHAPES = {
    "7 B": Shape(32, 4096, 11008, 4096, 32000),
    "70 B": Shape(80, 8192, 28672, 1024, 32000),
    "405 B": Shape(126, 16384, 53248, 1024, 128256),
}


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
        print(json.dumps(one(config, config.alone)))
        return
    if config.model == "llama":
        write(config.out / "model", llama(SHAPES["7 B"], config.layers))
    else:
        write(config.out / "model", mixture(config.layers))
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


class Checkpoint(NamedTuple):
    """config.json of a directory, and the shape of each tensor as it is stored."""

    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]


def llama(shape: Shape, layers: int) -> Checkpoint:
    """A Llama of so many layers."""
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "intermediate_size": shape.ffn,
        "num_attention_heads": shape.width // 128,
        "num_key_value_heads": shape.keys // 128,
    }
    return _decoder(config, layers, shape.width, shape.vocabulary, shape.matrices, {})


def mixture(layers: int, experts: int = 128, width: int = 2048) -> Checkpoint:
    """Qwen3 30B A3B of so many layers; its vocabulary is cut to 32,000 tokens."""
    head, ffn = 128, 768
    queries, keys = 2 * width, max(width // 4, head)
    config = {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "head_dim": head,
        "num_attention_heads": queries // head,
        "num_key_value_heads": keys // head,
        "num_experts": experts,
        "num_experts_per_tok": 8,
        "intermediate_size": ffn,
        "moe_intermediate_size": ffn,
        "norm_topk_prob": True,
    }
    matrices = [
        ("self_attn.q_proj", width, queries),
        ("self_attn.k_proj", width, keys),
        ("self_attn.v_proj", width, keys),
        ("self_attn.o_proj", queries, width),
        ("mlp.gate", width, experts),
    ]
    for number in range(experts):
        expert = f"mlp.experts.{number}"
        matrices += [
            (f"{expert}.{name}", width, ffn) for name in ("gate_proj", "up_proj")
        ]
        matrices.append((f"{expert}.down_proj", ffn, width))
    vectors = {"self_attn.q_norm": head, "self_attn.k_norm": head}
    return _decoder(config, layers, width, 32000, matrices, vectors)


def _decoder(
    config: dict[str, Any],
    layers: int,
    width: int,
    vocabulary: int,
    matrices: Sequence[tuple[str, int, int]],
    vectors: dict[str, int],
) -> Checkpoint:
    """A decoder with these matrices (name, inputs, outputs) and norms in each layer."""
    config |= {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "vocab_size": vocabulary,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    norms = ("input_layernorm", "post_attention_layernorm")
    vectors = vectors | dict.fromkeys(norms, width)
    shapes: dict[str, tuple[int, ...]] = {}
    for i in range(layers):
        layer = f"model.layers.{i}"
        for name, inputs, outputs in matrices:
            shapes[f"{layer}.{name}.weight"] = (outputs, inputs)
        shapes |= {f"{layer}.{name}.weight": (n,) for name, n in vectors.items()}
    shapes["model.embed_tokens.weight"] = (vocabulary, width)
    shapes["model.norm.weight"] = (width,)
    shapes["lm_head.weight"] = (vocabulary, width)
    return Checkpoint(config, shapes)


def write(folder: Path, model: Checkpoint) -> None:
    """Writes config.json and model.safetensors, a tensor in memory at a time."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(model.config))
    rng = np.random.default_rng(0)

    def drawn(name: str) -> np.ndarray:
        size = model.shapes[name]
        if len(size) == 1:
            return np.ones(size, ml_dtypes.bfloat16)
        values = rng.standard_normal(size, np.float32)
        values *= 0.02
        return values.astype(ml_dtypes.bfloat16)

    bfloat16 = np.dtype(ml_dtypes.bfloat16)
    entries = {name: (bfloat16, shape) for name, shape in model.shapes.items()}
    safetensors_file.write(
        folder / "model.safetensors", entries, drawn, {"format": "pt"}
    )


def one(config: Config, method: Method) -> dict[str, Any]:
    """Prunes the directory; seconds, those of all cores, and the peak of memory."""
    function = _by_magnitude if method == "magnitude" else _calibrated
    results: dict[str, Any] = {}
    processor_start = time.process_time()
    start = time.perf_counter()
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
    shutil.rmtree(out)
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
    segments_a_layer, rows = len(ends) // config.layers, result.report["weights"]
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
    calibration = 2.0 * shape.weights * tokens
    pruned = [
        (n, out)
        for name, n, out in shape.matrices
        if not only or name.split(".")[1] in only
    ]
    if method != "wanda":  # half of X^T X; q, k and v, gate and up share theirs
        inputs = [shape.width] * 3 + [shape.ffn]
        inputs = inputs if not only else sorted({n for n, _ in pruned})
        calibration += sum(float(n) ** 2 * tokens for n in inputs)
    solving = 0.0
    for n, out in pruned:
        if method == "sparsegpt":  # a factor, and each input's update of later ones
            solving += n**3 / 3 + float(n) ** 2 * out
        elif method == "alps":  # 4 inverses, 21 products of ADMM, 6 of the gradients
            solving += 4 * 2 * n**3 + 27 * 2 * float(n) ** 2 * out
    return {"calibration": calibration, "solving": solving}


def on_paper(config: Config, method: str, measured: dict[str, Any]) -> dict[str, Any]:
    """What each model costs with 128 x 2048 tokens, at the rate that was measured."""
    tokens = config.sequences * config.length
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
            "weights_bytes": 2 * shape.layers * shape.weights,
            "activations_bytes": 4 * PAPER_TOKENS * shape.width,
            "segment_bytes": 2 * 2 * shape.width * shape.ffn,
            "hessian_bytes": 4 * shape.ffn**2,
        }
    rates = {
        "calibration": small["calibration"] / calibration_seconds,
        "solving": small["solving"] / solver_seconds,
    }
    return {"operations_per_processor_second": rates, "models": rows}


if __name__ == "__main__":
    main(tyro.cli(Config))
