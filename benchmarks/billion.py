"""A billion parameters are trained, tracked and pruned within 24 GiB.

Parameters, gradients and Adam's moments in bfloat16, the average in two bytes or one.
No float32 copy of any of them is ever held for more than a leaf; the scores, four bytes
a weight, are made when training's own buffers are gone.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
import tyro

import jaxprune as jp
from benchmarks import measure
from jaxprune.arrays.low_bit import Storage
from jaxprune.training.running_average import Memory


@dataclasses.dataclass(frozen=True)
class Config:
    """Trains, tracks and prunes a deep perceptron and prints the memory it took.

    Attributes:
      layers: square matrices.
      width: rows and columns of each.
      storage: dtype of the average.
      memory: place of the average, device or host.
      steps: training steps.
      sparsity: what is pruned, by one global ranking.
    """

    layers: int = 16
    width: int = 8192
    storage: Storage = "bfloat16"
    memory: Memory = "device"
    steps: int = 3
    sparsity: float = 0.6


def main(config: Config) -> None:
    """Prints one JSON line; memory in bytes, beyond what the process began with."""
    tracker = jp.track_importance(storage=config.storage, memory=config.memory)
    tx = optax.chain(optax.adamw(1e-4, mu_dtype=jnp.bfloat16), tracker)
    # One dictionary holds every tree, so that each is freed where it is replaced.
    buffers: dict[str, Any] = {}

    trained = measure.peak_memory(lambda: _train(config, tx, buffers))
    # Adam's moments go with the state; only the average stays.
    importance = jp.get_importance(buffers.pop("state"))

    def score() -> Any:
        buffers["scores"] = jp.scores.averaged_weight(buffers["params"], importance)
        return buffers

    scored = measure.peak_memory(score)
    average_bytes = _bytes(importance.weight)
    del importance

    def prune() -> Any:
        buffers["params"] = jp.prune(
            buffers.pop("params"),
            buffers["scores"],
            config.sparsity,
            allocation="global",
            donate=True,
        )
        return buffers

    _compile_pruning(config, buffers)
    pruned = measure.peak_memory(prune)
    measure.report(
        "billion",
        config=dataclasses.asdict(config),
        parameters=config.layers * config.width**2,
        parameter_bytes=_bytes(buffers["params"]),
        average_bytes=average_bytes,
        leaf_bytes_float32=4 * config.width**2,
        training_peak=trained["extra_bytes"],
        training_kept=trained["kept_bytes"],
        scoring_peak=scored["extra_bytes"],
        pruning_peak=pruned["extra_bytes"],
        sparsity=jp.sparsity(buffers["params"]).total,
    )


def _train(
    config: Config, tx: optax.GradientTransformation, buffers: dict[str, Any]
) -> dict[str, Any]:
    """Makes parameters and state, trains them, and leaves them in the buffers."""
    step = _step(config, tx)
    buffers["params"] = params = _init(config)
    buffers["state"] = tx.init(params)
    del params  # the step uses them up
    for _ in measure.progress(range(config.steps), "training"):
        buffers["params"], buffers["state"] = step(buffers["params"], buffers["state"])
    return jax.block_until_ready(buffers)


def _compile_pruning(config: Config, buffers: dict[str, Any]) -> None:
    """Prunes one leaf: all leaves have its shape, so its program serves them all."""
    first = next(iter(buffers["params"]))
    jp.prune(
        {first: buffers["params"][first]},
        {first: buffers["scores"][first]},
        config.sparsity,
        allocation="global",
    )


def _step(config: Config, tx: optax.GradientTransformation) -> Any:
    """A training step of parameters and state, in their own memory."""
    # A batch of 16: activations are next to nothing beside the parameters.
    batch = jax.random.normal(jax.random.key(0), (16, config.width), jnp.bfloat16)

    def loss(params: Any) -> jax.Array:
        hidden = batch
        for kernel in params.values():
            hidden = jnp.tanh(hidden @ kernel)
        return jnp.mean(jnp.square(hidden.astype(jnp.float32)))

    def step(params: Any, state: Any) -> Any:
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step, donate_argnums=(0, 1))


def _init(config: Config) -> dict[str, jax.Array]:
    """The matrices, made one after the other."""
    width = config.width

    @jax.jit
    def matrix(key: jax.Array) -> jax.Array:
        return jax.random.normal(key, (width, width), jnp.bfloat16) / width**0.5

    return {
        f"layer_{n:02d}": jax.block_until_ready(matrix(jax.random.key(n)))
        for n in range(config.layers)
    }


def _bytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


if __name__ == "__main__":
    main(tyro.cli(Config))
