"""The part of a parameter that a linear op uses, as a view that can be written back.

On its way to a linear op a leaf is sliced (a layer of a stack, the queries of a fused
kernel), reshaped, transposed and turned round. A view remembers these moves; it reads
the part from the leaf and puts another in its place, exactly. Casts and constant
factors are no part of a view: what is read is what is stored.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp


class Slice(NamedTuple):
    """A box of the array."""

    starts: tuple[int, ...]
    sizes: tuple[int, ...]

    def read(self, array: jax.Array) -> jax.Array:
        """The box."""
        return jax.lax.dynamic_slice(array, self.starts, self.sizes)

    def write(self, array: jax.Array, part: jax.Array) -> jax.Array:
        """The array with another box."""
        return jax.lax.dynamic_update_slice(array, part, self.starts)


class Reshape(NamedTuple):
    """The same elements in another shape."""

    before: tuple[int, ...]
    after: tuple[int, ...]

    def read(self, array: jax.Array) -> jax.Array:
        """The array in its later shape."""
        return array.reshape(self.after)

    def write(self, array: jax.Array, part: jax.Array) -> jax.Array:
        """The part in its earlier shape."""
        return part.reshape(self.before)


class Transpose(NamedTuple):
    """The same elements with the axes in another order."""

    order: tuple[int, ...]

    def read(self, array: jax.Array) -> jax.Array:
        """The array in its later order."""
        return jnp.transpose(array, self.order)

    def write(self, array: jax.Array, part: jax.Array) -> jax.Array:
        """The part in its earlier order."""
        inverse = sorted(range(len(self.order)), key=self.order.__getitem__)
        return jnp.transpose(part, inverse)


class Steps(NamedTuple):
    """Every n-th element along each axis, from the first on."""

    steps: tuple[int, ...]

    def read(self, array: jax.Array) -> jax.Array:
        """The elements."""
        return jax.lax.slice(array, (0,) * array.ndim, array.shape, self.steps)

    def write(self, array: jax.Array, part: jax.Array) -> jax.Array:
        """The array with others in their places."""
        return array.at[tuple(slice(None, None, step) for step in self.steps)].set(part)


class Reverse(NamedTuple):
    """The same elements, last first along some axes."""

    axes: tuple[int, ...]

    def read(self, array: jax.Array) -> jax.Array:
        """The array turned round."""
        return jnp.flip(array, self.axes)

    def write(self, array: jax.Array, part: jax.Array) -> jax.Array:
        """The part turned back."""
        return jnp.flip(part, self.axes)


Move: TypeAlias = Slice | Steps | Reshape | Transpose | Reverse
"""One step on a leaf's way."""


