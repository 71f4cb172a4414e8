"""An expert that is given no tokens costs nothing.

The product of a mixture's rows with the matrices of their experts, block by block
(`arrays.grouped_rows`) and by `jax.lax.ragged_dot`, alternately in one process: for one
token, as when text is written, and for many; memory as XLA plans it.
"""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import tyro

from benchmarks import measure
from jaxprune.arrays import grouped_rows


@dataclasses.dataclass(frozen=True)
class Config:
    """Times both and prints one JSON line; the sizes are those of OLMoE 7B.

    Attributes:
      experts: matrices.
      active: number of experts that each token goes through.
      width: inputs of a matrix.
      wide: outputs of a matrix.
      tokens: how many at once, in turn.
      repeats: timings of each candidate.
      clock: "wall", or "cpu" for the time that all threads of this process work.
    """

    experts: int = 64
    active: int = 8
    width: int = 2048
    wide: int = 1024
    tokens: tuple[int, ...] = (1, 64, 512)
    repeats: int = 5
    clock: measure.Clock = "wall"


def main(config: Config) -> None:
    """Prints one JSON line."""
    rng = np.random.default_rng(0)
    shape = config.experts, config.width, config.wide  # (experts, in, out)
    weight = jax.device_put(rng.standard_normal(shape, np.float32))
    programs = {
        "by_blocks": jax.jit(grouped_rows.dot),
        "ragged_dot": jax.jit(jax.lax.ragged_dot),
    }
    results: dict[str, Any] = {}
    for tokens in config.tokens:
        rows = rng.standard_normal((tokens * config.active, config.width), np.float32)
        # Without replacement: a token goes through different experts. (tokens, active)
        chosen = np.argsort(rng.random((tokens, config.experts)))[:, : config.active]
        sizes = np.bincount(chosen.ravel(), minlength=config.experts)
        operands = jax.device_put((rows, weight, sizes.astype(np.int32)))
        # Ahead of time, for the analysis of memory; the timed calls then compile
        # nothing.
        compiled = {k: f.lower(*operands).compile() for k, f in programs.items()}
        calls = {k: functools.partial(f, *operands) for k, f in compiled.items()}
        times = measure.interleaved(
            calls, config.repeats, clock=measure.CLOCKS[config.clock]
        )
        results[str(tokens)] = {
            "seconds": {k: measure.median_and_spread(v) for k, v in times.items()},
            "ratio": measure.median_and_spread(
                np.divide(times["by_blocks"], times["ragged_dot"])
            ),
            "temporary_bytes": {
                k: f.memory_analysis().temp_size_in_bytes for k, f in compiled.items()
            },
        }
    measure.report("experts", config=dataclasses.asdict(config), tokens=results)


if __name__ == "__main__":
    main(tyro.cli(Config))
