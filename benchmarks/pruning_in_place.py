"""Pruning in place needs one leaf of memory at most beside parameters and scores.

The peak of the process while `prune` runs, with `donate=True` and without, and what XLA
asks for where all of it is one program that donates its parameters.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import tyro

import jaxprune as jp
from benchmarks import measure


@dataclasses.dataclass(frozen=True)
class Config:
    """Measures the memory and the time of pruning.

    Attributes:
      size: weights in all.
      leaves: how many leaves they lie in.
      sparsity: the share removed.
      dtype: dtype of the parameters; scores are float32.
      repeats: timings of each candidate.
    """

    size: int = 100_000_000
    leaves: int = 25
    sparsity: float = 0.6
    dtype: str = "float32"
    repeats: int = 5


def main(config: Config) -> None:
    """Prints one JSON line, in bytes and seconds."""
    results: dict[str, Any] = {}
    names: tuple[jp.allocation.Name, ...] = ("layer", "global")
    for allocation in measure.progress(names, "pruning", "allocation"):
        results |= _measured(config, allocation)
    shape = _shape(config)
    measure.report(
        "pruning_in_place",
        config=dataclasses.asdict(config),
        leaf_bytes=shape[0] * shape[1] * jnp.dtype(config.dtype).itemsize,
        **results,
    )


def _measured(config: Config, allocation: jp.allocation.Name) -> dict[str, Any]:
    def prune(params: Any, scores: Any, *, donate: bool = False) -> Any:
        return jp.prune(
            params, scores, config.sparsity, allocation=allocation, donate=donate
        )

    params = _params(config)
    scores = {k: jnp.abs(v).astype(jnp.float32) for k, v in params.items()}
    # What XLA plans for where all is one program: nothing beside the donated
    # parameters.
    program = jax.jit(prune, donate_argnums=0, static_argnames="donate")
    compiled = program.lower(params, scores).compile().memory_analysis()
    result: dict[str, Any] = {
        f"{allocation}, one program": {"temporary_bytes": compiled.temp_size_in_bytes}
    }
    prune(_params(config), scores, donate=True)  # compiles
    for donate in (True, False):
        peaks, times = [], []
        for _ in range(config.repeats):
            params = _params(config)
            call: Callable[[], Any] = lambda p=params, d=donate: prune(  # noqa: E731
                p, scores, donate=d
            )
            # Time and memory of separate calls: resetting the kernel's mark takes time.
            times.append(measure.seconds(call))
            params = _params(config)
            del call
            call = lambda p=params, d=donate: prune(p, scores, donate=d)  # noqa: E731
            peaks.append(measure.peak_memory(call)["extra_bytes"])
            del call
        result[f"{allocation}, donate={donate}"] = {
            "extra_bytes": measure.median_and_spread(peaks),
            "seconds": measure.median_and_spread(times),
        }
    return result


def _shape(config: Config) -> tuple[int, int]:
    return config.size // config.leaves // 1000, 1000  # (rows, columns) of a leaf


def _params(config: Config) -> dict[str, jax.Array]:
    keys = jax.random.split(jax.random.key(0), config.leaves)
    return jax.block_until_ready(
        {
            f"layer_{n:03d}": jax.random.normal(k, _shape(config), config.dtype)
            for n, k in enumerate(keys)
        }
    )


if __name__ == "__main__":
    main(tyro.cli(Config))
