"""Tracking costs a training step next to nothing.

Two comparisons: the whole training step of a GPT with and without a tracker, and the
optimizer's step alone, beside the ratio of the bytes that each must move.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

import jaxprune as jp
from benchmarks import measure
from experiments import gpt
from experiments.harness import training
from experiments.tasks.language_model import LanguageModel, optimizer, schedule

TRACKERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "float32": jp.track_importance,
    "bfloat16": lambda: jp.track_importance(storage="bfloat16"),
    "int8": lambda: jp.track_importance(storage="int8"),
    "float32 every 10": lambda: jp.track_importance(every=10),
    "int8 every 10": lambda: jp.track_importance(every=10, storage="int8"),
}
BLOCK = 10
ADAMW_BYTES = 28  # reads w, g, m, v; writes w, m, v
TRACKED_BYTES = {"float32": 8, "bfloat16": 4, "int8": 2}


@dataclasses.dataclass(frozen=True)
class Config:
    """Times training with a tracker over training without.

    Attributes:
      what: "step" for the whole step of a GPT, "optimizer" for adamw's alone.
      preset: the GPT's size.
      batch_size: sequences in a batch.
      size: parameters of the optimizer's step.
      repeats: timings of each candidate; of ten steps each with "step".
    """

    what: Literal["step", "optimizer"] = "step"
    preset: str = "medium"
    batch_size: int = 16
    size: int = 100_000_000
    repeats: int = 15


def main(config: Config) -> None:
    """Prints one JSON line."""
    candidates = _steps(config) if config.what == "step" else _optimizers(config)
    times = measure.interleaved(candidates, config.repeats, warmup=2)
    alone = np.asarray(times["alone"])
    # Ratios of neighbours in time: what else the machine does falls on both.
    ratios = {
        name: measure.median_and_spread(np.asarray(samples) / alone)
        for name, samples in times.items()
        if name != "alone"
    }
    limits = {k: 1 + extra / ADAMW_BYTES for k, extra in TRACKED_BYTES.items()}
    measure.report(
        f"tracking_{config.what}",
        config=dataclasses.asdict(config),
        ratio=ratios,
        ratio_of_bytes=limits if config.what == "optimizer" else None,
        seconds={k: measure.median_and_spread(v) for k, v in times.items()},
    )


def _steps(config: Config) -> dict[str, Callable[[], Any]]:
    """Ten whole training steps of a GPT, so that every tenth is in each timing."""
    shape = gpt.GPTConfig(vocab_size=65, **gpt.PRESETS[config.preset])
    model, rng = LanguageModel(shape), np.random.default_rng(0)
    tokens = rng.integers(0, 65, (2, config.batch_size, shape.context), np.int32)
    inputs, targets = jnp.asarray(tokens[0]), jnp.asarray(tokens[1])
    key = jax.random.key(0)

    def candidate(tracker: optax.GradientTransformation) -> Callable[[], Any]:
        adamw = optimizer(schedule(1e-3, 1000, warmup=100), track=())
        tx = optax.chain(adamw, tracker)
        step = jax.jit(training.make_step(model.loss, tx), donate_argnums=0)
        held = [training.init(model.init(0), tx)]

        def run() -> Any:
            for _ in range(BLOCK):
                held[0], loss = step(held[0], inputs, targets, key)
            return held[0], loss

        return run

    trackers = {name: make() for name, make in TRACKERS.items()}
    return {
        name: candidate(tracker)
        for name, tracker in {"alone": optax.identity(), **trackers}.items()
    }


def _optimizers(config: Config) -> dict[str, Callable[[], Any]]:
    """One step of adamw on given gradients, in 24 leaves."""
    rows = config.size // 24 // 2048
    gradients = {
        f"layer_{n}": 0.01 * jax.random.normal(jax.random.key(n), (rows, 2048))
        for n in range(24)
    }

    def candidate(tracker: optax.GradientTransformation) -> Callable[[], Any]:
        tx = optax.chain(optax.adamw(1e-3), tracker)

        def step(held: Any, gradients: Any) -> Any:
            updates, state = tx.update(gradients, held[1], held[0])
            return optax.apply_updates(held[0], updates), state

        compiled = jax.jit(step, donate_argnums=0)
        params = jax.tree.map(jnp.copy, gradients)
        held = [(params, tx.init(params))]

        def run() -> Any:
            held[0] = compiled(held[0], gradients)
            return held[0]

        return run

    trackers = {name: TRACKERS[name]() for name in TRACKED_BYTES}
    return {
        name: candidate(tracker)
        for name, tracker in {"alone": optax.identity(), **trackers}.items()
    }


if __name__ == "__main__":
    main(tyro.cli(Config))
