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
    """A dimension; compare what `root` gives, by identity.

    Attributes:
      size: the number of positions.
      why: why nothing can be removed from it; None where it can.
      residual: whether it is the width of a sum that goes on from layer to layer.
    """

    __slots__ = ("_form", "_parts", "_same", "residual", "size", "why")

    def __init__(self, size: int, why: str | None = None) -> None:
        """Makes an atom that nothing else is tied to."""
        self.size = size
        self.why = why
        self.residual = False
        # Union-find: an atom that was unified points to what it became.
        self._same: Dim | None = None
        self._form: Literal["atom", "product", "sum"] = "atom"
        self._parts: tuple[Dim, ...] = ()

    @property
    def is_atom(self) -> bool:
        """Whether it is neither a product nor a sum."""
        return self._form == "atom"

    @property
    def is_sum(self) -> bool:
        """Whether its parts stand one behind the other."""
        return self._form == "sum"

    @property
    def parts(self) -> list["Dim"]:
        """Factors, the slowest first, or summands; nested ones of a kind are one."""
        flat: list[Dim] = []
        for part in map(root, self._parts):
            flat += part.parts if part._form == self._form else [part]
        return flat

    def become(self, form: Literal["product", "sum"], parts: Sequence["Dim"]) -> None:
        """Makes an atom a product or a sum; what it is known for goes to the parts."""
        self._form, self._parts = form, tuple(parts)
        self._hand_on(self)

    def tie(self, target: "Dim") -> None:
        """Makes an atom the same as another dimension."""
        self._same = target
        self._hand_on(target)

    def _hand_on(self, heir: "Dim") -> None:
        for atom in atoms(heir):
            if atom.size not in (0, 1):  # `ONE` is shared by all axes of length one
                atom.why = atom.why or self.why
                atom.residual = atom.residual or self.residual


ONE = Dim(1, "it has one position")
"""The dimension of every axis of length one."""


def root(dim: Dim) -> Dim:
    """What a dimension is the same as by now."""
    while dim._same is not None:
        dim = dim._same
    return dim


def new_dim(size: int, why: str | None = None) -> Dim:
    """A new dimension, `ONE` where it has one position."""
    return ONE if size == 1 else Dim(size, why)


def is_larger(first: int, second: int) -> bool:
    """Whether a size is larger than another, symbolic ones too.

    JAX cannot order b x s and b, which are the same where s is 1; of symbolic sizes a
    proper multiple counts as the larger one.

    Args:
      first: number of positions of an axis, or of several.
      second: another one.

    Returns:
      Whether the first is the larger one.
    """
    if isinstance(first, int) and isinstance(second, int):
        return first > second
    if first % second == 0 or second % first == 0:
        return first != second and first % second == 0
    return first >= second


def atoms(dim: Dim) -> Iterator[Dim]:
    """The atoms of a dimension, in order, those that come again included."""
    dim = root(dim)
    if dim.is_atom:
        yield dim
    else:
        for part in dim.parts:
            yield from atoms(part)


def freeze(dim: Dim, why: str) -> None:
    """Says of all that a dimension is made of that nothing can be removed."""
    for atom in atoms(dim):
        atom.why = atom.why or why


def product_of(parts: Sequence[Dim]) -> Dim:
    """The product of dimensions, the slowest first."""
    return _compose("product", [part for part in parts if part.size not in (0, 1)])


def sum_of(parts: Sequence[Dim]) -> Dim:
    """The sum of dimensions, one behind the other."""
    return _compose("sum", [part for part in parts if part.size != 0])


def _compose(form: Literal["product", "sum"], parts: Sequence[Dim]) -> Dim:
    if len(parts) < 2:
        empty = 1 if form == "product" else 0
        return parts[0] if parts else new_dim(empty, "is empty")
    sizes = [part.size for part in parts]
    dim = Dim(math.prod(sizes) if form == "product" else sum(sizes))
    dim.become(form, parts)
    return dim


# An axis and its shifted copy are cut one position after the other, each in the last.
_DEEPEST = 64


def unify(first: Dim, second: Dim, depth: int = 0) -> None:
    """Makes two dimensions of one size the same; freezes what cannot be matched."""
    first, second = root(first), root(second)
    if first is second or first.size in (0, 1):
        return
    if not first.is_atom and second.is_atom:
        first, second = second, first
    if first.is_atom:
        first.tie(second)
    elif depth == _DEEPEST or not _unify_parts(first, second, depth + 1):
        freeze(first, UNEVEN)
        freeze(second, UNEVEN)


