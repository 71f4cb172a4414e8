"""Which positions of each leaf's axes are kept, and any tree cut to them.

Parameters, optimizer states, masks and scores are cut alike: a leaf belongs to the
parameter whose name its own path ends in.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxprune.arrays import lazy, placement, tree
from jaxprune.arrays.messages import listed
from jaxprune.graph.axis_dims import Dim, mask
from jaxprune.graph.axis_groups import AxisGroups
from jaxprune.graph.axis_trace import LeafAxes

# How many parts a leaf may add behind its parameter's name: the fields of a container
# that stands for one array, as `codes` of a quantised one.
_BEHIND = 2


@dataclasses.dataclass(frozen=True, eq=False)
class LeafCut:
    """What is kept of one leaf.

    Attributes:
      before: its shape.
      after: its shape once it is cut.
      stacked: the axis along which it is stacked, each index with its own positions;
        None where it is not.
      kept: for each index along that axis (one where there is none), for each axis the
        positions that are kept, None for all.
    """

    before: tuple[int, ...]
    after: tuple[int, ...]
    stacked: int | None
    kept: tuple[tuple[np.ndarray | None, ...], ...]

    def take(self, leaf: Any) -> Any:
        """The leaf, an array, a lazy one or an abstract one, cut."""
        if self.before == self.after:
            return leaf
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(self.after, leaf.dtype)
        if isinstance(leaf, lazy.LazyArray):
            whole = leaf.read
            return lazy.LazyArray(self.after, leaf.dtype, lambda: self.take(whole()))
        sharding = None if isinstance(leaf, jax.core.Tracer) else _sharding(leaf)
        if sharding is None:
            return self._cut(leaf)
        # Each device ends with a part of what is kept, as it had of the whole.
        cut = placement.automatic(self._cut_in_place, leaf)
        return jax.device_put(cut, self._split(sharding))

    def _cut(self, leaf: Any) -> Any:
        xp: Any = np if isinstance(leaf, np.ndarray) else jnp
        if self.stacked is None:
            return _taken(xp, leaf, self.kept[0])
        parts = [
            _taken(xp, xp.expand_dims(xp.take(leaf, i, self.stacked), self.stacked), of)
            for i, of in enumerate(self.kept)
        ]
        return xp.concatenate(parts, self.stacked)

    def _cut_in_place(self, leaf: jax.Array) -> jax.Array:
        where = self._split(leaf.sharding)  # type: ignore[arg-type]
        found: jax.Array = jax.jit(self._cut, out_shardings=where)(leaf)
        return found

    def _split(self, sharding: NamedSharding) -> NamedSharding:
        """The sharding of what is kept: as before on axes that still come out even."""
        missing = len(self.after) - len(sharding.spec)
        spec = (*sharding.spec, *[None] * missing)
        even = [
            entry if size % placement.shards(sharding.mesh, entry) == 0 else None
            for entry, size in zip(spec, self.after, strict=True)
        ]
        return NamedSharding(sharding.mesh, PartitionSpec(*even))


def _sharding(leaf: Any) -> NamedSharding | None:
    found = getattr(leaf, "sharding", None)
    return found if isinstance(found, NamedSharding) else None


def _taken(xp: Any, leaf: Any, kept: Sequence[np.ndarray | None]) -> Any:
    for axis, positions in enumerate(kept):
        if positions is not None:
            leaf = xp.take(leaf, positions, axis)
    return leaf


def of_groups(groups: AxisGroups, kept: Mapping[str, np.ndarray]) -> dict[str, LeafCut]:
    """What is kept of each leaf, by the units that are kept of each group.

    Args:
      groups: of the function.
      kept: group name to the units that are kept, ascending; others keep all.

    Returns:
      Leaf name to its cut, for every leaf.

    Raises:
      ValueError: the layers of a stacked leaf would keep different numbers of units.
    """
    masks: dict[Dim, np.ndarray] = {}
    for group in groups:
        if group.name in kept:
            masks[group.dim] = np.isin(np.arange(group.units), kept[group.name])
    cuts = {leaf.name: _leaf_cut(leaf, masks) for leaf in groups.trace.leaves}
    if uneven := [name for name, cut in cuts.items() if cut is None]:
        raise ValueError(
            "a leaf that is stacked over layers must keep as many units in each, but "
            f"{listed(uneven)} would not; remove as many of each layer, and none where "
            "jp.axis_groups says of a layer that it can lose none"
        )
    return {name: cut for name, cut in cuts.items() if cut is not None}


def _leaf_cut(leaf: LeafAxes, masks: Mapping[Dim, np.ndarray]) -> LeafCut | None:
    kept = []
    for dims in leaf.parts:
        whole = [mask(dim, masks) for dim in dims]
        kept.append(tuple(None if m.all() else np.flatnonzero(m) for m in whole))
    sizes = {
        tuple(
            dim.size if own is None else len(own)
            for dim, own in zip(dims, of, strict=True)
        )
        for dims, of in zip(leaf.parts, kept, strict=True)
    }
    if len(sizes) != 1:
        return None
    after = list(sizes.pop())
    if leaf.stacked is not None:
        after[leaf.stacked] = leaf.shape[leaf.stacked]
    return LeafCut(leaf.shape, tuple(after), leaf.stacked, tuple(kept))


def params(tree_: Any, cuts: Mapping[str, LeafCut]) -> Any:
    """A tree with the parameters' own names, cut; lazy leaves stay so."""
    leaves = [
        cuts[name].take(leaf) for name, leaf in tree.pairs(tree_, lambda node: False)
    ]
    return jax.tree.unflatten(jax.tree.structure(tree_), leaves)


