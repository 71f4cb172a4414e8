"""What `jp.shrink` returns in the place of the original function."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxprune.arrays import lazy
from jaxprune.arrays.messages import listed
from jaxprune.graph.axis_dims import Dim, atoms, kept_positions, root, sum_by_unit
from jaxprune.graph.axis_groups import AxisGroups
from jaxprune.graph.axis_trace import UNUSED, AxisTrace, LeafAxes, trace_axes
from jaxprune.structured import cut
from jaxprune.structured.cut import LeafCut
from jaxprune.structured.resized import Resized
from jaxprune.typing import Params


class ShrunkFunction:
    """A function of smaller parameters and a batch, from `jp.shrink`.

    For each shape of a batch the original is traced once more, abstractly.

    Attributes:
      groups: axis groups of the original.
      cuts: what is kept of each leaf, by its name.
    """

    def __init__(
        self,
        fn: Callable[[Params, Any], Any],
        params: Params,
        batch: Any,
        groups: AxisGroups,
        cuts: dict[str, LeafCut],
    ) -> None:
        """Keeps the function, the shapes of its parameters and what is kept of them."""
        self._fn = fn
        self.groups = groups
        self.cuts: Mapping[str, LeafCut] = cuts
        self._names = [leaf.name for leaf in groups.trace.leaves]
        self._structure: Any = jax.tree.structure(params)
        leaves = jax.tree.leaves(lazy.abstract(params))
        first = self._key(leaves, batch)
        # The program for each shape of a batch; the first is the one shrunk with.
        self._known = {first: Resized(groups.trace, atom_masks(groups.trace, cuts))}

    @property
    def resized(self) -> Resized:
        """The program for the batch that the model was shrunk with."""
        return next(iter(self._known.values()))

    def __call__(self, params: Params, batch: Any) -> Any:
        """What the original gives where all weights of the removed units are zero.

        Args:
          params: smaller parameters, of the structure that `jp.shrink` returned.
          batch: one batch, of any shape that the original takes.

        Raises:
          ValueError: the parameters have other shapes.
        """
        leaves, structure = jax.tree.flatten(params)
        if structure != self._structure:
            raise ValueError(
                "a shrunk function needs parameters in the containers that shrink "
                f"returned, got {structure} for {self._structure}"
            )
        self._check_shapes(leaves)
        key = self._key(leaves, batch)
        if key not in self._known:
            self._known[key] = self._traced(leaves, batch)
        return self._known[key].run(leaves, jax.tree.leaves(batch))

    def cut(self, state: Any) -> Any:
        """A tree of arrays beside the parameters, cut as they were."""
        return cut.any_tree(state, self.cuts)

    def _key(self, params: Sequence[Any], batch: Any) -> Any:
        leaves, structure = jax.tree.flatten(batch)
        # A Python number is weakly typed, and makes another program.
        avals = [(x.shape, str(x.dtype), x.weak_type) for x in map(jax.typeof, leaves)]
        dtypes = [(str(x.dtype), x.weak_type) for x in map(jax.typeof, params)]
        return structure, tuple(avals), tuple(dtypes)

    def _check_shapes(self, leaves: Sequence[Any]) -> None:
        misshapen = [
            f"{name!r} ({np.shape(leaf)} for {self.cuts[name].after})"
            for name, leaf in zip(self._names, leaves, strict=True)
            if np.shape(leaf) != self.cuts[name].after
        ]
        if misshapen:
            raise ValueError(
                "a shrunk function needs the smaller parameters, but shapes differ at "
                f"{', '.join(misshapen[:6])}; give ShrinkResult.params, or cut() others"
            )

    def _traced(self, leaves: Sequence[Any], batch: Any) -> Resized:
        """The program for a batch of another shape or parameters of another dtype."""
        dense = [
            jax.ShapeDtypeStruct(
                self.cuts[name].before, aval.dtype, weak_type=aval.weak_type
            )
            for name, aval in zip(self._names, map(jax.typeof, leaves), strict=True)
        ]
        # Abstract, since only shapes and dtypes tell the programs apart.
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(
                np.shape(x), jax.typeof(x).dtype, weak_type=jax.typeof(x).weak_type
            ),
            batch,
        )
        params = jax.tree.unflatten(self._structure, dense)
        try:
            trace = trace_axes(self._fn, params, shapes)
        except jax.errors.InconclusiveDimensionOperation as error:
            raise ValueError(
                "the symbolic sizes of a batch must be told apart where the function "
                f"reshapes it, but {str(error).splitlines()[0]} Give constraints to "
                "jax.export.symbolic_shape, or sizes as numbers"
            ) from error
        return Resized(trace, atom_masks(trace, self.cuts))


def atom_masks(trace: AxisTrace, cuts: Mapping[str, LeafCut]) -> dict[Dim, np.ndarray]:
    """The units of each atom that are left, by the positions of the leaves."""
    masks: dict[Dim, np.ndarray] = {}
    for _, dim, positions in _axis_masks(trace, cuts):
        for atom in atoms(dim):
            if atom.size > 1:
                # A unit stays where any of its positions does.
                mask = sum_by_unit(dim, positions.astype(np.int64), atom) > 0
                masks[atom] = masks.get(atom, mask) & mask
    # With another batch the axes may be divided otherwise, and units that this trace
    # ties together may have been removed apart.
    differing = {
        leaf.name: None
        for leaf, dim, positions in _axis_masks(trace, cuts)
        if not np.array_equal(kept_positions(dim, masks), positions)
    }
    # A leaf that this batch does not need may have any size.
    reasons = [atom.why for atom, mask in masks.items() if not mask.all()]
    frozen = [why for why in reasons if why and why != UNUSED]
    if others := [*differing, *list(frozen)[:1]]:
        raise ValueError(
            "a shrunk function must remove the same units for every batch, but with a "
            f"batch of this shape {listed(others)} would keep others; call jp.shrink "
            "with such a batch"
        )
    return {atom: mask for atom, mask in masks.items() if not mask.all()}


def _axis_masks(trace: AxisTrace, cuts: Mapping[str, LeafCut]) -> list[Any]:
    """Every axis of every leaf: the leaf, the dimension, which positions are kept."""
    rows: list[tuple[LeafAxes, Dim, np.ndarray]] = []
    for leaf in trace.leaves:
        known = cuts[leaf.name]
        for i in range(max(len(leaf.parts), len(known.kept))):  # layers of a stack
            # A trace that uses the whole leaf has one part for all its layers.
            dims = leaf.parts[min(i, len(leaf.parts) - 1)]
            kept = known.kept[min(i, len(known.kept) - 1)]
            for axis, dim in enumerate(dims):
                mask, positions = np.ones(dim.size, bool), kept[axis]
                if positions is not None:
                    mask = np.isin(np.arange(dim.size), positions)
                rows.append((leaf, root(dim), mask))
    return rows