def _unify_parts(first: Dim, second: Dim, depth: int) -> bool:
    """Unifies two dimensions that have parts; whether all of them fit."""
    if first.is_sum or second.is_sum:
        # Both are cut wherever one of them has a seam: 2 + 4 and 3 + 3 as 2 + 1 + 3.
        sizes = _common_cuts([dim for dim in (first, second) if dim.is_sum])
        pieces = [as_sum(first, sizes), as_sum(second, sizes)]
    else:
        pieces = _common_factors(first, second)
    if pieces[0] is None or pieces[1] is None:
        return False
    for a, b in zip(*pieces, strict=True):  # type: ignore[arg-type]
        unify(a, b, depth)
    return True


def _common_cuts(sums: Sequence[Dim]) -> list[int]:
    """The lengths between all places where one of the sums has a seam."""
    seams = {0}
    for dim in sums:
        seams |= set(np.cumsum([part.size for part in dim.parts]).tolist())
    return np.diff(sorted(seams)).tolist()


def _common_factors(first: Dim, second: Dim) -> list[list[Dim] | None]:
    """Two products as products of the same sizes; None where there is no such."""
    # (2, 6) and (4, 3) as (2, 2, 3); (2, 3) and (3, 2) have none.
    sizes: list[int] = []
    pending_first, pending_second = (
        [part.size for part in dim.parts] for dim in (first, second)
    )
    while pending_first and pending_second:
        a, b = pending_first.pop(0), pending_second.pop(0)
        if is_larger(b, a):
            a, b = b, a
            pending_first, pending_second = pending_second, pending_first
        if a % b:
            return [None, None]
        sizes.append(b)
        if a != b:  # what the larger factor still has to give
            pending_first.insert(0, a // b)
    return [as_product(first, sizes), as_product(second, sizes)]


def as_product(dim: Dim, sizes: Sequence[int]) -> list[Dim] | None:
    """A dimension as a product of these sizes, ones included; None if it is not."""
    # An atom becomes such a product.
    dim = root(dim)
    proper = [size for size in sizes if size not in (0, 1)]
    if len(proper) < 2:
        factors: list[Dim] | None = [dim] if proper else []
    elif dim.is_atom:
        factors = [Dim(size, dim.why) for size in proper]
        if dim.why is None:  # else it stays undivided, and its factors are frozen
            dim.become("product", factors)
    elif dim.is_sum:
        factors = _sum_as_product(dim, proper)
    else:
        factors = _regroup_factors(dim, proper)
    if factors is None:
        return None
    pending = iter(factors)
    return [next(pending) if size not in (0, 1) else ONE for size in sizes]


def _regroup_factors(dim: Dim, sizes: Sequence[int]) -> list[Dim] | None:
    """(a x b x c) as (a x b) x c; factors are split where a size asks for it."""
    pending, products = dim.parts, []
    for size in sizes:
        factors: list[Dim] = []
        missing = size  # what is still to be multiplied
        while missing != 1:
            part = pending.pop(0)
            if is_larger(part.size, missing):
                halves = None
                if part.size % missing == 0:
                    halves = as_product(part, [missing, part.size // missing])
                if halves is None:
                    return None
                part = halves[0]
                pending.insert(0, halves[1])
            elif missing % part.size:
                return None
            factors.append(part)
            missing //= part.size
        products.append(product_of(factors))
    return products


def _sum_as_product(dim: Dim, sizes: Sequence[int]) -> list[Dim] | None:
    """(a x r) + (b x r) as (a + b) x r."""
    inner = math.prod(sizes[1:])  # r
    if any(part.size % inner for part in dim.parts):
        return None
    splits = [as_product(part, [part.size // inner, inner]) for part in dim.parts]
    pairs = [split for split in splits if split is not None]
    if len(pairs) < len(splits):
        return None
    for pair in pairs[1:]:
        unify(pairs[0][1], pair[1])
    tail = as_product(pairs[0][1], sizes[1:])
    return None if tail is None else [sum_of([pair[0] for pair in pairs]), *tail]


def as_sum(dim: Dim, sizes: Sequence[int]) -> list[Dim] | None:
    """A dimension as a sum of these sizes; None if it cannot be cut there."""
    # An atom becomes such a sum.
    dim = root(dim)
    sizes = [size for size in sizes if size]
    if len(sizes) == 1:
        return [dim]
    if dim.is_atom:
        parts = [new_dim(size, dim.why) for size in sizes]
        if dim.why is None:
            dim.become("sum", parts)
        return parts
    return _regroup_summands(dim, sizes) if dim.is_sum else _product_as_sum(dim, sizes)


def _regroup_summands(dim: Dim, sizes: Sequence[int]) -> list[Dim] | None:
    """(a + b + c) as (a + b) + c; summands are split where a size asks for it."""
    pending, sums = dim.parts, []
    for size in sizes:
        summands: list[Dim] = []
        missing = size  # how many positions the sum still lacks
        while missing:
            part = pending.pop(0)
            if part.size > missing:
                halves = as_sum(part, [missing, part.size - missing])
                if halves is None:
                    return None
                part = halves[0]
                pending.insert(0, halves[1])
            summands.append(part)
            missing -= part.size
        sums.append(sum_of(summands))
    return sums


def _product_as_sum(dim: Dim, sizes: Sequence[int]) -> list[Dim] | None:
    """(a + b) x r as (a x r) + (b x r)."""
    outer, *inner = dim.parts
    stride = math.prod(part.size for part in inner)  # positions of one outer unit
    if any(size % stride for size in sizes):
        return None
    slices = as_sum(outer, [size // stride for size in sizes])
    return None if slices is None else [product_of([part, *inner]) for part in slices]


def kept_positions(dim: Dim, masks: Mapping[Dim, np.ndarray]) -> np.ndarray:
    """Which positions of a dimension are kept, by the masks of its atoms.

    Args:
      dim: dimension, divided or not.
      masks: booleans (size,) of each atom that loses units; others keep all.

    Returns:
      Booleans (size of dim,).
    """
    dim = root(dim)
    if dim.is_atom:
        return masks.get(dim, np.ones(dim.size, bool))
    parts = [kept_positions(part, masks) for part in dim.parts]
    if dim.is_sum:
        return np.concatenate(parts)
    # A position of a product is kept where all its factors' positions are.
    product = parts[0]
    for part in parts[1:]:
        product = np.logical_and.outer(product, part).reshape(-1)
    return product


def sum_by_unit(dim: Dim, values: np.ndarray, atom: Dim) -> np.ndarray:
    """The sums of values at the positions of a dimension, for each unit of an atom.

    Args:
      dim: dimension, divided or not.
      values: numbers (size of dim,).
      atom: the atom, which may occur in it several times or not at all.

    Returns:
      Sums (size of atom,), of the dtype of the values.
    """
    dim = root(dim)
    if dim is atom:
        return values
    total = np.zeros(atom.size, values.dtype)
    if dim.is_atom:
        return total
    parts = dim.parts
    if dim.is_sum:
        ends = np.cumsum([part.size for part in parts])[:-1]
        for part, segment in zip(parts, np.split(values, ends), strict=True):
            total += sum_by_unit(part, segment, atom)
        return total
    grid = values.reshape([part.size for part in parts])  # an axis a factor
    for axis, part in enumerate(parts):
        others = tuple(i for i in range(len(parts)) if i != axis)
        total += sum_by_unit(part, grid.sum(others), atom)
    return total


def unit_numbers(dim: Dim, atom: Dim) -> np.ndarray:
    """Which unit of an atom each position of a dimension belongs to.

    Args:
      dim: dimension, divided or not.
      atom: an atom that is no factor of it twice.

    Returns:
      Integers (size of dim,), -1 where the atom is not.
    """
    dim = root(dim)
    if dim is atom:
        return np.arange(dim.size)
    if dim.is_atom:
        return np.full(dim.size, -1)
    parts = [unit_numbers(part, atom) for part in dim.parts]
    if dim.is_sum:
        return np.concatenate(parts)
    shape = [part.size for part in dim.parts]
    # The atom is in one of the factors; the others say -1 everywhere.
    spread = [
        part.reshape([-1 if i == axis else 1 for i in range(len(shape))])
        for axis, part in enumerate(parts)
    ]
    return np.broadcast_to(functools.reduce(np.maximum, spread), shape).reshape(-1)
