"""Any leaf seen as a batch of matrices (batch, in, out), and back.

Flax kernels are [in, out], so that is the default; further leading axes are a stack of
such matrices (a scan over layers, experts). A leaf of four axes or more is taken for a
convolution's [..., in, out], whose window belongs to the input. Flax's attention, known
by its names and shapes, has (in, heads, size), and (heads, size, out) on the way out.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped

from jaxprune.arrays import tree
from jaxprune.arrays.messages import one_line, refuse_fractions


@dataclasses.dataclass(frozen=True)
class Axes:
    """Which axes of a leaf are its input and its output; the others are the batch.

    Attributes:
      inputs: axes that the product sums over, negative numbers count from the end.
      outputs: axes that index the result.

    Example:
      >>> import jaxprune as jp
      >>> jp.Axes(inputs=(-1,), outputs=(-2,))  # torch and Equinox: [out, in]
      Axes(inputs=(-1,), outputs=(-2,))
    """

    inputs: tuple[int, ...] = (-2,)
    outputs: tuple[int, ...] = (-1,)

    def __post_init__(self) -> None:
        """Takes one axis as its number, and several in any sequence."""
        for name in ("inputs", "outputs"):
            numbers = getattr(self, name)
            numbers = tuple(numbers) if isinstance(numbers, Sequence) else (numbers,)
            for axis in numbers:
                refuse_fractions("Axes", **{name: axis})
            object.__setattr__(self, name, numbers)

    def order(self, ndim: int) -> tuple[int, ...]:
        """All axes, batch first, then inputs, then outputs; raises any `problem`."""
        if problem := self.problem(ndim):
            raise ValueError(problem)
        matrix = [axis % ndim for axis in (*self.inputs, *self.outputs)]
        return (*(axis for axis in range(ndim) if axis not in matrix), *matrix)

    def problem(self, ndim: int) -> str | None:
        """Why a leaf of so many axes cannot be seen this way, or None if it can."""
        named = [*self.inputs, *self.outputs]
        if len({axis % ndim for axis in named if -ndim <= axis < ndim}) == len(named):
            return None
        return (
            f"{self} must name different axes of a leaf of {ndim} axes, or give "
            "axes={glob: Axes(inputs=..., outputs=...)}"
        )

    def stack(self, shape: tuple[int, ...]) -> tuple[int, ...] | None:
        """How many matrices a leaf stacks along its first axes; None along others."""
        batch = self.order(len(shape))[: len(shape) - len(self.inputs + self.outputs)]
        return shape[: len(batch)] if batch == tuple(range(len(batch))) else None

    def matrix(self, leaf: Shaped[Array, "..."]) -> Shaped[Array, "batch in out"]:
        """The leaf as (batch, in, out), each of the three possibly of size 1."""
        moved = jnp.transpose(leaf, self.order(leaf.ndim))
        return moved.reshape(self.matrix_shape(leaf.shape))  # (batch, in, out)

    def matrix_shape(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        """The shape of the `matrix` of a leaf, without an array."""
        moved = [shape[axis] for axis in self.order(len(shape))]
        batch = len(shape) - len(self.inputs) - len(self.outputs)
        inputs = batch + len(self.inputs)
        parts = moved[:batch], moved[batch:inputs], moved[inputs:]
        return tuple(map(math.prod, parts))  # type: ignore[return-value]

    def restore(
        self, matrix: Shaped[Array, "..."], shape: tuple[int, ...]
    ) -> Shaped[Array, "*shape"]:
        """The leaf of this shape whose `matrix` is given."""
        order = self.order(len(shape))
        moved = matrix.reshape([shape[axis] for axis in order])
        return jnp.transpose(moved, sorted(range(len(order)), key=order.__getitem__))


def default_axes(leaf: jax.Array) -> Axes:
    """The axes of a leaf of which nothing else is known: Flax's [..., in, out]."""
    # Four axes are a convolution's: its window is part of the input.
    return Axes(tuple(range(-leaf.ndim, -1))) if leaf.ndim >= 4 else Axes()


def check_axes(axes: Any) -> None:
    """Refuses what is neither `Axes`, nor a mapping to `Axes`, nor None."""
    entries = list(axes.values()) if isinstance(axes, Mapping) else [axes]
    if axes is not None and not all(isinstance(entry, Axes) for entry in entries):
        raise TypeError(
            f"axes must be jp.Axes(inputs=..., outputs=...) or {{glob: jp.Axes(...)}}, "
            f"got {one_line(repr(axes))}"
        )


def resolve_axes(
    axes: Axes | Mapping[str, Axes] | None,
    names: Sequence[str],
    leaves: Sequence[jax.Array],
) -> list[Axes]:
    """One `Axes` a leaf: that of all, of the first glob that matches, or default."""
    check_axes(axes)
    if isinstance(axes, Axes):
        return [axes] * len(leaves)
    ruled = tree.by_rule(axes or {}, names, None, "axes")
    heads = _of_heads(dict(zip(names, leaves, strict=True)))
    return [
        rule or heads.get(name) or default_axes(leaf)
        for rule, name, leaf in zip(ruled, names, leaves, strict=True)
    ]


def _of_heads(named: Mapping[str, jax.Array]) -> dict[str, Axes]:
    """The axes of Flax's attention: (in, heads, size) and, out of it, the reverse.

    A kernel by itself could be a stack of matrices; query and output together say that
    it is none, since one has the axes of the other, turned.
    """
    axes: dict[str, Axes] = {}
    for name, query in named.items():
        match = re.fullmatch(r"(.*/)?query/kernel", name)
        parent = (match[1] or "") if match else ""
        out = named.get(f"{parent}out/kernel")
        if match is None or out is None or query.ndim < 3:
            continue
        *stack, _, heads, size = query.shape  # (..., in, heads, size)
        if out.shape[:-1] == (*stack, heads, size):  # (..., heads, size, out)
            into = [f"{parent}{part}/kernel" for part in ("query", "key", "value")]
            # Keys may have fewer heads than queries, and still the same axes.
            into = [n for n in into if n in named and named[n].ndim == query.ndim]
            axes |= dict.fromkeys(into, Axes((-3,), (-2, -1)))
            axes[f"{parent}out/kernel"] = Axes((-3, -2), (-1,))
    return axes
