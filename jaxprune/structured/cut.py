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
from jaxprune.graph.axis_dims import Dim, kept_positions
from jaxprune.graph.axis_groups import AxisGroups
from jaxprune.graph.axis_trace import LeafAxes

# How many parts a leaf may add behind its parameter's name: the fields of a container
# that stands for one array, as `codes` of a quantised one.
_BEHIND = 2


@dataclasses.dataclass(frozen=True, eq=False)
class LeafCut:
    """What is kept of one leaf.

    Attributes:
      before: shape of the leaf.
      after: shape of the leaf once it is cut.
      stacked: the axis along which it is stacked, each index with its own positions;
        None where it is not.
      kept: positions that are kept of each axis, None for all, for each index along
        the stacked axis (one where there is none).
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
            read = leaf.read
            return lazy.LazyArray(self.after, leaf.dtype, lambda: self.take(read()))
        sharding = None if isinstance(leaf, jax.core.Tracer) else _sharding(leaf)
        if sharding is None:
            return self._cut(leaf)
        # Each device ends with a part of what is kept, as it had of the whole.
        smaller = placement.automatic(self._cut_in_place, leaf)
        return jax.device_put(smaller, self._split(sharding))

    def _cut(self, leaf: Any) -> Any:
        xp: Any = np if isinstance(leaf, np.ndarray) else jnp
        if self.stacked is None:
            return _take_positions(xp, leaf, self.kept[0])
        layers = []
        for i, positions in enumerate(self.kept):
            # The stacked axis stays, of length one, so that axes keep their numbers.
            layer = xp.expand_dims(xp.take(leaf, i, self.stacked), self.stacked)
            layers.append(_take_positions(xp, layer, positions))
        return xp.concatenate(layers, self.stacked)

    def _cut_in_place(self, leaf: jax.Array) -> jax.Array:
        sharding = self._split(leaf.sharding)  # type: ignore[arg-type]
        smaller: jax.Array = jax.jit(self._cut, out_shardings=sharding)(leaf)
        return smaller

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
    sharding = getattr(leaf, "sharding", None)
    return sharding if isinstance(sharding, NamedSharding) else None


def _take_positions(xp: Any, leaf: Any, kept: Sequence[np.ndarray | None]) -> Any:
    """A leaf at the positions that each axis keeps, with NumPy or jax.numpy."""
    for axis, positions in enumerate(kept):
        if positions is not None:
            leaf = xp.take(leaf, positions, axis)
    return leaf


def of_groups(groups: AxisGroups, kept: Mapping[str, np.ndarray]) -> dict[str, LeafCut]:
    """What is kept of each leaf, by the units that are kept of each group.

    Args:
      groups: axis groups of the function.
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
    uneven = listed(name for name, leaf_cut in cuts.items() if leaf_cut is None)
    if uneven:
        raise ValueError(
            "a leaf that is stacked over layers must keep as many units in each, but "
            f"{uneven} would not; remove as many of each layer, and none where "
            "jp.axis_groups says of a layer that it can lose none"
        )
    return {name: leaf_cut for name, leaf_cut in cuts.items() if leaf_cut is not None}


def _leaf_cut(leaf: LeafAxes, masks: Mapping[Dim, np.ndarray]) -> LeafCut | None:
    """The cut of a leaf; None where the layers of a stack would differ in size."""
    kept = []
    for dims in leaf.parts:
        axis_masks = [kept_positions(dim, masks) for dim in dims]
        kept.append(tuple(None if m.all() else np.flatnonzero(m) for m in axis_masks))
    # Layers of a stack may keep other units, but as many.
    sizes = {
        tuple(
            dim.size if positions is None else len(positions)
            for dim, positions in zip(dims, kept_of_layer, strict=True)
        )
        for dims, kept_of_layer in zip(leaf.parts, kept, strict=True)
    }
    if len(sizes) != 1:
        return None
    after = list(sizes.pop())
    if leaf.stacked is not None:  # of length one in the dimensions of a layer
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
    leaves, misshapen, strange, any_known = [], [], [], False
    for name, leaf in tree.pairs(tree_, lambda node: False):
        known, shape = _cut_of_path(name, cuts), jnp.shape(leaf)
        leaves.append(leaf)
        any_known |= known is not None
        if known is None and len(shape) > 1 and tree.is_floating(leaf):
            strange.append(name)
        if known is None or known.before == known.after or math.prod(shape) <= 1:
            continue  # a counter, or the one scale of a leaf, has no units
        if shape == known.before:
            leaves[-1] = known.take(leaf)
        else:
            misshapen.append(f"{name!r} ({shape} for {known.before})")
    if strange and not any_known:
        raise ValueError(
            f"a tree to cut must hold leaves of the parameters ({listed(cuts)}), but "
            f"holds {listed(strange)}; cut the state of the same "
            "tree, or shrink a function of the parameters that the state is of"
        )
    if misshapen:
        raise ValueError(
            "a tree to cut must have the shapes of the parameters before shrinking, "
            f"but differs at {', '.join(misshapen[:6])}; make it anew for the smaller "
            "parameters"
        )
    return jax.tree.unflatten(jax.tree.structure(tree_), leaves)


def _cut_of_path(name: str, cuts: Mapping[str, LeafCut]) -> LeafCut | None:
    """The cut of the parameter that a path belongs to, or None.

    The path ends in the parameter's name, or in the name and at most `_BEHIND` more
    parts; the fewest more parts count first, then the longest name.
    """
    parts = name.split("/")
    for behind in range(min(_BEHIND, len(parts) - 1) + 1):
        path = parts[: len(parts) - behind]
        for start in range(len(path)):
            if (known := cuts.get("/".join(path[start:]))) is not None:
                return known
    return cuts.get("")  # an array by itself has no name
