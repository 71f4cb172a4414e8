"""What a step of a distillation takes: memory, seconds, and the gradient that it gives.

    python -m benchmarks.recovery_costs DENSE PRUNED sequences.npy

One process compiles the gradient of each way, times the ways in turn and compares their
gradients with the first one's, which keeps all activations and runs the teacher.
"""

import dataclasses
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

from benchmarks import measure
from jaxprune.lm.models import hf
from jaxprune.lm.models.decoder.model import Decoder
from jaxprune.lm.recovery import distill, predictions

Loss = Callable[[Decoder, Any, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Config:
    """Measures the ways of a distillation and prints one JSON line.

    Attributes:
      dense: a Hugging Face directory, the teacher.
      pruned: another one of the same vocabulary, the student.
      sequences: token ids, int32 (sequences, length), `.npy`.
      batch: sequences of a step.
      length: tokens of each.
      tops: numbers of likeliest tokens that are kept.
      rounds: how often each way is timed; with 0 it is compiled alone.
    """

    dense: Annotated[Path, tyro.conf.Positional]
    pruned: Annotated[Path, tyro.conf.Positional]
    sequences: Annotated[Path, tyro.conf.Positional]
    batch: int = 4
    length: int = 512
    tops: tuple[int, ...] = (8, 64)
    rounds: int = 2


def main(config: Config) -> None:
    """Compiles each way, then times them in turn."""
    teacher = hf.load(config.dense, dtype="float32").model
    student = hf.load(config.pruned, dtype="float32").model
    graphdef, params = nnx.split(student)
    tokens = np.load(config.sequences)[: config.batch, : config.length]
    rows: dict[str, dict[str, Any]] = {}
    calls: dict[str, Callable[[], Any]] = {}
    results: dict[str, Any] = {}  # the last loss and gradient of each way
    with tempfile.TemporaryDirectory() as folder:
        for name, loss, arrays in _ways(config, teacher, tokens, Path(folder)):

            def value(params: Any, arrays: Any, tokens: Any, loss: Loss = loss) -> Any:
                return loss(nnx.merge(graphdef, params), arrays, tokens)

            step = jax.jit(jax.value_and_grad(value))
            compiled = step.lower(params, arrays, tokens).compile()
            memory = compiled.memory_analysis()
            rows[name] = {
                "argument_bytes": memory.argument_size_in_bytes,
                "temporary_bytes": memory.temp_size_in_bytes,
            }

            def call(
                name: str = name, run: Any = compiled, arrays: Any = arrays
            ) -> Any:
                results[name] = run(params, arrays, tokens)
                return results[name]

            calls[name] = call
    if config.rounds:
        _time(calls, config.rounds, rows)
        _compare(results, rows)
    measure.report("recovery_costs", config=str(config), ways=rows)


def _ways(
    config: Config, teacher: Decoder, tokens: np.ndarray, folder: Path
) -> Iterator[tuple[str, Loss, Any]]:
    """Name, loss and arrays of each way."""
    whole = distill.from_teacher(teacher)
    graphdef, _ = nnx.split(teacher)

    def activations(student: Decoder, params: Any, tokens: jax.Array) -> jax.Array:
        teacher = nnx.merge(graphdef, params)
        return distill.divergence(teacher, student, tokens[:, :-1]).mean()

    yield "activations kept", activations, whole.arrays
    yield "teacher in each step", whole.fn, whole.arrays
    for top in config.tops:
        kept = predictions.keep_predictions(
            teacher, tokens, folder / str(top), top=top, batch=config.batch
        )
        loss = predictions.from_predictions(kept)
        # Copied: the folder goes.
        arrays = jax.tree.map(jnp.array, loss.read(np.arange(len(tokens))))
        yield f"top {top}", loss.fn, arrays


def _time(
    calls: dict[str, Callable[[], Any]], rounds: int, rows: dict[str, dict[str, Any]]
) -> None:
    """Seconds of all threads of a gradient, which other programs change less."""
    clock = measure.CLOCKS["cpu"]
    times = measure.interleaved(calls, rounds, warmup=0, clock=clock)
    for name, samples in times.items():
        rows[name]["cpu_seconds"] = measure.median_and_spread(samples)


def _compare(results: dict[str, Any], rows: dict[str, dict[str, Any]]) -> None:
    """Losses, and the cosine of each gradient with the first one."""
    first = None
    for name, (loss, gradient) in results.items():
        leaves = jax.tree.leaves(gradient)
        first = leaves if first is None else first
        dot = _dot(first, leaves)
        sizes = _dot(first, first), _dot(leaves, leaves)
        rows[name]["loss"] = float(loss)
        rows[name]["cosine"] = dot / np.sqrt(sizes[0] * sizes[1])
        rows[name]["norm"] = float(np.sqrt(sizes[1] / sizes[0]))


def _dot(first: list[jax.Array], second: list[jax.Array]) -> float:
    pairs = zip(first, second, strict=True)
    return sum(float(jnp.vdot(a, b)) for a, b in pairs)


if __name__ == "__main__":
    main(tyro.cli(Config))
