"""The named dimensions that the axes of a program's values are made of.

Each axis of each value has one `Dim`. Two axes that must keep the same positions have
the same one (`unify`). A reshape shows that a dimension is a product (heads x features
of a head), a slice that it is a sum (queries, then keys, then values). From then on the
dimension is that product or sum on every axis that has it. A dimension that stays
undivided is an atom: a set of units that can be removed one by one, or a frozen
dimension with the reason.
"""

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import numpy as np

UNEVEN = "its parts do not line up where it meets another axis"


class Dim:
    """A dimension; compare what `find` gives, by identity.

    Attributes:
      size: the number of positions.
      why: why nothing can be removed from it; None where it can.
      residual: whether it is the width of a sum that goes on from layer to layer.
    """

    __slots__ = ("_kind", "_parts", "_same", "residual", "size", "why")

    def __init__(self, size: int, why: str | None = None) -> None:
        """Makes an atom that nothing else is tied to."""
        self.size = size
        self.why = why
        self.residual = False
        self._same: Dim | None = None
        self._kind: Literal["atom", "product", "sum"] = "atom"
        self._parts: tuple[Dim, ...] = ()

    @property
    def is_atom(self) -> bool:
        """Whether it is neither a product nor a sum."""
        return self._kind == "atom"

    @property
    def is_sum(self) -> bool:
        """Whether its parts stand one behind the other."""
        return self._kind == "sum"

    @property
    def parts(self) -> list["Dim"]:
        """Factors, the slowest first, or summands; nested ones of a kind are one."""
        found: list[Dim] = []
        for part in map(find, self._parts):
            found += part.parts if part._kind == self._kind else [part]
        return found

    def become(self, kind: Literal["product", "sum"], parts: Sequence["Dim"]) -> None:
        """Makes an atom a product or a sum; what it is known for goes to the parts."""
        self._kind, self._parts = kind, tuple(parts)
        self._hand_on(self)

    def tie(self, other: "Dim") -> None:
        """Makes an atom the same as another dimension."""
        self._same = other
        self._hand_on(other)

    def _hand_on(self, to: "Dim") -> None:
        for atom in atoms(to):
            if atom.size > 1:
                atom.why = atom.why or self.why
                atom.residual = atom.residual or self.residual


ONE = Dim(1, "it has one position")
"""The dimension of every axis of length one."""


def find(dim: Dim) -> Dim:
    """What a dimension is the same as by now."""
    while dim._same is not None:
        dim = dim._same
    return dim


def fresh(size: int, why: str | None = None) -> Dim:
    """A new dimension, `ONE` where it has one position."""
    return ONE if size == 1 else Dim(size, why)


def atoms(dim: Dim) -> Iterator[Dim]:
    """The atoms of a dimension, in order, those that come again included."""
    dim = find(dim)
    if dim.is_atom:
        yield dim
    else:
        for part in dim.parts:
            yield from atoms(part)


def freeze(dim: Dim, why: str) -> None:
    """Says of all that a dimension is made of that nothing can be removed."""
    for atom in atoms(dim):
        atom.why = atom.why or why


def merge(parts: Sequence[Dim]) -> Dim:
    """The product of dimensions, the slowest first."""
    return _composed("product", [part for part in parts if part.size > 1])


def concat(parts: Sequence[Dim]) -> Dim:
    """The sum of dimensions, one behind the other."""
    return _composed("sum", [part for part in parts if part.size > 0])


def _composed(kind: Literal["product", "sum"], parts: Sequence[Dim]) -> Dim:
    if len(parts) < 2:
        return parts[0] if parts else fresh(1 if kind == "product" else 0, "is empty")
    sizes = [part.size for part in parts]
    dim = Dim(math.prod(sizes) if kind == "product" else sum(sizes))
    dim.become(kind, parts)
    return dim


