"""A step of a recovery is faster in bfloat16, and with fewer logits.

    python -m benchmarks.recovery_step DENSE PRUNED sequences.npy

The gradient of the layers' matrices, as `--recover-train matrices` takes it: in float32
and in bfloat16; with the gradient of each matrix as JAX makes it, or in the order of
`models.product`; with all logits, or those of the tokens that the step's texts and
predictions name and a sample of the others (`recovery.sampled_tokens`). All are timed
in turn in one process, and each is compared with the first.
"""

import dataclasses
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import jax
import numpy as np
import tyro
from flax import nnx

from benchmarks import measure
from jaxprune.arrays import tree
from jaxprune.arrays.messages import columns
from jaxprune.lm.models.decoder import layers
from jaxprune.lm.models.loaded_model import LoadedModel, open_model
from jaxprune.lm.recovery import predictions, sampled_tokens

WAYS = {  # dtype, whose gradient of a matrix, which logits
    "float32, JAX's gradient, all logits": ("float32", False, False),
    "float32, all logits": ("float32", True, False),
    "float32, sampled logits": ("float32", True, True),
    "bfloat16, JAX's gradient, all logits": ("bfloat16", False, False),
    "bfloat16, all logits": ("bfloat16", True, False),
    "bfloat16, sampled logits": ("bfloat16", True, True),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Times the ways and prints a table, then one JSON line.

    Attributes:
      dense: a Hugging Face directory, the teacher.
      pruned: another one of the same vocabulary, the student.
      sequences: token ids, int32 (sequences, length), `.npy`.
      limit: how many of them name tokens.
      batch: sequences of the gradient.
      length: tokens of each.
      rounds: how often each way is timed.
    """

    dense: Annotated[Path, tyro.conf.Positional]
    pruned: Annotated[Path, tyro.conf.Positional]
    sequences: Annotated[Path, tyro.conf.Positional]
    limit: int = 16
    batch: int = 2
    length: int = 512
    rounds: int = 3


def main(config: Config) -> None:
    """Compiles each way, then times them in turn."""
    tokens = np.load(config.sequences)[: config.limit, : config.length]
    tokens = tokens.astype(np.int32)
    teacher = open_model(config.dense, dtype="bfloat16").read()
    calls: dict[str, Any] = {}
    results: dict[str, Any] = {}  # the last loss and gradient of each way
    with tempfile.TemporaryDirectory() as folder:
        kept = predictions.keep_predictions(
            teacher.decoder(), tokens, Path(folder), batch=config.batch
        )
        sampler = sampled_tokens.sampler_of(
            teacher.config.vocab_size, tokens, kept.likeliest, batch=config.batch
        )
        if sampler is None:
            raise ValueError(
                "a step names half of the vocabulary; give a smaller batch"
            )
        for name, run in _calls(config, tokens, kept, sampler):

            def call(name: str = name, run: Any = run) -> Any:
                results[name] = run()  # the last one stays, to be compared
                return results[name]

            calls[name] = call
    times = measure.interleaved(calls, config.rounds, warmup=1)
    ways = _compare(results, times)
    print(columns([["way", "seconds", "times", "loss", "cosine"], *_rows(ways)]))
    facts = {"vocabulary": sampler.vocab_size, "sampled": sampler.size}
    measure.report("recovery_step", config=str(config), **facts, ways=ways)


def _calls(
    config: Config,
    tokens: np.ndarray,
    kept: predictions.Predictions,
    sampler: sampled_tokens.TokenSampler,
) -> Iterator[tuple[str, Any]]:
    """Name and call of each way."""
    models: dict[str, LoadedModel] = {}
    for name, (dtype, ordered, sampled) in WAYS.items():
        if dtype not in models:
            models[dtype] = open_model(config.pruned, dtype=dtype).read()
        model, inputs = models[dtype], tokens[: config.batch]
        loss = predictions.from_predictions(kept, sampler=sampler if sampled else None)
        arrays = jax.tree.map(np.array, loss.read(np.arange(config.batch)))
        # How a product is differentiated is decided when it is traced.
        with mock.patch.object(layers, "product", layers.product if ordered else _dot):
            compiled, trained = _gradient(model, loss, arrays, inputs)
        yield name, lambda run=compiled, x=trained, args=(arrays, inputs): run(x, *args)


def _dot(x: jax.Array, kernel: jax.Array, **settings: Any) -> jax.Array:
    """The same product, which JAX differentiates."""
    axes = (((x.ndim - 1,), (0,)), ((), ()))
    return jax.lax.dot_general(x, kernel, axes, **settings)


def _gradient(
    model: LoadedModel, loss: Any, arrays: Any, inputs: np.ndarray
) -> tuple[Any, dict[str, jax.Array]]:
    """The compiled loss and gradient, and the matrices that it is taken by."""
    named = tree.named_leaves(model.params)
    structure = jax.tree.structure(model.params)
    trained = {n: x for n, x in named.items() if n.startswith("layers/") and x.ndim > 1}

    def value(trained: Any, arrays: Any, inputs: Any) -> jax.Array:
        params = jax.tree.unflatten(structure, [*(named | trained).values()])
        return loss.fn(nnx.merge(model.graphdef, params), arrays, inputs)

    step = jax.jit(jax.value_and_grad(value))
    return step.lower(trained, arrays, inputs).compile(), trained


def _compare(results: dict[str, Any], times: dict[str, list[float]]) -> dict[str, Any]:
    """Seconds, loss and the cosine with the first gradient of each way."""
    _, first = next(iter(results.values()))
    ways: dict[str, Any] = {}
    for name, (loss, gradient) in results.items():
        # In float32: squares of bfloat16 lose digits.
        dot, *squares = (
            sum(float(np.vdot(np.float32(a[n]), np.float32(b[n]))) for n in first)
            for a, b in ((first, gradient), (first, first), (gradient, gradient))
        )
        ways[name] = {
            "seconds": measure.median_and_spread(times[name]),
            "loss": float(loss),
            "cosine": dot / np.sqrt(np.prod(squares)),
        }
    return ways


def _rows(ways: dict[str, Any]) -> Iterator[list[str]]:
    slowest = next(iter(ways.values()))["seconds"]["median"]
    for name, way in ways.items():
        seconds = way["seconds"]["median"]
        row = [name, f"{seconds:.2f}", f"{slowest / seconds:.2f}"]
        yield [*row, f"{way['loss']:.4f}", f"{way['cosine']:.4f}"]


if __name__ == "__main__":
    main(tyro.cli(Config))
