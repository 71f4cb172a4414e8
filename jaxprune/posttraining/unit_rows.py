"""The consumers of an axis group: the matrices whose rows read the group's units.

A neuron or head is read by rows of one matrix, the down projection of an MLP or the
output projection of attention; the state of a recurrent layer is read by several, and
by one of them at every step. Elsewhere units are said to go out by these matrices.
Where a unit is removed, an update of the other rows of each matrix makes up for it.
"""

import collections
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxprune.arrays.messages import listed
from jaxprune.graph.axis_dims import Dim, unit_numbers
from jaxprune.graph.axis_groups import AxisGroup, AxisGroups
from jaxprune.graph.axis_trace import LeafAxes
from jaxprune.graph.linear_ops import LinearOp, Trace


class Consumer(NamedTuple):
    """A weight that a group's units go out by.

    Attributes:
      op: linear op whose weight is one matrix (1, in, out); the first of its uses.
      rows: rows of each unit, (units, rows of one).
    """

    op: LinearOp
    rows: np.ndarray


def consumers(
    groups: AxisGroups, names: Sequence[str], traced: Trace
) -> dict[str, tuple[Consumer, ...]]:
    """The consumers of each group.

    Args:
      groups: axis groups of the function.
      names: names of the groups whose consumers are looked for.
      traced: linear ops of the function.

    Returns:
      Group name to its consumers, in the order of the groups; a weight is there once,
      however often it is used.

    Raises:
      ValueError: the units of a group go out by no linear op, by one that is several
        matrices, or by a weight that is also used in another way.
    """
    chosen = {group.name: group for group in groups if group.name in {*names}}
    candidates: dict[str, dict[str, Consumer]] = {name: {} for name in chosen}
    for leaf in groups.trace.leaves:
        ops = [op for op in traced.linear_ops if op.leaf == leaf.name]
        for axis in range(len(leaf.shape)):
            for members in _on_axis(leaf, axis, list(chosen.values())) if ops else ():
                for name, consumer in _consumers(leaf, axis, members, ops):
                    candidates[name].setdefault(consumer.op.name, consumer)
    ways_out = {name: [*by_name.values()] for name, by_name in candidates.items()}
    wrong = {
        name: [f"{c.op.name} {c.op.shape}" for c in readers] or ["none"]
        for name, readers in ways_out.items()
        if not readers or any(c.op.shape[0] != 1 for c in readers)
    }
    read_by = {c.op.name: c.op for readers in ways_out.values() for c in readers}
    shared = listed([name for name, op in read_by.items() if _is_shared(op, traced)])
    if wrong:
        raise ValueError(
            "the units of a group must go out by matrices, whose other rows can make "
            f"up for them, but those of {listed(wrong)} do not: "
            f"{dict(itertools.islice(wrong.items(), 3))}; remove them by jp.shrink "
            "with scores, or ask for other groups"
        )
    if shared:
        raise ValueError(
            "a matrix that makes up for units must be used in one way, or what else "
            f"it does would change, but {shared} is also read transposed or in part; "
            "remove such units by jp.shrink with scores, or ask for other groups"
        )
    return {name: tuple(readers) for name, readers in ways_out.items()}


def _is_shared(op: LinearOp, traced: Trace) -> bool:
    """Whether a weight overlaps with one that is read otherwise, as a tied one is."""
    # Uses of the very same matrix are solved together, whatever their inputs.
    return any(
        not op.view.is_apart(use.view) and op.view != use.view
        for use in traced.linear_ops
    )


def _on_axis(
    leaf: LeafAxes, axis: int, groups: Sequence[AxisGroup]
) -> list[dict[int, AxisGroup]]:
    """The groups on an axis of a leaf, by the part of a stacked leaf.

    There may be several on it, heads and the query heads of each: one dictionary each.
    """
    parts = collections.defaultdict(list)
    for group in groups:
        for member in group.members:
            if (member.leaf, member.axis) == (leaf.name, axis):
                parts[member.part].append(group)
    most = max(map(len, parts.values()), default=0)
    return [
        {part: members[n] for part, members in parts.items() if n < len(members)}
        for n in range(most)
    ]


def _consumers(
    leaf: LeafAxes, axis: int, groups: Mapping[int, AxisGroup], ops: Sequence[LinearOp]
) -> list[tuple[str, Consumer]]:
    """Pairs of a group name and its consumer, for linear ops that contract the axis."""
    # Units are numbered consecutively over all groups. `numbers` holds the number of
    # each weight's unit, so that an op's view of `numbers` shows the units of its rows.
    ends = np.cumsum([0, *(group.units for group in groups.values())])
    numbers = np.full(leaf.shape, -1, np.int32)
    for start, (part, group) in zip(ends, groups.items(), strict=False):
        places = _numbered(leaf.parts[part][axis], group.dim, int(start))
        shape = [1] * len(leaf.shape)
        shape[axis] = leaf.shape[axis]
        place: list[Any] = [slice(None)] * len(leaf.shape)
        if leaf.stacked is not None:
            place[leaf.stacked] = slice(part, part + 1)
        numbers[tuple(place)] = places.reshape(shape)
    pairs, names = [], [group.name for group in groups.values()]
    array = jnp.asarray(numbers)
    for op in ops:
        numbers_read = np.asarray(op.view.read(array))  # (batch, in, out)
        rows = numbers_read[:, :, 0]  # (batch, in)
        if (numbers_read != rows[:, :, None]).any() or (rows == rows[:, :1]).all():
            continue  # it makes the units, or has nothing to do with them
        known = rows[rows >= 0]  # unit numbers of the rows that have one
        which = int(np.searchsorted(ends, known[0], "right")) - 1
        # The inputs that have a unit, unit by unit.
        order = np.argsort(rows[0], kind="stable")[(rows[0] < 0).sum() :]
        units_ = ends[which + 1] - ends[which]
        pairs.append((names[which], Consumer(op, order.reshape(units_, -1))))
    return pairs


def _numbered(dim: Dim, atom: Dim, start: int) -> np.ndarray:
    numbers = unit_numbers(dim, atom)
    return np.where(numbers < 0, -1, numbers + start)
