"""Which slices of which parameters go together, read off the traced program.

A hidden neuron is a column of one matrix, a row of the next and an entry of a bias: to
remove it, all three must go. `axis_groups` finds such units for any function: neurons,
channels, heads, experts, the width of the residual stream. Zeroing the weights of a
unit gives what the function gives without it. What cannot be removed is named too, with
the reason.
"""

import collections
import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jaxprune.arrays.messages import columns
from jaxprune.graph import axis_trace
from jaxprune.graph.axis_dims import Dim, atoms, root
from jaxprune.graph.axis_trace import AxisTrace, LeafAxes
from jaxprune.typing import Params


class Member(NamedTuple):
    """An axis of a leaf that a group has units on.

    Attributes:
      leaf: the leaf's path name.
      part: the index along the axis that a stacked leaf is stacked on; 0 where none.
      axis: the axis.
    """

    leaf: str
    part: int
    axis: int


@dataclasses.dataclass(frozen=True)
class AxisGroup:
    """Units that can be removed one by one, each with all weights that belong to it.

    Attributes:
      name: the first member: leaf, index in a stacked leaf, axis, and behind dots which
        factor or part of the axis: "layers/0/mlp/down/kernel:0".
      kind: the name with "*" for numbers; groups of a kind are alike, as the layers of
        a model are.
      units: number of units.
      weights: number of weights that belong to all units together.
      members: the axes that have its units.
      removable: whether units can be removed.
      default: whether a glob can select the group, and not only its exact name or kind.
      why: why the group is not removable, or only if it is named; otherwise empty.
      dim: dimension of the group.
    """

    name: str
    kind: str
    units: int
    weights: int
    members: tuple[Member, ...]
    removable: bool
    default: bool
    why: str
    dim: Dim = dataclasses.field(repr=False, compare=False)


@dataclasses.dataclass(frozen=True)
class AxisGroups:
    """The groups of a function, in the order of the leaves; printed they are a table.

    Attributes:
      groups: all of them, those that cannot be removed included.
      trace: the program and the dimensions of its axes.
    """

    groups: tuple[AxisGroup, ...]
    trace: AxisTrace = dataclasses.field(repr=False)

    def kinds(self) -> dict[str, list[AxisGroup]]:
        """The groups by kind; all of a kind have as many units."""
        by_kind: dict[str, list[AxisGroup]] = {}
        for group in self.groups:
            by_kind.setdefault(group.kind, []).append(group)
        return by_kind

    def __iter__(self) -> Iterator[AxisGroup]:
        """The groups."""
        return iter(self.groups)

    def __str__(self) -> str:
        """A line a kind: groups x units, weights, members of a group, removable."""
        rows = [("group", "units", "weights", "members", "removable")]
        for name, groups in self.kinds().items():
            first = groups[0]
            answer = "yes" if first.default else "if asked" if first.removable else "no"
            reasons = dict.fromkeys(group.why for group in groups if group.why)
            rows.append(
                (
                    name if len(groups) > 1 else first.name,
                    f"{len(groups)} x {first.units}",
                    f"{sum(group.weights for group in groups):,}",
                    str(len(first.members)),
                    ": ".join([answer, *list(reasons)[:1]]),
                )
            )
        return columns(rows)


def axis_groups(
    fn: Callable[[Params, Any], Any], params: Params, batch: Any
) -> AxisGroups:
    """Finds which slices of which leaves must be removed together.

    Nothing is computed. The function is traced, and the axes that its operations tie to
    each other are one group: what is added, multiplied or contracted with each other, a
    gate and its values, the parts of a fused matrix, the query heads that share a key.
    Zeroing all weights of a unit is the same as removing it; an axis for which this
    cannot be shown (a LayerNorm or softmax runs over it, an operation is not
    understood, the batch or the result has it) is not removable and says why.

    By default the width of a residual stream is left alone, and so are units inside the
    units of another group (features of a head) and those that only one leaf has; they
    can be asked for by name.

    Args:
      fn: parameters and a batch to anything; traceable by JAX.
      params: a pytree of arrays, or of `jp.LazyArray` or `jax.ShapeDtypeStruct`.
      batch: one batch, arrays or `jax.ShapeDtypeStruct`.

    Returns:
      The groups; `print` them for a table.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxprune as jp
      >>> fn = lambda p, x: jnp.tanh(x @ p["up"] + p["bias"][None]) @ p["down"]
      >>> params = {
      ...     "bias": jnp.ones(6), "down": jnp.ones((6, 3)), "up": jnp.ones((2, 6))
      ... }
      >>> print(jp.axis_groups(fn, params, jnp.ones((5, 2))))
      group   units  weights  members  removable
      bias:0  1 x 6  36       3        yes
      down:1  1 x 3  18       1        no: is an axis of the result
      up:0    1 x 2  12       1        no: is an axis of the batch
    """
    trace = axis_trace.trace_axes(fn, params, batch)
    occurrences: dict[Dim, list[tuple[LeafAxes, Member, tuple[int, ...]]]] = {}
    outer_of: dict[Dim, Dim] = {}  # atom to the atom whose units it lies in
    for leaf in trace.leaves:
        for (part, dims), axis in itertools.product(
            enumerate(leaf.parts), range(len(leaf.shape))
        ):
            # A fused axis, such as the (q, k, v) of one kernel, has several atoms.
            for atom, path in _paths(dims[axis]):
                occurrence = (leaf, Member(leaf.name, part, axis), path)
                occurrences.setdefault(atom, []).append(occurrence)
            outer_of |= _outer_atoms(dims[axis])
    # Axes of a weight that meet an activation side by side, as (heads, features) of
    # an output projection do, nest too; what a single axis says comes first.
    for dim in trace.nested:
        outer_of = _outer_atoms(dim) | outer_of
    names = {atom: _group_name(*entries[0]) for atom, entries in occurrences.items()}
    kinds = _group_kinds(names, occurrences)
    groups = [
        _axis_group(
            atom, names[atom], kinds[atom], entries, names.get(outer_of.get(atom, atom))
        )
        for atom, entries in occurrences.items()
    ]
    return AxisGroups(_name_kinds_of_outer_groups(groups), trace)


