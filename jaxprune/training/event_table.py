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
from jaxprune.masking.quotas import Quotas, leaf_quotas
from jaxprune.training import schedules
from jaxprune.training.grow import Grow
from jaxprune.typing import Pattern


class Event(NamedTuple):
    """What holds from a step on.

    Attributes:
      step: the number of updates before it.
      sparsity: the share that is pruned, None where the pattern fixes it.
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


class Table(NamedTuple):
    """The counts of the events of one pattern, as the device looks them up.

    Attributes:
      pattern: which weights are pruned together.
      kept: how many units, of all leaves together (events, 1), or of each leaf
        (events, leaves); zero at the events of other patterns.
      grown: how many of these are grown.
      together: whether one ranking spans all leaves.
      axes: which axes of each leaf are input and output.
    """

    pattern: Pattern
    kept: Count
    grown: Count
    together: bool
    axes: Sequence[Axes]


@dataclasses.dataclass(frozen=True)
class Rules:
    """How much is kept at which step; checked when it is made.

    Attributes:
      schedule: a schedule, or {step: sparsity or n:m pattern}.
      allocation: how a sparsity is shared out between leaves.
      pattern: which weights are pruned together.
      axes: which axes of the leaves are input and output.
      grow: what comes back at an event, None for nothing.
    """

    schedule: schedules.Events
    allocation: counts.Allocation
    pattern: Pattern | str
    axes: Axes | Mapping[str, Axes] | None
    grow: Grow | None = None

    def __post_init__(self) -> None:
        """Refuses what no parameters are needed to refuse."""
        if isinstance(self.allocation, Mapping):
            raise ValueError(
                "an allocation must share out the schedule's sparsity, but "
                f"{dict(self.allocation)} gives shares by leaf; take 'global', 'layer' "
                "or 'erk'"
            )
        for event in self.events:
            _check(event, self.allocation, self.grow)

    @functools.cached_property
    def events(self) -> list[Event]:
        """The events in ascending order."""
        usual = patterns.parse(self.pattern)

        def event(step: int, wanted: Any) -> Event:
            # A pattern in the place of a sparsity, such as "2:4", fixes the sparsity.
            if isinstance(wanted, str) or hasattr(wanted, "units"):
                return Event(step, None, patterns.parse(wanted))
            if isinstance(wanted, Mapping):
                raise TypeError(
                    f"a schedule gives one sparsity a step, got {dict(wanted)} at step "
                    f"{step}; for a schedule for each layer, put a jp.gradual into "
                    "each label of optax.partition"
                )
            return Event(
                step, counts.checked_sparsity(wanted, f" at step {step}"), usual
            )

        return [event(*item) for item in schedules.events(self.schedule).items()]

    @functools.cached_property
    def steps(self) -> np.ndarray:
        """The steps of the events (events,), ascending."""
        return np.array([event.step for event in self.events], np.int32)

    @functools.cached_property
    def pattern_of(self) -> np.ndarray:
        """Which of the tables each event reads (events,)."""
        every = list(dict.fromkeys(event.pattern for event in self.events))
        return np.array([every.index(event.pattern) for event in self.events], np.int32)

    @functools.cached_property
    def _made(self) -> dict[Any, list[Table]]:
        return {}

    def tables(self, shapes: Mapping[str, tuple[int, ...]]) -> list[Table]:
        """A table for each pattern, of leaves with these names and shapes."""
        key = tuple(shapes.items())
        if key not in self._made:
            # Counts follow from shapes alone; the dtype is not read.
            named = {n: jax.ShapeDtypeStruct(s, np.float32) for n, s in key}
            quotas = [self._quotas(event, named) for event in self.events]
            self._made[key] = [
                self._table(number, quotas, list(named.values()))
                for number in range(max(self.pattern_of) + 1)
            ]
        return self._made[key]

    def _quotas(self, event: Event, named: Mapping[str, Any]) -> Quotas:
        return leaf_quotas(
            named,
            event.sparsity,
            rule=self.allocation,
            pattern=event.pattern,
            axes=self.axes,
        )

    def _table(
        self, number: int, quotas: Sequence[Quotas], leaves: Sequence[Any]
    ) -> Table:
        own = [n == number for n in self.pattern_of]
        first = own.index(True)
        quota, pattern = quotas[first], self.events[first].pattern
        # Every table has a row for every event, so that one index reads them all; rows
        # of other patterns' events are zero, and are not used.
        none = [0] * len(quota.kept)
        kept = [q.kept if mine else none for q, mine in zip(quotas, own, strict=True)]
        grown = [none] * len(kept)
        if self.grow is not None:
            sizes = counts.unit_counts(pattern, leaves, quota.axes)
            own_sizes = [sum(sizes)] if quota.together else sizes
            grown = self._grown(self.grow, kept, own_sizes)
        return Table(pattern, _count(kept), _count(grown), quota.together, quota.axes)

    def _grown(
        self, grow: Grow, kept: list[list[int]], sizes: list[int]
    ) -> list[list[int]]:
        """How many grow at each event, never more than were pruned before it.

        What a falling sparsity returns grows too: all that is kept and was pruned.
        """
        first, last = self.events[0].step, self.events[-1].step
        grown, before = [], sizes
        for event, row in zip(self.events, kept, strict=True):
            part = grow.part(event.step, first, last)
            # At least what a falling sparsity returns (n - old), at most what is pruned
            # at the time (of - old).
            each = zip(row, before, sizes, strict=True)
            grown.append(
                [min(max(round(part * n), n - old), of - old) for n, old, of in each]
            )
            before = row
        return grown


def at(hit: Bool[Array, " events"], count: Count) -> Count:
    """The row of the one event that is hit, (1,) or (leaves,)."""
    # A sum over rows, at most one of which is hit: without an event it is zero, where
    # a gather would have to read some row.
    rows = jnp.asarray(hit)[:, None]  # (events, 1)
    total = lambda half: jnp.sum(jnp.where(rows, half, np.uint32(0)), 0, np.uint32)  # noqa: E731
    return Count(total(count.high), total(count.low))


def _check(event: Event, allocation: counts.Allocation, grow: Grow | None) -> None:
    """Refuses an event whose sparsity, pattern, rule and growth do not agree."""
    fixed = event.pattern.sparsity is not None
    way = "; or give {step: pattern} for the schedule" if fixed else ""
    try:
        _, rule = counts.agreed(event.sparsity, event.pattern, allocation)
    except ValueError as error:
        raise ValueError(f"{error} (at step {event.step}{way})") from error
    if isinstance(rule, PerMatrix):
        raise ValueError(
            "allocation='matrix' ranks each matrix of a stack, of which a schedule has "
            "no table; take 'layer', 'global' or 'erk'"
        )
    if grow is not None and (fixed or isinstance(event.pattern, patterns.PerOutput)):
        raise ValueError(
            f"grow={grow} needs a pattern whose units are ranked by one cut, got "
            f"{event.pattern}; take 'unstructured', a block or 'channel'"
        )


def _count(rows: list[list[int]]) -> Count:
    """Rows of integers as counts of the same shape."""
    flat = Count.of([number for row in rows for number in row])
    return Count(*(np.reshape(half, (len(rows), -1)) for half in flat))
