"""When masks change while a model trains, and to which sparsity.

A schedule is a frozen value; its `table` says at which steps masks are chosen and what
share is pruned there. Step t is the update that t updates came before. The last event
has the final sparsity exactly, however begin, end and every divide. The classes are
lower case because they are read as functions: `jp.schedules.cubic(0.8, 500, 1500)`.
"""

import abc
import dataclasses
import numbers
from collections.abc import Mapping
from typing import Protocol, TypeAlias

from jaxprune.masking.counts import checked_sparsity
from jaxprune.typing import Pattern

__all__ = ["constant", "cubic", "linear", "once"]


def __dir__() -> list[str]:
    return __all__


class Schedule(Protocol):
    """When masks change, and to which sparsity."""

    def table(self) -> dict[int, float]:
        """Step to the share that is pruned from then on, in ascending order."""


Events: TypeAlias = Schedule | Mapping[int, float | str | Pattern]
"""A schedule, or {step: sparsity}; an n:m pattern may stand for a sparsity."""


class _Range(abc.ABC):
    """Begin, end and every, and the events that they give."""

    final: float
    begin: int
    end: int
    every: int

    def __post_init__(self) -> None:
        """Refuses what is out of range."""
        name = type(self).__name__
        checked_sparsity(self.final, f" for schedules.{name}")
        for field, least in (("begin", 0), ("end", 0), ("every", 1)):
            _check_step(f"schedules.{name}({field}=...)", getattr(self, field), least)
        if not self.begin <= self.end:
            raise ValueError(
                f"schedules.{name} needs begin <= end, got begin={self.begin}, "
                f"end={self.end}; a single event is jp.schedules.once(step, final)"
            )

    def table(self) -> dict[int, float]:
        """Step to the share that is pruned from then on, in ascending order."""
        begin, end, every = int(self.begin), int(self.end), int(self.every)
        # The last event is at `end` even where `every` does not divide the range.
        span, steps = max(end - begin, 1), [*range(begin, end, every), end]
        return {t: self.final * self._part((end - t) / span) for t in steps}

    @abc.abstractmethod
    def _part(self, remaining: float) -> float:
        """The part of the final sparsity, by the part of the range still to come."""


@dataclasses.dataclass(frozen=True)
class cubic(_Range):
    """Fast at first and slower to the end: final (1 - ((end - t) / (end - begin))^3).

    Args:
      final: share that is pruned at the end, in [0, 1).
      begin: step at which the sparsity leaves zero, at least 0.
      end: step of the last event, at least `begin`.
      every: number of steps between two events; the last may follow sooner.

    Returns:
      A schedule.

    Raises:
      ValueError: an argument is out of range.
      TypeError: a step is no integer.

    Example:
      >>> import jaxprune as jp
      >>> jp.schedules.cubic(0.8, begin=0, end=100, every=50).table()
      {0: 0.0, 50: 0.7000000000000001, 100: 0.8}

    Reference:
      Zhu, Gupta, "To prune, or not to prune: exploring the efficacy of pruning for
      model compression", 2017, arXiv 1710.01878, equation 1.
    """

    final: float
    begin: int
    end: int
    every: int = 50

    def _part(self, remaining: float) -> float:
        return 1 - remaining**3


@dataclasses.dataclass(frozen=True)
class linear(_Range):
    """In equal steps: final (t - begin) / (end - begin).

    Args:
      final: share that is pruned at the end, in [0, 1).
      begin: step at which the sparsity leaves zero, at least 0.
      end: step of the last event, at least `begin`.
      every: number of steps between two events; the last may follow sooner.

    Returns:
      A schedule.

    Raises:
      ValueError: an argument is out of range.
      TypeError: a step is no integer.

    Example:
      >>> import jaxprune as jp
      >>> jp.schedules.linear(0.8, begin=0, end=100, every=50).table()
      {0: 0.0, 50: 0.4, 100: 0.8}
    """

    final: float
    begin: int
    end: int
    every: int = 50

    def _part(self, remaining: float) -> float:
        return 1 - remaining


@dataclasses.dataclass(frozen=True)
class constant(_Range):
    """The same sparsity at every event, for masks that move: `grow`, straight-through.

    Args:
      final: share that is pruned, in [0, 1).
      begin: step of the first event, which has the final sparsity too, at least 0.
      end: step of the last event, at least `begin`.
      every: number of steps between two events; the last may follow sooner.

    Returns:
      A schedule.

    Raises:
      ValueError: an argument is out of range.
      TypeError: a step is no integer.

    Example:
      >>> import jaxprune as jp
      >>> jp.schedules.constant(0.8, begin=0, end=120, every=50).table()
      {0: 0.8, 50: 0.8, 100: 0.8, 120: 0.8}
    """

    final: float
    begin: int
    end: int
    every: int = 50

    def _part(self, remaining: float) -> float:
        return 1.0


@dataclasses.dataclass(frozen=True)
class once:
    """All at one step.

    Args:
      step: step of the only event, at least 0.
      final: share that is pruned, in [0, 1).

    Returns:
      A schedule.

    Raises:
      ValueError: an argument is out of range.
      TypeError: the step is no integer.

    Example:
      >>> import jaxprune as jp
      >>> jp.schedules.once(100, 0.5).table()
      {100: 0.5}
    """

    step: int
    final: float

    def __post_init__(self) -> None:
        """Refuses what is out of range."""
        _check_step("schedules.once(step=...)", self.step, 0)
        checked_sparsity(self.final, " for schedules.once")

    def table(self) -> dict[int, float]:
        """Step to the share that is pruned from then on."""
        return {int(self.step): self.final}


def sorted_events(schedule: Events) -> dict[int, float | str | Pattern]:
    """A schedule's events in ascending order: step to a sparsity or a pattern.

    Args:
      schedule: schedule, or {step: sparsity or n:m pattern}.

    Returns:
      Step to what is asked for from then on.

    Raises:
      ValueError: there is no event, or a step or a sparsity is out of range.
      TypeError: it is neither of the two, or a step is no integer.

    Example:
      >>> from jaxprune.training import schedules
      >>> schedules.sorted_events({200: "2:4", 100: "4:8"})
      {100: '4:8', 200: '2:4'}
    """
    if not isinstance(schedule, Mapping) and (
        not (hasattr(schedule, "table") and not isinstance(schedule, type))
    ):
        raise TypeError(
            "a schedule must be one of jp.schedules, such as jp.schedules.cubic(0.8, "
            f"begin=500, end=1500), or {{step: sparsity}}, got {schedule!r}"
        )
    table = schedule if isinstance(schedule, Mapping) else schedule.table()
    if not table:
        raise ValueError(
            "a schedule must have an event, but this has none; give {step: sparsity}"
        )
    for step in table:
        _check_step("the steps of a schedule", step, 0)
    return dict(sorted(table.items()))


def _check_step(name: str, value: object, least: int) -> None:
    if not (isinstance(value, numbers.Integral) and not isinstance(value, bool)):
        raise TypeError(
            f"{name} must be an integer from {least} on, got {value!r}; round it"
        )
    if not least <= int(value) < 2**31:
        raise ValueError(
            f"{name} must be an integer from {least} to 2^31 - 1, got {value}"
        )