def any_tree(tree_: Any, cuts: Mapping[str, LeafCut]) -> Any:
    """A tree whose leaves belong to parameters by the ends of their paths, cut.

    Args:
      tree_: an optimizer state, masks, scores, averages; leaves that belong to no
        parameter, or hold one number, stay as they are.
      cuts: leaf name to its cut.

    Returns:
      The tree with smaller arrays.

    Raises:
      ValueError: a leaf belongs to a parameter that is cut, and has another shape, or
        none of its matrices belongs to any parameter.
    """
    leaves, wrong, strange, owned = [], [], [], False
    for name, leaf in tree.pairs(tree_, lambda node: False):
        known, shape = _owner(name, cuts), jnp.shape(leaf)
        leaves.append(leaf)
        owned |= known is not None
        if known is None and len(shape) > 1 and tree.is_floating(leaf):
            strange.append(name)
        if known is None or known.before == known.after or math.prod(shape) <= 1:
            continue
        if shape == known.before:
            leaves[-1] = known.take(leaf)
        else:
            wrong.append(f"{name!r} ({shape} for {known.before})")
    if strange and not owned:
        raise ValueError(
            f"what is cut must hold leaves of the parameters ({listed(cuts)}), but its "
            f"own are {listed(strange)}; cut the state of the same tree, or shrink a "
            "function of the parameters that the state is of"
        )
    if wrong:
        raise ValueError(
            "what is cut must have the shapes of the parameters before they were, but "
            f"differs at {', '.join(wrong[:6])}; make it anew for the smaller ones"
        )
    return jax.tree.unflatten(jax.tree.structure(tree_), leaves)


def _owner(name: str, cuts: Mapping[str, LeafCut]) -> LeafCut | None:
    """The cut of the parameter that a path belongs to, or None.

    The path ends in the parameter's name, or in the name and at most `_BEHIND` more
    parts; the fewest more parts count first, then the longest name.
    """
    parts = name.split("/")
    for behind in range(min(_BEHIND, len(parts) - 1) + 1):
        path = parts[: len(parts) - behind]
        for start in range(len(path)):
            if (found := cuts.get("/".join(path[start:]))) is not None:
                return found
    return cuts.get("")  # an array by itself has no name
