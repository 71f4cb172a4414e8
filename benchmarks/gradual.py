"""Pruning inside the optimizer costs a step without an event next to nothing.

    python -m benchmarks.gradual --what step
    python -m benchmarks.gradual --what optimizer

Two comparisons: the whole training step of a GPT, and the optimizer's step alone. Both
are timed with no pruning event, and with an event at every step. The results are ratios
to the time of plain adamw, measured just before or after.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import jaxprune as jp
from benchmarks import measure, training_steps
from benchmarks.training_steps import Wrap

BLOCK = 5
# No event within the timed steps; an event at every step from the second on, at which
# the sparsity rises from half to nine tenths.
NEVER = jp.schedules.cubic(0.9, begin=10**6, end=10**6 + 2000)
ALWAYS = {n: 0.9 - 0.4 * (1 - n / 2000) ** 3 for n in range(1, 2001)}


@dataclasses.dataclass(frozen=True)
class Config:
    """Times steps of an optimizer that prunes over steps of one that does not.

    Attributes:
      what: "step" for the whole step of a GPT, "optimizer" for adamw's alone.
      preset: the GPT's size.
      batch_size: sequences in a batch.
      size: parameters of the optimizer's step.
      repeats: timings of each candidate; of five steps each with "step".
      clock: "wall", or "cpu" for the time that all threads of this process work.
    """

    what: Literal["step", "optimizer"] = "step"
    preset: str = "medium"
    batch_size: int = 16
    size: int = 20_000_000
    repeats: int = 15
    clock: measure.Clock = "wall"


def main(config: Config) -> None:
    """Prints one JSON line."""
    if config.what == "step":
        wraps = {
            **_without_event(),
            "event": _gradual(ALWAYS),
            "straight_through event": _straight_through(ALWAYS),
        }
        # Blocks of a few steps: the spread of one step is that of the machine.
        sizes = config.preset, config.batch_size, BLOCK
        candidates = training_steps.of_gpt(wraps, *sizes)
    else:
        candidates = training_steps.of_optimizer(_all(config.size), config.size)
    clock = measure.CLOCKS[config.clock]
    times = measure.interleaved(candidates, config.repeats, warmup=2, clock=clock)
    alone = np.asarray(times["adamw"])  # (repeats,)
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


def _straight_through(schedule: Any) -> Wrap:
    return lambda inner: jp.straight_through(inner, schedule, freeze=None)


def _without_event() -> dict[str, Wrap]:
    """Plain adamw twice, so that the noise is seen, and what prunes, nothing due."""
    return {
        "adamw": lambda inner: inner,
        "adamw again": lambda inner: inner,
        "gradual": _gradual(NEVER),
        "gradual packed": _gradual(NEVER, packed=True),
        "straight_through": _straight_through(NEVER),
    }


def _all(size: int) -> dict[str, Wrap]:
    """What is timed of the optimizer's step alone."""
    # Shapes alone, for the parameters would be held beside those that are timed.
    shapes = jax.eval_shape(lambda: training_steps.parameters(size))
    masks = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, bool), shapes)
    return {
        **_without_event(),
        "keep_masks": lambda inner: jp.keep_masks(inner, masks),
        "event": _gradual(ALWAYS),
        "event by magnitude": _gradual(ALWAYS, criterion=jp.scores.magnitude),
        "event in each layer": _gradual(ALWAYS, allocation="layer"),
    }


if __name__ == "__main__":
    main(tyro.cli(Config))
