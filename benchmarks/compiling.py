"""The first call for a model of 200 leaves compiles a few programs a shape."""

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import tyro

import jaxprune as jp
from benchmarks import measure


@dataclasses.dataclass(frozen=True)
class Config:
    """Times first and second calls of `prune`.

    Attributes:
      leaves: leaves of the model.
      shapes: different shapes among them.
      jit: whether to compile the whole of it as one program too, which takes longer.
    """

    leaves: int = 200
    shapes: int = 12
    jit: bool = True


def main(config: Config) -> None:
    """Prints one JSON line, in seconds."""
    params = {
        f"layer_{n:03d}": jax.random.normal(
            jax.random.key(n), (64, 64 + 8 * (n % config.shapes))
        )
        for n in range(config.leaves)
    }
    scores = jp.scores.magnitude(params)
    seconds: dict[str, Any] = {}
    for allocation in measure.progress(("layer", "global"), "compiling", "allocation"):

        def prune(params: Any, scores: Any, allocation: Any = allocation) -> Any:
            return jp.prune(params, scores, 0.6, allocation=allocation)

        seconds[f"{allocation}, first call"] = _seconds(prune, params, scores)
        seconds[f"{allocation}, second call"] = _seconds(prune, params, scores)
        if config.jit:
            # All leaves in one program: XLA compiles them anew even where shapes
            # repeat.
            program = jax.jit(prune)
            seconds[f"{allocation} in one jit, first call"] = _seconds(
                program, params, scores
            )
            seconds[f"{allocation} in one jit, second call"] = _seconds(
                program, params, scores
            )
    tx = jp.track_importance(storage="int8")
    update = jax.jit(tx.update)
    zeros = jax.tree.map(jnp.zeros_like, params)
    seconds["int8 tracker, first init"] = _seconds(tx.init, params)
    state = tx.init(params)
    seconds["int8 tracker, first update"] = _seconds(update, zeros, state, params)
    measure.report("compiling", config=dataclasses.asdict(config), seconds=seconds)


def _seconds(function: Any, *arguments: Any) -> float:
    start = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    return time.perf_counter() - start


if __name__ == "__main__":
    main(tyro.cli(Config))