@dataclasses.dataclass(frozen=True)
class WeightView:
    """How one leaf is seen.

    Attributes:
      leaf: the leaf's position among the parameters.
      shape: shape of what is seen.
      moves: slices, steps, reshapes, transposes and reversals, in order.
      axes: the leaf's axes that each axis of what is seen is made of.
      box: places of what is seen along each axis of the leaf; None where slices and
        reshapes mix so that it is no box.
      cast: whether it was cast or scaled on the way, so that the program's value is
        another.
    """

    leaf: int
    shape: tuple[int, ...]
    moves: tuple[Move, ...]
    axes: tuple[tuple[int, ...], ...]
    box: tuple[range, ...] | None
    cast: bool = False

    def is_apart(self, other: "WeightView") -> bool:
        """Whether two views have no element in common, as far as is known."""
        if self.leaf != other.leaf:
            return True
        if self.box is not None and other.box is not None:
            pairs = zip(self.box, other.box, strict=True)
            return any(set(a).isdisjoint(b) for a, b in pairs)
        # Where the ways part: later moves only choose among what these see.
        ways = zip(self.moves, other.moves, strict=False)
        fork = next(((a, b) for a, b in ways if a != b), None)
        return fork is not None and _are_disjoint(*fork)

    @classmethod
    def whole(cls, leaf: int, shape: Sequence[int]) -> "WeightView":
        """The view of all of a leaf."""
        axes = tuple((axis,) for axis in range(len(shape)))
        return cls(leaf, tuple(shape), (), axes, tuple(map(range, shape)))

    @property
    def sliced(self) -> bool:
        """Whether it sees less than the whole leaf."""
        return any(isinstance(move, Slice | Steps) for move in self.moves)

    def read(self, leaf: jax.Array) -> jax.Array:
        """The part of the leaf, of the view's shape and the leaf's dtype."""
        return _read_moves(leaf, self._starts, form=self._form)

    def write(self, leaf: jax.Array, part: jax.Array, *, donate: bool) -> jax.Array:
        """The leaf with another part in place; `donate` reuses the leaf's memory."""
        # Only a slice is written into the leaf's memory; else the part replaces it.
        program = _write_in_place if donate and self.sliced else _write
        return program(leaf, part, self._starts, form=self._form)

    @property
    def _starts(self) -> list[tuple[int, ...]]:
        return [move.starts for move in self.moves if isinstance(move, Slice)]

    @property
    def _form(self) -> tuple[Move, ...]:
        """The moves without where slices start: equal for the layers of a stack."""
        return tuple(
            Slice((), move.sizes) if isinstance(move, Slice) else move
            for move in self.moves
        )

    def slice(self, starts: Sequence[int], sizes: Sequence[int]) -> "WeightView":
        """The view of a box of what is seen."""
        if tuple(sizes) == self.shape:
            return self
        return dataclasses.replace(
            self,
            shape=tuple(sizes),
            moves=(*self.moves, Slice(tuple(starts), tuple(sizes))),
            box=self._narrowed(starts, sizes),
        )

    def in_steps(self, steps: Sequence[int]) -> "WeightView":
        """The view of every n-th element along each axis."""
        shape = tuple(-(-n // step) for n, step in zip(self.shape, steps, strict=True))
        if shape == self.shape:
            return self
        box = list(self.box or ())  # emptied where what is seen is no box any more
        for axis, step in enumerate(steps):
            if step == 1:
                continue
            leaf_axes = self.axes[axis]
            if box and len(leaf_axes) == 1 and self._is_alone(leaf_axes[0]):
                box[leaf_axes[0]] = box[leaf_axes[0]][::step]
            else:
                box = []
        return dataclasses.replace(
            self,
            shape=shape,
            moves=(*self.moves, Steps(tuple(steps))),
            box=tuple(box) or None,
        )

    def reshape(self, shape: Sequence[int]) -> "WeightView":
        """The view in another shape."""
        shape = tuple(shape)
        if shape == self.shape:
            return self
        move = Reshape(self.shape, shape)
        return dataclasses.replace(
            self, shape=shape, moves=(*self.moves, move), axes=self._regrouped(shape)
        )

    def transpose(self, order: Sequence[int]) -> "WeightView":
        """The view with the axes in another order."""
        if tuple(order) == tuple(range(len(self.shape))):
            return self
        return dataclasses.replace(
            self,
            shape=tuple(self.shape[axis] for axis in order),
            moves=(*self.moves, Transpose(tuple(order))),
            axes=tuple(self.axes[axis] for axis in order),
        )

    def reverse(self, axes: Sequence[int]) -> "WeightView":
        """The view last first along some axes."""
        return dataclasses.replace(self, moves=(*self.moves, Reverse(tuple(axes))))

    def matrix(self, batch: int, inputs: int) -> "WeightView":
        """The view as (batch, in, out): so many axes each, out the rest."""
        ends = [0, batch, batch + inputs, len(self.shape)]
        parts = [slice(a, b) for a, b in itertools.pairwise(ends)]
        matrix = self.reshape([math.prod(self.shape[part]) for part in parts])
        # A reshape groups axes by size only, and these are known to be apart.
        axes = tuple(
            tuple(sorted({axis for leaf_axes in self.axes[part] for axis in leaf_axes}))
            for part in parts
        )
        return dataclasses.replace(matrix, axes=axes)

    def _is_alone(self, axis: int) -> bool:
        """Whether one axis alone is made of a leaf axis, and none is reversed."""
        turned = any(isinstance(move, Reverse) for move in self.moves)
        return not turned and sum(axis in leaf_axes for leaf_axes in self.axes) == 1

    def _narrowed(self, starts: Sequence[int], sizes: Sequence[int]) -> Any:
        """The box of the leaf after a slice of what is seen, where it is one."""
        box = list(self.box or ())
        for axis, (start, size) in enumerate(zip(starts, sizes, strict=True)):
            if size == self.shape[axis]:
                continue
            leaf_axes = self.axes[axis]
            # Part of a box only along an axis that is one whole axis of the leaf.
            if not box or len(leaf_axes) != 1 or not self._is_alone(leaf_axes[0]):
                return None
            if len(box[leaf_axes[0]]) != self.shape[axis]:
                return None
            box[leaf_axes[0]] = box[leaf_axes[0]][start : start + size]
        return tuple(box) or None

    def _regrouped(self, shape: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        """The leaf's axes behind each axis after a reshape.

        Axes of both sides are taken until their sizes agree; each axis of such a group
        is made of all the leaf's axes in it. Axes of length one are made of none.
        (4, 6) as (2, 2, 6): the first group is {4} and {2, 2}, so both new axes are
        made of axis 0. (4, 6) as (8, 3): nothing agrees before {4, 6} and {8, 3}.
        """
        if 0 in shape:  # no element says which axis it lies on
            all_axes = {axis for leaf_axes in self.axes for axis in leaf_axes}
            return (tuple(sorted(all_axes)),) * len(shape)
        before = [(s, self.axes[i]) for i, s in enumerate(self.shape) if s != 1]
        after = [(axis, size) for axis, size in enumerate(shape) if size != 1]
        made: dict[int, tuple[int, ...]] = {}
        while before and after:
            # One group: the side with the smaller size so far takes its next axis.
            # Both sides end at the same size, so that neither runs out of axes.
            old, new = [before.pop(0)], [after.pop(0)]
            while (size_before := math.prod(s for s, _ in old)) != (
                size_after := math.prod(s for _, s in new)
            ):
                if size_before < size_after:
                    old.append(before.pop(0))
                else:
                    new.append(after.pop(0))
            behind = tuple(sorted({axis for _, axes in old for axis in axes}))
            made.update((axis, behind) for axis, _ in new)
        return tuple(made.get(axis, ()) for axis in range(len(shape)))


def _are_disjoint(first: Move, second: Move) -> bool:
    """Whether two moves of the same array are boxes without a common element."""
    if not (isinstance(first, Slice) and isinstance(second, Slice)):
        return False
    pairs = zip(first.starts, first.sizes, second.starts, second.sizes, strict=True)
    return any(a + n <= b or b + m <= a for a, n, b, m in pairs)


def _with_starts(form: Sequence[Move], starts: Sequence[Any]) -> Iterator[Move]:
    """The moves of a form, each slice with the place where it starts."""
    pending = iter(starts)
    for move in form:
        yield Slice(next(pending), move.sizes) if isinstance(move, Slice) else move


# Where slices start is traced, so that the layers of a stack share one program.
@functools.partial(jax.jit, static_argnames="form")
def _read_moves(leaf: jax.Array, starts: Any, *, form: Any) -> jax.Array:
    for move in _with_starts(form, starts):
        leaf = move.read(leaf)
    return leaf


def _write_moves(
    leaf: jax.Array, part: jax.Array, starts: Any, *, form: Any
) -> jax.Array:
    moves = list(_with_starts(form, starts))
    # What each move was made of: a slice is written back into it.
    part, arrays = part.astype(leaf.dtype), [leaf]
    for move in moves[:-1]:
        arrays.append(move.read(arrays[-1]))
    # A leaf that is not moved has no moves, and one array.
    for move, array in reversed(list(zip(moves, arrays, strict=False))):
        part = move.write(array, part)
    return part


_write = jax.jit(_write_moves, static_argnames="form")
_write_in_place = jax.jit(_write_moves, static_argnames="form", donate_argnums=0)
