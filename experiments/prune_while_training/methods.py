"""The methods by name, and when each of them prunes.

Each method is a wrapper of nanoGPT's optimizer; nothing else of the training step
changes. The sparsity rises between 20 % and 60 % of the steps, and masks that may
change are frozen at 75 %. In the methods named `_late` it rises from 10 % to 90 %, and
masks are frozen at 95 %. Both schedules leave the same number of weights on average
over the training.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import optax

import jaxprune as jp
from experiments.harness.optimizer import optimizer

DENSE, DENSE_SMALL = "dense", "dense_small"
"""The control, and the dense model of a pruned run's average number of weights."""


class Span(NamedTuple):
    """When a run prunes, in steps.

    Attributes:
      final: the sparsity at the end.
      begin: the first event.
      end: the step from which the sparsity is final.
      freeze: the step from which masks that move are fixed.
      every: steps between two events.
    """

    final: float
    begin: int
    end: int
    freeze: int
    every: int

    @classmethod
    def of(cls, final: float, steps: int) -> "Span":
        """The span of a run of so many steps."""
        begin, end, freeze = (round(part * steps) for part in (0.2, 0.6, 0.75))
        return cls(final, max(begin, 1), end, freeze, max(steps // 100, 1))

    def late(self) -> "Span":
        """The longer rise of the same average: 10 % to 90 %, frozen at 95 %."""
        steps = self.end / 0.6  # the run's, whose rise ends at 60 %
        begin, end, freeze = (round(part * steps) for part in (0.1, 0.9, 0.95))
        return self._replace(begin=begin, end=end, freeze=freeze)

    def cubic(self) -> jp.schedules.Schedule:
        """The sparsity that rises along a cubic."""
        return jp.schedules.cubic(self.final, self.begin, self.end, every=self.every)

    def average(self, steps: int) -> float:
        """The mean share of weights that is left, over the steps."""
        table = self.cubic().table()
        # The sparsity of an event holds until the next one, or the end.
        starts = [*table, steps]
        pruned = sum(
            share * (stop - start)
            for (start, share), stop in zip(table.items(), starts[1:], strict=True)
        )
        return 1 - pruned / steps


Method = Callable[[optax.ScalarOrSchedule, Span], optax.GradientTransformation]
"""The learning rate and the span to the optimizer."""


def late(method: Method) -> Method:
    """The method, with the longer rise."""
    return lambda rate, span: method(rate, span.late())


def _dense(rate: optax.ScalarOrSchedule, span: Span) -> optax.GradientTransformation:
    del span
    return optimizer(rate, track=())


def _once(rate: optax.ScalarOrSchedule, span: Span) -> optax.GradientTransformation:
    step = (span.begin + span.end) // 2  # half way of the others' rise
    return jp.gradual(optimizer(rate, track=()), jp.schedules.once(step, span.final))


def _gradual(
    rate: optax.ScalarOrSchedule, span: Span, **options: Any
) -> optax.GradientTransformation:
    return jp.gradual(optimizer(rate, track=()), span.cubic(), **options)


def _straight(
    rate: optax.ScalarOrSchedule, span: Span, **options: Any
) -> optax.GradientTransformation:
    return jp.straight_through(
        optimizer(rate, track=()),
        span.cubic(),
        freeze=span.freeze,
        **options,
    )


def _sparse(
    rate: optax.ScalarOrSchedule,
    span: Span,
    grow: jp.grow.Grow | None = None,
    power: float = 0.0,
) -> optax.GradientTransformation:
    """Sparse from the first step: a random mask, and what `grow` makes of it."""
    schedule: jp.schedules.Schedule = jp.schedules.once(0, span.final)
    if grow is not None:
        period = max(span.freeze // 30, 1)  # 2.5 % of the steps
        schedule = jp.schedules.constant(span.final, 0, span.freeze, every=period)
    return jp.gradual(
        optax.chain(optimizer(rate, track=()), jp.contrib.scale_by_density(power)),
        schedule,
        # What leaves the mask is the smallest weight; a mask that never moves is drawn
        # once.
        criterion=jp.scores.random if grow is None else jp.scores.magnitude,
        # As RigL and SET have it: a uniform share would starve the small matrices.
        allocation="erk",
        grow=grow,
    )


_MAGNITUDE: dict[str, Any] = {"criterion": jp.scores.magnitude}

METHODS: dict[str, Method] = {
    DENSE: _dense,
    DENSE_SMALL: _dense,
    "once": _once,
    "gradual_magnitude": functools.partial(_gradual, **_MAGNITUDE),
    "gradual_preconditioned": _gradual,
    "gradual_magnitude_late": late(functools.partial(_gradual, **_MAGNITUDE)),
    "gradual_preconditioned_late": late(_gradual),
    "ste_magnitude": functools.partial(_straight, **_MAGNITUDE),
    "ste_preconditioned": _straight,
    "ste_preconditioned_late": late(_straight),
    "set": functools.partial(_sparse, grow=jp.grow.random()),
    "rigl": functools.partial(_sparse, grow=jp.grow.gradient()),
    "static_random": _sparse,
    "set_scaled": functools.partial(_sparse, grow=jp.grow.random(), power=0.75),
    "rigl_scaled": functools.partial(_sparse, grow=jp.grow.gradient(), power=0.75),
    "static_random_scaled": functools.partial(_sparse, power=0.75),
    "set_scaled_by_root": functools.partial(_sparse, grow=jp.grow.random(), power=0.5),
    "set_scaled_fully": functools.partial(_sparse, grow=jp.grow.random(), power=1.0),
}
"""Name to optimizer. `ste_` is straight-through;
`_scaled` divides steps by each matrix's density to the power 0.75, `_by_root` by its
root, `_fully` by itself."""