def _paths(dim: Dim, path: tuple[int, ...] = ()) -> Iterator[tuple[Dim, Any]]:
    """The atoms of a dimension, each with the way to it."""
    dim = root(dim)
    if dim.is_atom:
        if dim.size > 1:
            yield dim, path
        return
    for i, part in enumerate(dim.parts):
        yield from _paths(part, (*path, i))


def _outer_atoms(dim: Dim) -> dict[Dim, Dim]:
    """Each atom inside the units of a removable atom, to that outer atom."""
    dim = root(dim)
    outer_of: dict[Dim, Dim] = {}
    if dim.is_atom:
        return outer_of
    outer = None
    for part in dim.parts:
        if outer is not None:
            outer_of |= {atom: outer for atom in atoms(part) if atom is not outer}
        outer_of |= {k: v for k, v in _outer_atoms(part).items() if k not in outer_of}
        # Row-major, as reshapes are: in (heads, features) heads are the outer units.
        if not dim.is_sum and outer is None:
            free = (atom for atom in atoms(part) if atom.why is None)
            outer = next(free, None)
    return outer_of


def _group_name(leaf: LeafAxes, member: Member, path: tuple[int, ...]) -> str:
    stack = "" if leaf.stacked is None else f"/{member.part}"
    return f"{leaf.name}{stack}:" + ".".join(map(str, (member.axis, *path)))


def _group_kinds(
    names: Mapping[Dim, str], occurrences: Mapping[Dim, Any]
) -> dict[Dim, str]:
    """The name of each group with "*" for numbers, where groups alike have as many.

    Groups whose members differ, as those of a first layer may, get kinds of their own.
    """
    # Signatures of each pattern in order of appearance: the first has the plain name.
    forms: dict[str, dict[Any, None]] = collections.defaultdict(dict)
    keys = {}
    for atom, name in names.items():
        leaf_name, _, axis_name = name.rpartition(":")
        pattern = f"{_starred(leaf_name)}:{axis_name}"
        signature = (
            atom.size,
            atom.why,
            tuple((_starred(m.leaf), m.axis, path) for _, m, path in occurrences[atom]),
        )
        forms[pattern][signature] = None
        keys[atom] = (pattern, signature)
    kinds = {}
    for atom, (pattern, signature) in keys.items():
        number = list(forms[pattern]).index(signature)
        kinds[atom] = pattern if number == 0 else f"{pattern}#{number + 1}"
    return kinds


def _starred(name: str) -> str:
    # Parts of a path end at "/", those of a torch module's name at ".".
    return re.sub(r"(?<![^/.])\d+(?![^/.])", "*", name)


def _axis_group(
    atom: Dim,
    name: str,
    pattern: str,
    occurrences: Sequence[tuple[LeafAxes, Member, tuple[int, ...]]],
    outer: str | None,
) -> AxisGroup:
    # A fused axis has the atom several times, and is one member.
    members = tuple(dict.fromkeys(member for _, member, _ in occurrences))
    why = atom.why or ""
    if not why and atom.residual:
        why = "it is the width of a residual stream"
    elif not why and outer is not None and outer != name:
        why = f"it lies inside each unit of {outer}"
    elif not why and len(members) == 1:
        why = "no other leaf has its units"
    return AxisGroup(
        name=name,
        kind=pattern,
        units=atom.size,
        weights=_count_weights(
            atom, {leaf.name: leaf for leaf, _, _ in occurrences}, members
        ),
        members=members,
        removable=atom.why is None,
        default=not why,
        why=why,
        dim=atom,
    )


def _count_weights(
    atom: Dim, leaves: Mapping[str, LeafAxes], members: Sequence[Member]
) -> int:
    """How many weights have at least one axis at one of the group's units."""
    total = 0
    for name, part in dict.fromkeys((m.leaf, m.part) for m in members):
        dims = leaves[name].parts[part]
        # A weight is spared if on every axis it lies at no unit of the group.
        spared = [dim.size - _count_positions(dim, atom) for dim in dims]
        total += math.prod(dim.size for dim in dims) - math.prod(spared)
    return total


def _count_positions(dim: Dim, atom: Dim) -> int:
    """How many positions of a dimension belong to a unit of an atom."""
    dim = root(dim)
    if dim.is_atom:
        return dim.size if dim is atom else 0
    counts = [_count_positions(part, atom) for part in dim.parts]
    if dim.is_sum:
        return sum(counts)
    sizes = [part.size for part in dim.parts]
    # All positions but those that are at no unit in any of the factors.
    return dim.size - math.prod(
        size - count for size, count in zip(sizes, counts, strict=True)
    )


def _name_kinds_of_outer_groups(groups: Sequence[AxisGroup]) -> tuple[AxisGroup, ...]:
    """What is said of a group inside another names kinds where there are many."""
    many = collections.Counter(group.kind for group in groups)
    kinds = {group.name: group.kind for group in groups}
    renamed = []
    for group in groups:
        outer = group.why.removeprefix("it lies inside each unit of ")
        if many[group.kind] > 1 and outer in kinds:
            why = f"it lies inside each unit of {kinds[outer]}"
            group = dataclasses.replace(group, why=why)
        renamed.append(group)
    return tuple(renamed)
