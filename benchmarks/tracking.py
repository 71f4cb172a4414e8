"""Tracking costs a training step next to nothing.

Two comparisons: the whole training step of a GPT with and without a tracker, and the
optimizer's step alone, beside the ratio of the bytes that each must move.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Literal

import numpy as np
import optax
import tyro

import jaxprune as jp
from benchmarks import measure, training_steps
from benchmarks.training_steps import Wrap

TRACKERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "float32": jp.track_importance,
    "bfloat16": lambda: jp.track_importance(storage="bfloat16"),
    "int8": lambda: jp.track_importance(storage="int8"),
    "float32 every 10": lambda: jp.track_importance(every=10),
    "int8 every 10": lambda: jp.track_importance(every=10, storage="int8"),
}
BLOCK = 10  # so that every tenth step is in each timing
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
    if config.what == "step":
        wraps = _wraps(TRACKERS)
        sizes = config.preset, config.batch_size, BLOCK
        candidates = training_steps.of_gpt(wraps, *sizes)
    else:
        wraps = _wraps(TRACKED_BYTES)
        candidates = training_steps.of_optimizer(wraps, config.size)
    times = measure.interleaved(candidates, config.repeats, warmup=2)
    alone = np.asarray(times["alone"])  # (repeats,)
    # Ratios of neighbours in time: what else the machine does falls on both.
    ratios = {
        name: measure.median_and_spread(np.asarray(samples) / alone)
        for name, samples in times.items()
        if name != "alone"
    }
    # The step is bound by memory: time goes with the bytes that are moved.
    limits = {k: 1 + extra / ADAMW_BYTES for k, extra in TRACKED_BYTES.items()}
    measure.report(
        f"tracking_{config.what}",
        config=dataclasses.asdict(config),
        ratio=ratios,
        ratio_of_bytes=limits if config.what == "optimizer" else None,
        seconds={k: measure.median_and_spread(v) for k, v in times.items()},
    )


def _wraps(names: Iterable[str]) -> dict[str, Wrap]:
    """Adamw alone, and with each tracker behind it."""

    def behind(tracker: optax.GradientTransformation) -> Wrap:
        return lambda inner: optax.chain(inner, tracker)

    trackers = {name: behind(TRACKERS[name]()) for name in names}
    return {"alone": lambda inner: inner, **trackers}


if __name__ == "__main__":
    main(tyro.cli(Config))
