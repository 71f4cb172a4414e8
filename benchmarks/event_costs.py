"""Compiling an optimizer that prunes, the memory of an event, and a long schedule.

    python -m benchmarks.event_costs

Each cost is of a program that takes a step of adamw, alone or inside `gradual`; `init`
is that of a schedule with an event at each of so many steps, whose counts it makes.
"""

import dataclasses
import time
import warnings
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
import tyro

import jaxprune as jp
from benchmarks import measure

_SCHEDULE = jp.schedules.cubic(0.8, 0, 100, every=10)
_LONG: dict[str, dict[str, str]] = {
    "global": {},
    "layer": {"allocation": "layer"},
    "erk": {"allocation": "erk"},
    "16x16": {"pattern": "16x16"},
    "16x16, erk": {"pattern": "16x16", "allocation": "erk"},
}
_OPTIMIZERS: dict[str, Any] = {
    "adamw": lambda: optax.adamw(1e-3),
    "global": lambda: jp.gradual(optax.adamw(1e-3), _SCHEDULE),
    "layer": lambda: jp.gradual(optax.adamw(1e-3), _SCHEDULE, allocation="layer"),
    "16x16": lambda: jp.gradual(optax.adamw(1e-3), _SCHEDULE, pattern="16x16"),
    "4:8, 2:4": lambda: jp.gradual(optax.adamw(1e-3), {4: "4:8", 8: "2:4"}),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Compiles steps of optimizers; nothing runs.

    Attributes:
      leaves: numbers of leaves, of four shapes.
      size: side of the smallest leaf's matrix; others are up to four times as long.
      events: number of events of the long schedule.
    """

    leaves: tuple[int, ...] = (8, 24, 96)
    size: int = 256
    events: int = 1000


def main(config: Config) -> None:
    """Prints one JSON line."""
    # Of the gradients no result can take the memory, but temporaries can.
    warnings.filterwarnings("ignore", "Some donated buffers")
    jax.block_until_ready(jax.jit(jnp.negative)(1.0))  # what the first program costs
    costs = {
        f"{name}, {leaves} leaves": _costs(make(), leaves, config.size)
        for leaves in measure.progress(config.leaves, "event costs", "size")
        for name, make in _OPTIMIZERS.items()
    }
    init_seconds = {
        f"{name}, {leaves} leaves": _init_seconds(options, leaves, config)
        for leaves in config.leaves
        for name, options in _LONG.items()
    }
    measure.report(
        "event_costs",
        config=dataclasses.asdict(config),
        costs=costs,
        init_seconds=init_seconds,
    )


def _parameters(leaves: int, size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Kernels of four shapes in turn."""
    side = 2 * size
    shapes = [(side, side), (side, 2 * side), (2 * side, side), (size, side)]
    return {
        f"layer_{n:03d}/kernel": jax.ShapeDtypeStruct(shapes[n % 4], jnp.float32)
        for n in range(leaves)
    }


def _init_seconds(options: dict[str, str], leaves: int, config: Config) -> float:
    """Processor seconds of `init` where the schedule has many events."""
    schedule = jp.schedules.cubic(0.8, 0, config.events, every=1)
    # SGD has no state, so that what is left is the schedule's.
    tx = jp.gradual(
        optax.sgd(1e-3), schedule, criterion="magnitude", **cast(Any, options)
    )
    start = time.process_time()
    jax.eval_shape(tx.init, _parameters(leaves, config.size))
    return time.process_time() - start


def _costs(tx: Any, leaves: int, size: int) -> dict[str, float]:
    """Processor seconds of each stage, and temporaries over bytes of parameters."""
    params = _parameters(leaves, size)
    state = jax.eval_shape(tx.init, params)

    def step(gradients: Any, state: Any, params: Any) -> Any:
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    times = [time.process_time()]
    traced = jax.jit(step, donate_argnums=(0, 1, 2)).trace(params, state, params)
    times.append(time.process_time())
    lowered = traced.lower()
    times.append(time.process_time())
    memory = lowered.compile().memory_analysis()
    times.append(time.process_time())
    parameter_bytes = sum(4 * leaf.size for leaf in params.values())
    return {
        "trace_seconds": times[1] - times[0],
        "lower_seconds": times[2] - times[1],
        "compile_seconds": times[3] - times[2],
        "temporaries": memory.temp_size_in_bytes / parameter_bytes,
    }


if __name__ == "__main__":
    main(tyro.cli(Config))
