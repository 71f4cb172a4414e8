"""What each event of a schedule keeps: a host table of exact integers.

The counts are those of `masks.make`, worked out in Python integers by the same rules,
for every event before the first step. A compiled program looks its event up; so one
program serves all events, and a count is exact past 2^24 and past 2^32.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from jaxprune.arrays.axes import Axes
from jaxprune.arrays.topk.count_search import Count
from jaxprune.masking import counts, patterns
from jaxprune.masking.allocation import PerMatrix
from jaxprune.masking.quotas import LeafUnits, Quotas, leaf_quotas
from jaxprune.training import schedules
from jaxprune.training.grow import Grow
from jaxprune.typing import Pattern


class Event(NamedTuple):
    """What holds from a step on.

    Attributes:
      step: number of updates before it.
      sparsity: share that is pruned, None where the pattern fixes it.
      pattern: which weights are pruned together.
    """

    step: int
    sparsity: float | None
    pattern: Pattern

    @property
    def share(self) -> float:
        """The share that is pruned."""
        fixed = self.pattern.sparsity
        return float((fixed or 0) if self.sparsity is None else self.sparsity)


class PatternCounts(NamedTuple):
    """The counts of the events of one pattern, as the device looks them up.

    Attributes:
      pattern: which weights are pruned together.
      kept: number of units that are kept, of all leaves together (events, 1), or of
        each leaf (events, leaves); zero at the events of other patterns.
      grown: number of these that are grown, of the same shape.
      together: whether one ranking spans all leaves.
      axes: input and output axes of each leaf.
    """

    pattern: Pattern
    kept: Count
    grown: Count
    together: bool
    axes: Sequence[Axes]


@dataclasses.dataclass(frozen=True)
class EventTable:
    """How much is kept at which step; checked when it is made.

    Attributes:
      schedule: schedule, or {step: sparsity or n:m pattern}.
      allocation: rule by which a sparsity is shared out between leaves.
      pattern: which weights are pruned together.
      axes: input and output axes of the leaves.
      grow: rule of what comes back at an event, None for nothing.
    """

    schedule: schedules.Events
    allocation: counts.Allocation
    pattern: Pattern | str
    axes: Axes | Mapping[str, Axes] | None
    grow: Grow | None = None

    def __post_init__(self) -> None:
        """Refuses what can be refused before there are parameters."""
        if isinstance(self.allocation, Mapping):
            raise ValueError(
                "an allocation must share out the schedule's sparsity, but "
                f"{self.allocation} gives shares by leaf; take 'global', 'layer' or "
                "'erk'"
            )
        for event in self.events:
            _check_event(event, self.allocation, self.grow)

    @functools.cached_property
    def events(self) -> list[Event]:
        """The events in ascending order."""
        default = patterns.parse(self.pattern)

        def event(step: int, target: Any) -> Event:
            # A pattern in the place of a sparsity, such as "2:4", fixes the sparsity.
            if isinstance(target, str) or hasattr(target, "units"):
                return Event(step, None, patterns.parse(target))
            if isinstance(target, Mapping):
                raise TypeError(
                    f"a schedule gives one sparsity a step, got {target} at step "
                    f"{step}; for a schedule for each layer, put a jp.gradual into "
                    "each label of optax.partition"
                )
            return Event(
                step, counts.checked_sparsity(target, f" at step {step}"), default
            )

        targets = schedules.sorted_events(self.schedule)
        return [event(step, target) for step, target in targets.items()]

    @functools.cached_property
    def steps(self) -> np.ndarray:
        """The steps of the events (events,), ascending."""
        return np.array([event.step for event in self.events], np.int32)

    @functools.cached_property
    def pattern_numbers(self) -> np.ndarray:
        """Which of the pattern's counts each event reads (events,)."""
        distinct = list(dict.fromkeys(event.pattern for event in self.events))
        return np.array([distinct.index(e.pattern) for e in self.events], np.int32)

    @functools.cached_property
    def _cache(self) -> dict[Any, list[PatternCounts]]:
        return {}

    def pattern_counts(
        self, shapes: Mapping[str, tuple[int, ...]]
    ) -> list[PatternCounts]:
        """The counts for each pattern, of leaves with these names and shapes."""
        # `update` is traced more than once, and the counts of many leaves take a while.
        key = tuple(shapes.items())
        if key not in self._cache:
            # Counts follow from shapes alone; the dtype is not read.
            named = {
                name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in key
            }
            # Only the sparsity differs from event to event: the units do not.
            units = {
                event.pattern: LeafUnits(named, event.pattern, self.axes)
                for event in self.events
            }
            quotas = [
                leaf_quotas(units[event.pattern], event.sparsity, self.allocation)
                for event in self.events
            ]
            self._cache[key] = [
                self._counts_of(number, quotas, pattern_units.sizes)
                for number, pattern_units in enumerate(units.values())
            ]
        return self._cache[key]

    def _counts_of(
        self, number: int, quotas: Sequence[Quotas], sizes: Sequence[int]
    ) -> PatternCounts:
        has_pattern = [n == number for n in self.pattern_numbers]  # (events,)
        first = has_pattern.index(True)
        quota, pattern = quotas[first], self.events[first].pattern
        # There is a row for every event, so that one index reads all patterns; the rows
        # of other patterns' events are zero, and are not used.
        zeros = [0] * len(quota.kept)
        kept = [  # (events, 1 or leaves)
            event_quota.kept if selected else zeros
            for event_quota, selected in zip(quotas, has_pattern, strict=True)
        ]
        grown = [zeros] * len(kept)
        if self.grow is not None:
            ranked = [sum(sizes)] if quota.together else list(sizes)
            grown = self._grown(self.grow, kept, ranked)
        return PatternCounts(
            pattern, _as_count(kept), _as_count(grown), quota.together, quota.axes
        )

    def _grown(
        self, grow: Grow, kept: list[list[int]], sizes: list[int]
    ) -> list[list[int]]:
        """How many grow at each event, never more than were pruned before it.

        What a falling sparsity returns grows too: all that is kept and was pruned.
        """
        first, last = self.events[0].step, self.events[-1].step
        grown, before = [], sizes  # everything is kept before the first event
        for event, row in zip(self.events, kept, strict=True):
            part = grow.part(event.step, first, last)
            # At least what a falling sparsity returns (n - old), at most what is pruned
            # at the time (size - old).
            grown.append(
                [
                    min(max(round(part * n), n - old), size - old)
                    for n, old, size in zip(row, before, sizes, strict=True)
                ]
            )
            before = row
        return grown


