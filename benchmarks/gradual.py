"""Pruning inside the optimizer costs a step without an event next to nothing.

    python -m benchmarks.gradual --what step
    python -m benchmarks.gradual --what optimizer

Two comparisons, ratios to plain adamw of neighbours in time: the whole training step of
a GPT with nothing due, and the optimizer's step alone, with nothing due and with an
event at every step.
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

Wrap = Callable[[optax.GradientTransformation], optax.GradientTransformation]

BLOCK = 5
LEAVES = 10
# Never reached, and reached at every step from the second on.
NEVER = jp.schedules.cubic(0.9, begin=10**6, end=10**6 + 2000)
ALWAYS = jp.schedules.cubic(0.9, begin=1, end=2000, every=1)


@dataclasses.dataclass(frozen=True)
class Config:
    """Times steps of an optimizer that prunes over steps of one that does not.

    Attributes:
      what: "step" for the whole step of a GPT, "optimizer" for adamw's alone.
      preset: the GPT's size.
      batch_size: sequences in a batch.
      size: parameters of the optimizer's step.
      repeats: timings of each candidate; of five steps each with "step".
    """

    what: Literal["step", "optimizer"] = "step"
    preset: str = "medium"
    batch_size: int = 16
    size: int = 20_000_000
    repeats: int = 15


def main(config: Config) -> None:
    """Prints one JSON line."""
    candidates = _steps(config) if config.what == "step" else _optimizers(config)
    times = measure.interleaved(candidates, config.repeats, warmup=2)
    alone = np.asarray(times["adamw"])
    measure.report(
        f"gradual_{config.what}",
        config=dataclasses.asdict(config),
        # Ratios of neighbours in time: what else the machine does falls on both.
        ratio={
            name: measure.median_and_spread(np.asarray(samples) / alone)
            for name, samples in times.items()
        },
        seconds={k: measure.median_and_spread(v) for k, v in times.items()},
    )


def _gradual(schedule: Any, **options: Any) -> Wrap:
    return lambda inner: jp.gradual(inner, schedule, **options)


def _without_event() -> dict[str, Wrap]:
    """Plain adamw twice, so that the noise is seen, and what prunes, nothing due."""
    return {
        "adamw": lambda inner: inner,
        "adamw again": lambda inner: inner,
        "gradual": _gradual(NEVER),
        "gradual packed": _gradual(NEVER, packed=True),
    }


def _steps(config: Config) -> dict[str, Callable[[], Any]]:
    """Whole training steps of a GPT, a few in each timing."""
    shape = gpt.GPTConfig(vocab_size=65, **gpt.PRESETS[config.preset])
    model, rng = LanguageModel(shape), np.random.default_rng(0)
    tokens = rng.integers(0, 65, (2, config.batch_size, shape.context), np.int32)
    inputs, targets = jnp.asarray(tokens[0]), jnp.asarray(tokens[1])
    key = jax.random.key(0)

    def candidate(wrap: Wrap) -> Callable[[], Any]:
        tx = wrap(optimizer(schedule(1e-3, 1000, warmup=100), track=()))
        step = jax.jit(training.make_step(model.loss, tx), donate_argnums=0)
        held = [training.init(model.init(0), tx)]

        def run() -> Any:
            for _ in range(BLOCK):
                held[0], loss = step(held[0], inputs, targets, key)
            return held[0], loss

        return run

    return {name: candidate(wrap) for name, wrap in _without_event().items()}


def _optimizers(config: Config) -> dict[str, Callable[[], Any]]:
    """One step of adamw on given gradients."""
    rows = config.size // LEAVES // 1000
    gradients = {
        f"layer_{n}": 0.01 * jax.random.normal(jax.random.key(n), (rows, 1000))
        for n in range(LEAVES)
    }
    everything = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, bool), gradients)

    def candidate(wrap: Wrap) -> Callable[[], Any]:
        tx = wrap(optax.adamw(1e-3))

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

    wraps = {
        **_without_event(),
        "keep_masks": lambda inner: jp.keep_masks(inner, everything),
        "event": _gradual(ALWAYS),
        "event by magnitude": _gradual(ALWAYS, criterion=jp.scores.magnitude),
        "event in each layer": _gradual(ALWAYS, allocation="layer"),
    }
    return {name: candidate(wrap) for name, wrap in wraps.items()}


if __name__ == "__main__":
    main(tyro.cli(Config))
