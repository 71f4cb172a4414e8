"""What lies beside the weights in the step of an optimizer, by XLA's order on a CPU.

    python -m benchmarks.leaf_by_leaf

The optimizer of a recovery, under masks, on leaves of the shapes of Gemma 3 270M's
matrices: compiled as JAX does, and with `compiling.leaf_by_leaf`. Both are timed in
turn in one process, in processor time.
"""

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import optax
import tyro

from benchmarks import measure
from jaxprune import keep_masks
from jaxprune.arrays import compiling, placement
from jaxprune.arrays.messages import columns

_SHAPES = [(640, 1024), (640, 256), (640, 256), (1024, 640)]  # q, k, v, o
_SHAPES += [(640, 2048), (640, 2048), (2048, 640)]  # gate, up, down


@dataclasses.dataclass(frozen=True)
class Config:
    """Times the two and prints a table, then one JSON line.

    Attributes:
      layers: layers of seven leaves.
      rounds: how often each is timed.
    """

    layers: int = 18
    rounds: int = 7


def main(config: Config) -> None:
    """Compiles both, then times them in turn."""
    shapes = _SHAPES * config.layers
    keys = jax.random.split(jax.random.key(0), len(shapes))
    params = {
        f"{i}": jax.random.normal(key, shape)
        for i, (key, shape) in enumerate(zip(keys, shapes, strict=True))
    }
    size = sum(leaf.nbytes for leaf in params.values())
    gradient = {name: leaf / 100 for name, leaf in params.items()}
    orders = {"JAX's": {}, "leaf by leaf": compiling.leaf_by_leaf()}
    steps = {name: _Step(params, gradient, options) for name, options in orders.items()}
    times = measure.interleaved(steps, config.rounds, clock=time.process_time)
    rows = {
        name: {
            "seconds": measure.median_and_spread(times[name]),
            "beside": step.temporaries / size,
        }
        for name, step in steps.items()
    }
    cells = [
        [name, f"{row['seconds']['median']:.2f}", f"{row['beside']:.1f}"]
        for name, row in rows.items()
    ]
    print(columns([["order", "seconds", "copies beside"], *cells]))
    weights = size // 4
    measure.report("leaf_by_leaf", config=str(config), weights=weights, orders=rows)


class _Step:
    """A compiled step, called again and again on what it left."""

    def __init__(self, params: Any, gradient: Any, options: dict[str, str]):
        masks = jax.tree.map(lambda leaf: jnp.abs(leaf) > 0.84, params)  # 60 % go
        optimizer = optax.chain(
            optax.clip_by_global_norm(1.0),
            optax.adamw(2e-3),
            optax.scale_by_param_block_rms(),
        )
        tx = keep_masks(optimizer, masks)

        def step(params: Any, state: Any, gradient: Any) -> tuple[Any, Any]:
            updates, state = tx.update(gradient, state, params)
            return optax.apply_updates(params, updates), state

        self.gradient = gradient
        # A step gives up what it is given, and the other one has the same parameters.
        self.state = placement.committed(
            (jax.tree.map(jnp.copy, params), jax.jit(tx.init)(params))
        )
        jitted = jax.jit(step, donate_argnums=(0, 1), compiler_options=options)
        self.compiled = jitted.lower(*self.state, gradient).compile()
        self.temporaries = self.compiled.memory_analysis().temp_size_in_bytes

    def __call__(self) -> Any:
        self.state = self.compiled(*self.state, self.gradient)
        return self.state


if __name__ == "__main__":
    main(tyro.cli(Config))