def count_at(event: Bool[Array, " events"], count: Count) -> Count:
    """The row of the one event that is True, (1,) or (leaves,)."""
    # A sum over rows, at most one of which is True: without an event it is zero, where
    # a gather would have to read some row.
    selected = jnp.asarray(event)[:, None]  # (events, 1)

    def total(half: Any) -> Any:
        return jnp.sum(jnp.where(selected, half, np.uint32(0)), 0, np.uint32)

    return Count(total(count.high), total(count.low))


def _as_count(rows: list[list[int]]) -> Count:
    """Rows of integers as counts of the same shape."""
    # Two halves of 32 bits: a leaf may have more weights than one of them counts.
    flat = Count.of([number for row in rows for number in row])
    return Count(*(np.reshape(half, (len(rows), -1)) for half in flat))


def _check_event(
    event: Event, allocation: counts.Allocation, grow: Grow | None
) -> None:
    """Refuses an event whose sparsity, pattern, allocation and growth do not agree."""
    fixed = event.pattern.sparsity is not None
    way_out = "; or give {step: pattern} for the schedule" if fixed else ""
    try:
        _, rule = counts.agreed(event.sparsity, event.pattern, allocation)
    except ValueError as error:
        raise ValueError(f"{error} (at step {event.step}{way_out})") from error
    if isinstance(rule, PerMatrix):
        raise ValueError(
            "allocation='matrix' ranks each matrix of a stack, of which a schedule "
            "has no table; take 'layer', 'global' or 'erk'"
        )
    if grow is not None and (fixed or isinstance(event.pattern, patterns.PerOutput)):
        raise ValueError(
            f"grow={grow} needs a pattern whose units are ranked by one cut, got "
            f"{event.pattern}; take 'unstructured', a block or 'channel'"
        )
