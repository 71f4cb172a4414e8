"""How many units each leaf of a tree keeps, before any score is looked at.

All that can be refused is refused here, for all leaves at once.
"""

import dataclasses
import functools
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxprune.arrays.axes import Axes, resolve_axes
from jaxprune.arrays.messages import listed
from jaxprune.masking import counts, patterns
from jaxprune.masking.allocation import Global, Layer, PerMatrix, Weight
from jaxprune.typing import Pattern


class Quotas(NamedTuple):
    """How many units are kept, as Python integers.

    Attributes:
      kept: number of all leaves together, of each leaf, or of each matrix of a leaf.
      together: whether one ranking spans all leaves.
      axes: which axes of each leaf are input and output.
      stacks: shape of the stack of matrices that each leaf is, () for one matrix; None
        where no matrix is ranked by itself.
    """

    kept: list[int]
    together: bool
    axes: list[Axes]
    stacks: list[tuple[int, ...]] | None = None


@dataclasses.dataclass(frozen=True)
class LeafUnits:
    """Which units the leaves have, whatever the sparsity.

    Attributes:
      leaves: leaves by name; of most only shape and dtype are read.
      pattern: which weights are pruned together.
      rules: input and output axes as a caller gives them.
    """

    leaves: Mapping[str, Any]
    pattern: Pattern
    rules: Axes | Mapping[str, Axes] | None

    @functools.cached_property
    def axes(self) -> list[Axes]:
        """The axes of each leaf, after the pattern has looked at every shape."""
        # Single weights have no axes to look at.
        if isinstance(self.pattern, patterns.Unstructured) and self.rules is None:
            return [Axes()] * len(self.leaves)
        pairs = zip(self.leaves.items(), self.matrix_axes, strict=True)
        problems = [
            f"{problem} at {name!r}"
            for (name, leaf), axes in pairs
            if (
                problem := axes.problem(leaf.ndim)
                or self.pattern.problem(leaf.shape, axes)
            )
        ]
        if problems:
            raise ValueError(
                f"{'; '.join(problems)}; leave such leaves out of the scores with "
                "prunable=jp.tree.excluding('...')"
            )
        return self.matrix_axes

    @functools.cached_property
    def matrix_axes(self) -> list[Axes]:
        """The axes of each leaf, of which an allocation rule makes a matrix."""
        return resolve_axes(self.rules, list(self.leaves), list(self.leaves.values()))

    @functools.cached_property
    def sizes(self) -> list[int]:
        """The number of units of each leaf."""
        return counts.unit_counts(self.pattern, list(self.leaves.values()), self.axes)

    @functools.cached_property
    def weights(self) -> list[Weight]:
        """What a rule may know of the leaves, which have an input and an output."""
        leaves = zip(self.leaves.items(), self.matrix_axes, strict=True)
        return [
            Weight(
                name=name,
                leaf=name,
                index=(),
                shape=axes.matrix_shape(leaf.shape),  # (batch, in, out)
                view=axes.matrix,
                read=functools.partial(axes.matrix, leaf),
            )
            for (name, leaf), axes in leaves
        ]