def unify(one: Dim, other: Dim) -> None:
    """Makes two dimensions of one size the same; freezes what cannot be matched."""
    one, other = find(one), find(other)
    if one is other or one.size <= 1:
        return
    if not one.is_atom and other.is_atom:
        one, other = other, one
    if one.is_atom:
        one.tie(other)
    elif not _matched(one, other):
        freeze(one, UNEVEN)
        freeze(other, UNEVEN)


def _matched(one: Dim, other: Dim) -> bool:
    """Unifies two dimensions that have parts; whether all of them fit."""
    if one.is_sum or other.is_sum:
        sizes = _common_cuts([d for d in (one, other) if d.is_sum])
        pieces = [cut(one, sizes), cut(other, sizes)]
    else:
        pieces = _common_factors(one, other)
    if pieces[0] is None or pieces[1] is None:
        return False
    for a, b in zip(*pieces, strict=True):  # type: ignore[arg-type]
        unify(a, b)
    return True


def _common_cuts(sums: Sequence[Dim]) -> list[int]:
    """The lengths between all places where one of the sums has a seam."""
    seams = {0}
    for dim in sums:
        seams |= set(np.cumsum([part.size for part in dim.parts]).tolist())
    return np.diff(sorted(seams)).tolist()


def _common_factors(one: Dim, other: Dim) -> list[list[Dim] | None]:
    """Two products as products of the same sizes; None where there is no such."""
    sizes: list[int] = []
    left, right = ([p.size for p in dim.parts] for dim in (one, other))
    while left and right:
        a, b = left.pop(0), right.pop(0)
        if a < b:
            a, b, left, right = b, a, right, left
        if a % b:
            return [None, None]
        sizes.append(b)
        if a > b:
            left.insert(0, a // b)
    return [factor(one, sizes), factor(other, sizes)]


def factor(dim: Dim, sizes: Sequence[int]) -> list[Dim] | None:
    """A dimension as a product of these sizes, ones included; None if it is not."""
    # An atom becomes such a product.
    dim = find(dim)
    wanted = [size for size in sizes if size > 1]
    if len(wanted) < 2:
        found: list[Dim] | None = [dim] if wanted else []
    elif dim.is_atom:
        found = [Dim(size, dim.why) for size in wanted]
        if dim.why is None:
            dim.become("product", found)
    elif dim.is_sum:
        found = _factored_sum(dim, wanted)
    else:
        found = _factored_product(dim, wanted)
    if found is None:
        return None
    pending = iter(found)
    return [next(pending) if size > 1 else ONE for size in sizes]


def _factored_product(dim: Dim, sizes: Sequence[int]) -> list[Dim] | None:
    pending, found = dim.parts, []
    for size in sizes:
        own: list[Dim] = []
        need = size  # what is still to be multiplied
        while need > 1:
            part = pending.pop(0)
            if part.size > need:
                halves = None
                if part.size % need == 0:
                    halves = factor(part, [need, part.size // need])
                if halves is None:
                    return None
                part = halves[0]
                pending.insert(0, halves[1])
            elif need % part.size:
                return None
            own.append(part)
            need //= part.size
        found.append(merge(own))
    return found


def _factored_sum(dim: Dim, sizes: Sequence[int]) -> list[Dim] | None:
    """(a x r) + (b x r) as (a + b) x r."""
    rest = math.prod(sizes[1:])
    if any(part.size % rest for part in dim.parts):
        return None
    halves = [factor(part, [part.size // rest, rest]) for part in dim.parts]
    if any(half is None for half in halves):
        return None
    whole = [half for half in halves if half is not None]
    for half in whole[1:]:
        unify(whole[0][1], half[1])
    tail = factor(whole[0][1], sizes[1:])
    return None if tail is None else [concat([half[0] for half in whole]), *tail]


def cut(dim: Dim, sizes: Sequence[int]) -> list[Dim] | None:
    """A dimension as a sum of these sizes; None if it cannot be cut there."""
    # An atom becomes such a sum.
    dim = find(dim)
    sizes = [size for size in sizes if size]
    if len(sizes) == 1:
        return [dim]
    if dim.is_atom:
        parts = [fresh(size, dim.why) for size in sizes]
        if dim.why is None:
            dim.become("sum", parts)
        return parts
    return _cut_sum(dim, sizes) if dim.is_sum else _cut_product(dim, sizes)


def _cut_sum(dim: Dim, sizes: Sequence[int]) -> list[Dim] | None:
    pending, found = dim.parts, []
    for size in sizes:
        own: list[Dim] = []
        need = size  # what is still to be taken
        while need:
            part = pending.pop(0)
            if part.size > need:
                halves = cut(part, [need, part.size - need])
                if halves is None:
                    return None
                part = halves[0]
                pending.insert(0, halves[1])
            own.append(part)
            need -= part.size
        found.append(concat(own))
    return found


def _cut_product(dim: Dim, sizes: Sequence[int]) -> list[Dim] | None:
    """(a + b) x r as (a x r) + (b x r)."""
    first, *others = dim.parts
    rest = math.prod(part.size for part in others)
    if any(size % rest for size in sizes):
        return None
    firsts = cut(first, [size // rest for size in sizes])
    return None if firsts is None else [merge([part, *others]) for part in firsts]


def mask(dim: Dim, kept: Mapping[Dim, np.ndarray]) -> np.ndarray:
    """Which positions of a dimension are kept, boolean (size,), by the atoms' masks.

    Args:
      dim: any dimension.
      kept: booleans (size,) of each atom that loses units; others keep all.

    Returns:
      Booleans (size of dim,).
    """
    dim = find(dim)
    if dim.is_atom:
        return kept.get(dim, np.ones(dim.size, bool))
    parts = [mask(part, kept) for part in dim.parts]
    if dim.is_sum:
        return np.concatenate(parts)
    whole = parts[0]
    for part in parts[1:]:
        whole = np.logical_and.outer(whole, part).reshape(-1)
    return whole


def pooled(dim: Dim, values: np.ndarray, atom: Dim) -> np.ndarray:
    """The sums of values at the positions of a dimension, for each unit of an atom.

    Args:
      dim: any dimension.
      values: floats (size of dim,).
      atom: the atom, which may occur in it several times or not at all.

    Returns:
      Floats (size of atom,).
    """
    dim = find(dim)
    if dim is atom:
        return values
    total = np.zeros(atom.size, values.dtype)
    if dim.is_atom:
        return total
    parts = dim.parts
    if dim.is_sum:
        ends = np.cumsum([part.size for part in parts])[:-1]
        for part, own in zip(parts, np.split(values, ends), strict=True):
            total += pooled(part, own, atom)
        return total
    shaped = values.reshape([part.size for part in parts])
    for axis, part in enumerate(parts):
        others = tuple(i for i in range(len(parts)) if i != axis)
        total += pooled(part, shaped.sum(others), atom)
    return total


def units(dim: Dim, atom: Dim) -> np.ndarray:
    """Which unit of an atom each position of a dimension belongs to.

    Args:
      dim: any dimension.
      atom: an atom that is no factor of it twice.

    Returns:
      Integers (size of dim,), -1 where the atom is not.
    """
    dim = find(dim)
    if dim is atom:
        return np.arange(dim.size)
    if dim.is_atom:
        return np.full(dim.size, -1)
    parts = [units(part, atom) for part in dim.parts]
    if dim.is_sum:
        return np.concatenate(parts)
    shape = [part.size for part in dim.parts]
    # The atom is in one of the factors; the others say -1 everywhere.
    spread = [
        part.reshape([-1 if i == axis else 1 for i in range(len(shape))])
        for axis, part in enumerate(parts)
    ]
    return np.broadcast_to(functools.reduce(np.maximum, spread), shape).reshape(-1)
