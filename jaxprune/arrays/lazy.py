"""Leaves that stay in their file until they are needed.

A pytree of `LazyArray` leaves stands for a model that is larger than memory:
`jp.prune_trained` reads each leaf when its layer's turn comes, and lets it go after.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class LazyArray:
    """An array in a file, or elsewhere, that is read when it is needed.

    Attributes:
      shape: its shape.
      dtype: its dtype.
      read: gives a new array of the same values each time, on the devices where it
        shall be. Whoever reads the array may give it up.
      sharding: how it will lie there; None where there is one device only.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], jax.Array]
    sharding: jax.sharding.Sharding | None = None

    @property
    def ndim(self) -> int:
        """How many axes it has."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """How many elements it has."""
        return math.prod(self.shape)


def array(leaf: Any) -> Any:
    """The leaf itself, read where it is stored."""
    return leaf.read() if isinstance(leaf, LazyArray) else leaf


def loaded(tree: Any) -> Any:
    """A tree with arrays in the place of `LazyArray` leaves, all read to memory."""
    return jax.tree.map(array, tree)


def abstract(tree: Any) -> Any:
    """A tree with a shape for each `LazyArray`, for a function to trace."""

    def one(leaf: Any) -> Any:
        if not isinstance(leaf, LazyArray):
            return leaf
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)

    return jax.tree.map(one, tree)


class Leaves:
    """Leaves by position; those that are stored are in memory from use to `forget`."""

    def __init__(self, leaves: Iterable[Any]) -> None:
        """Holds the leaves, arrays and `LazyArray` ones."""
        self.all = list(leaves)
        self._read: dict[int, jax.Array] = {}

    @property
    def device(self) -> jax.Device | None:
        """The one device that all leaves are on; None where there are several."""
        shardings = [getattr(leaf, "sharding", None) for leaf in self.all]
        # NumPy's leaves, and lazy ones without a sharding, say nothing.
        devices = set().union(*(s.device_set for s in shardings if s))
        return devices.pop() if len(devices) == 1 else None

    def __getitem__(self, i: int) -> Any:
        """The array of a leaf, read if need be."""
        leaf = self.all[i]
        if not isinstance(leaf, LazyArray):
            return leaf
        if i not in self._read:
            self._read[i] = leaf.read()
        return self._read[i]

    def __setitem__(self, i: int, leaf: Any) -> None:
        """Replaces a leaf."""
        self.all[i] = leaf
        self.forget(i)

    def forget(self, i: int) -> None:
        """Lets go of what was read of a leaf; the next use reads it again."""
        self._read.pop(i, None)