def leaf_quotas(
    units: LeafUnits, sparsity: counts.Sparsity, rule: counts.Allocation
) -> Quotas:
    """How many units are kept; most rules need only the leaves' shapes and dtypes."""
    names, leaf_axes = list(units.leaves), units.axes
    share, parsed = counts.agreed(sparsity, units.pattern, rule)
    if isinstance(parsed, PerMatrix):
        leaves = list(units.leaves.values())
        return _matrix_quotas(names, leaves, units.matrix_axes, share, units.pattern)
    sizes = units.sizes
    way = "rank the matrices of a stack by allocation='matrix', or split the leaf"
    _check_countable(names, sizes, way)
    # Outputs that lose one share each leave no ranking of leaves anything to choose.
    ranks_units = not isinstance(units.pattern, patterns.PerOutput)
    free = ranks_units and units.pattern.sparsity is None
    if isinstance(parsed, Global) and free and not isinstance(share, Mapping):
        # One number for all leaves: what each keeps is known when they are ranked.
        kept = [counts.kept_units(share, sum(sizes))]
        if sum(sizes) and not kept[0]:
            warnings.warn(
                "this sparsity leaves nothing of all leaves together; give a lower one",
                stacklevel=4,
            )
        return Quotas(kept, together=True, axes=leaf_axes)
    if isinstance(parsed, Layer | Global):
        pruned = counts.by_leaf(share, names, sizes)
    else:
        # A rule reads matrices, so it needs axes where the pattern needs none.
        if parsed.needs_inputs:
            raise ValueError(
                f"allocation={parsed} reads the inputs of the weights, which scores do "
                "not hold; call jp.prune_trained, or use allocation='erk' or 'global'"
            )
        if wrong := [
            name
            for (name, leaf), axes in zip(
                units.leaves.items(), units.matrix_axes, strict=True
            )
            if axes.problem(leaf.ndim)
        ]:
            raise ValueError(
                f"allocation={type(parsed).__name__} needs leaves with an input and an "
                f"output axis, but {listed(wrong)} have none; leave them out of the "
                "scores with prunable=jp.tree.excluding('...')"
            )
        pruned = counts.by_rule(share, parsed, units.weights, sizes)
    kept = [size - lost for size, lost in zip(sizes, pruned, strict=True)]
    warn_of_empty(names, sizes, kept, stacklevel=5)
    return Quotas(kept, together=False, axes=leaf_axes)


def _matrix_quotas(
    names: Sequence[str],
    leaves: Sequence[Any],
    leaf_axes: list[Axes],
    share: float | Mapping[str, float],
    pattern: Pattern,
) -> Quotas:
    """How many units each matrix of each leaf keeps."""
    stacks_or_none = [
        () if axes.problem(leaf.ndim) else axes.stack(leaf.shape)
        for leaf, axes in zip(leaves, leaf_axes, strict=True)
    ]
    if wrong := [
        name
        for name, stack in dict(zip(names, stacks_or_none, strict=True)).items()
        if stack is None
    ]:
        raise ValueError(
            "allocation='matrix' needs stacks whose own axes come first, but "
            f"{listed(wrong)} have them elsewhere; leave them out of the scores, or "
            "rank them whole with allocation='layer'"
        )
    stacks = [stack or () for stack in stacks_or_none]
    leaf_sizes = counts.unit_counts(pattern, leaves, leaf_axes)
    sizes = [
        size // max(math.prod(stack), 1)
        for size, stack in zip(leaf_sizes, stacks, strict=True)
    ]
    # A pattern that fixes the sparsity ranks a stack whole.
    ranked = sizes if pattern.sparsity is None else leaf_sizes
    _check_countable(names, ranked, "split the leaf")
    pruned = counts.by_leaf(share, names, sizes)
    kept = [size - lost for size, lost in zip(sizes, pruned, strict=True)]
    warn_of_empty(names, sizes, kept, stacklevel=6)
    return Quotas(kept, together=False, axes=leaf_axes, stacks=stacks)


def warn_of_empty(
    names: Sequence[str], sizes: Sequence[int], kept: Sequence[int], *, stacklevel: int
) -> None:
    """Warns of leaves that would lose all, which rounding may do to a small one.

    Args:
      names: names of the leaves.
      sizes: number of units of each.
      kept: number of units that each keeps.
      stacklevel: frames from here to the caller's code, as `warnings.warn` counts them.
    """
    units = zip(names, sizes, kept, strict=True)
    if empty := [name for name, size, number in units if size and not number]:
        warnings.warn(
            f"this sparsity leaves nothing of {listed(empty)}, which then pass nothing "
            "on; leave them out with prunable=jp.tree.excluding('...'), or remove less",
            stacklevel=stacklevel,
        )


def _check_countable(names: Sequence[str], sizes: Sequence[int], way: str) -> None:
    """Refuses more units than 32 bits count."""
    large = [name for name, n in zip(names, sizes, strict=True) if n >= 2**32]
    if large:
        raise ValueError(
            f"a ranking counts fewer than 2^32 units, but {listed(large)} have more; "
            f"{way}"
        )
