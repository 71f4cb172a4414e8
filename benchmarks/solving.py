"""Seconds that SparseGPT and ALPS take for each matrix of a layer, in one process.

The shapes are those of a layer of Gemma 3 270M, the inputs are drawn and correlated.
Both solvers take turns; compilation is timed apart. Beside the seconds on the clock
stand those of the processor, of all its cores together, which other programs hardly
change.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from benchmarks import measure
from jaxprune.posttraining.solvers import alps, sparsegpt

SOLVERS: dict[str, Callable[..., sparsegpt.Solution]] = {
    "sparsegpt": sparsegpt.solve,
    "alps": alps.solve,
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Times both solvers and prints one JSON line.

    Attributes:
      width: width of the residual stream.
      ffn: neurons of the MLP.
      heads: features of all query heads.
      kv: features of all key heads.
      sparsity: the share to remove.
      repeats: number of timings of each solver and matrix; the median counts.
    """

    width: int = 640
    ffn: int = 2048
    heads: int = 1024
    kv: int = 256
    sparsity: float = 0.6
    repeats: int = 5

    def shapes(self) -> dict[str, tuple[int, int, int]]:
        """Name to (in, out) and how many a layer has."""
        return {
            "q": (self.width, self.heads, 1),
            "k, v": (self.width, self.kv, 2),
            "out": (self.heads, self.width, 1),
            "gate, up": (self.width, self.ffn, 2),
            "down": (self.ffn, self.width, 1),
        }


def main(config: Config) -> None:
    """Solves each matrix by both in turn; the sum is of a layer."""
    rows: dict[str, Any] = {}
    sums = {solver: np.zeros(2) for solver in SOLVERS}
    shapes = measure.progress(config.shapes().items(), "solving", "shape")
    for name, (inputs, outputs, count) in shapes:
        weight, hessian = drawn(inputs, outputs)  # (in, out), (in, in)
        # A number in an array: another sparsity runs the same program.
        kept = np.uint32(weight.size - round(config.sparsity * weight.size))
        seconds: dict[str, list[np.ndarray]] = {solver: [] for solver in SOLVERS}
        # The first call compiles; it is told apart.
        for _ in range(config.repeats + 1):
            for solver, solve in SOLVERS.items():
                start = clocks()
                jax.block_until_ready(solve(weight, hessian, kept))
                seconds[solver].append(clocks() - start)
        rows[name] = {"shape": [inputs, outputs]}
        for solver, (first, *seconds_a_repeat) in seconds.items():
            median = np.median(seconds_a_repeat, 0)  # (2,)
            rows[name][solver] = {"first": first.tolist(), "median": median.tolist()}
            sums[solver] += count * median  # seconds of a layer: wall, processor
    layer = {
        solver: seconds_a_repeat.tolist() for solver, seconds_a_repeat in sums.items()
    }
    measure.report("solving", clocks=["wall", "processor"], rows=rows, layer=layer)


def clocks() -> np.ndarray:
    """Seconds on the clock and of the processor, (2,)."""
    return np.array([time.perf_counter(), time.process_time()])


def drawn(inputs: int, outputs: int) -> tuple[jax.Array, jax.Array]:
    """A weight (in, out), and the Hessian (in, in) of inputs that are correlated."""
    rng = np.random.default_rng(0)
    shared = rng.normal(size=(2 * inputs, inputs // 4)).astype(np.float32)
    # A quarter of the directions carries most of the variance.
    mixed = shared @ rng.normal(size=(inputs // 4, inputs)).astype(np.float32)
    noise = rng.normal(size=mixed.shape).astype(np.float32)
    x = jnp.asarray(mixed / np.sqrt(inputs // 4) + 0.3 * noise)  # (samples, in)
    weight = jnp.asarray(rng.normal(size=(inputs, outputs)), jnp.float32)
    return weight, x.T @ x / len(x)


if __name__ == "__main__":
    main(tyro.cli(Config))
