"""The parameters while their weights are replaced: who owns a leaf, and where it lies.

A caller's array is left alone unless it is given up; what was made here is overwritten.
A lazy leaf is let go after its last use, and read again from its file and the log.
"""

import ctypes
import dataclasses
import functools
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jaxprune.arrays import placement
from jaxprune.arrays.lazy import LazyArray
from jaxprune.arrays.per_device import put
from jaxprune.graph.weight_view import WeightView
from jaxprune.posttraining.pipeline.segmented_program import SegmentedProgram
from jaxprune.posttraining.progress import ProgressLog


class _Logged(NamedTuple):
    """A part of a leaf that the log holds: the entry, and its name there."""

    view: WeightView
    entry: str
    name: str


class WeightStore:
    """A program's leaves, whose weights are replaced one after the other."""

    def __init__(
        self,
        program: SegmentedProgram,
        log: ProgressLog | None = None,
        *,
        donate: bool = False,
    ) -> None:
        """Takes over a program's leaves.

        Args:
          program: the program; its leaves are replaced.
          log: log that the new weights are written to, or None.
          donate: whether the caller's leaves are given up once they are replaced.
        """
        self._program, self._log, self._donate = program, log, donate
        leaves = enumerate(program.leaves.all)
        self._lazy = {i: leaf for i, leaf in leaves if isinstance(leaf, LazyArray)}
        self._owned = set(self._lazy)  # leaves that are no array of the caller's
        # Position of a leaf to what of it the log holds, in the order of writing.
        self._logged: dict[int, list[_Logged]] = {}

    def read(self, view: WeightView) -> jax.Array:
        """A weight as it is by now, (batch, in, out)."""
        return placement.automatic(view.read, self._program.leaves[view.leaf])

    def replace(self, view: WeightView, weight: Any) -> None:
        """Puts a new weight in its place in the leaf.

        Args:
          view: the part of the leaf.
          weight: the new weight, (batch, in, out) or of the view's shape.
        """
        i = view.leaf
        leaf = self._program.leaves[i]
        spare = self._donate or i in self._owned
        self._program.leaves[i] = _replaced(view, leaf, weight, donate=spare)
        if self._donate and isinstance(leaf, jax.Array) and not leaf.is_deleted():
            leaf.delete()
        self._owned.add(i)

    def note_logged(self, view: WeightView, entry: str, name: str) -> None:
        """Says that the log holds a part of a leaf, under a name in an entry."""
        if self._log:
            parts = self._logged.setdefault(view.leaf, [])
            parts.append(_Logged(view, entry, name))

    def release(self, number: int) -> None:
        """Frees the lazy leaves whose last use is in a segment.

        With a log a pruned one is lazy again: read from its file, its weights from the
        log.
        """
        self._program.release(number)
        for i in self._program.last_used_in(number):
            home, parts = self._lazy.get(i), self._logged.get(i)
            if home and parts and self._log:
                read = functools.partial(_read_back, home, self._log, parts)
                self._program.leaves[i] = dataclasses.replace(home, read=read)
        _trim()


def _replaced(view: WeightView, leaf: Any, weight: Any, *, donate: bool) -> jax.Array:
    """The leaf with a new weight in the place of a view, and with its old sharding."""
    write = functools.partial(view.write, donate=donate)
    sharding = getattr(leaf, "sharding", None)
    if sharding is not None and not sharding.is_fully_addressable:
        # With other processes' devices nothing of one process alone may be combined.
        weight = put(weight, NamedSharding(sharding.mesh, PartitionSpec()))
    elif sharding is not None and len(sharding.device_set) == 1:
        weight = jax.device_put(weight, sharding)  # it may lie on all devices of a mesh
    new = placement.automatic(write, leaf, jnp.asarray(weight))
    return jax.device_put(new, sharding)


def _read_back(
    home: LazyArray, log: ProgressLog, parts: Sequence[_Logged]
) -> jax.Array:
    """A lazy leaf with its new weights, from the log."""
    leaf = home.read()
    for part in parts:
        weight = log.array(part.entry, part.name)
        leaf = _replaced(part.view, leaf, weight, donate=True)
    return leaf


def _trim() -> None:
    """Gives freed pages back to the system.

    glibc keeps the freed pages of each thread for later: 100 MB and more over a model
    whose layers are read one by one, which would count as memory that pruning needs.
    Other systems' allocators give them back by themselves, and have no such call.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:  # musl has none
            trim(0)
