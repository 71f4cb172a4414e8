"""Which weights are kept: a threshold for each leaf, found before any mask is made.

All that can be refused is refused here, for all leaves at once. From the thresholds
`masks` makes masks, and `prune` sets weights to zero leaf by leaf.
"""

import functools
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from jaxprune.arrays import placement, tree
from jaxprune.arrays.axes import Axes, check_axes
from jaxprune.arrays.messages import listed
from jaxprune.arrays.topk import thresholds
from jaxprune.masking import allocation, counts, patterns
from jaxprune.masking.checks import floating_scores
from jaxprune.masking.quotas import LeafUnits, Quotas, leaf_quotas
from jaxprune.typing import Pattern, Scores

# Rules that only count a leaf's weights.
_WITHOUT_AXES = (allocation.Layer, allocation.Global)


class Selection(NamedTuple):
    """Which weights of one leaf are kept.

    Attributes:
      units: scores of the units that are pruned together.
      cut: the threshold between kept and pruned units.
      axes: which axes of the leaf are input and output.
    """

    units: jax.Array
    cut: thresholds.Cut
    axes: Axes


def select(
    scores: Scores,
    sparsity: counts.Sparsity,
    *,
    rule: counts.Allocation,
    pattern: Pattern,
    axes: Axes | Mapping[str, Axes] | None,
) -> Iterator[Selection]:
    """What `masks.make` keeps of each leaf, in order; all checks are done by then."""
    named = floating_scores(scores)
    counts.agreed(sparsity, pattern, rule)
    check_heads(tree.named_leaves(scores), axes, rule, [pattern])
    quotas = leaf_quotas(LeafUnits(named, pattern, axes), sparsity, rule)
    leaves = list(named.values())
    if quotas.together and not any(isinstance(x, jax.core.Tracer) for x in leaves):
        selections = list(_selections(leaves, quotas, pattern))
        _warn_of_emptied(list(named), selections)
        return iter(selections)
    if quotas.stacks is None:
        return _selections(leaves, quotas, pattern)
    rows = zip(leaves, quotas.axes, quotas.stacks, quotas.kept, strict=True)
    return (_stacked(*row, pattern) for row in rows)


def check_heads(
    leaves: Mapping[str, Any],
    axes: Axes | Mapping[str, Axes] | None,
    rule: counts.Allocation,
    patterns_used: Sequence[Pattern],
) -> None:
    """Refuses heads that only a leaf could tell from a stack that was left out.

    Args:
      leaves: leaves by name, with those that were left out.
      axes: axes that the caller gave.
      rule: how the sparsity is shared out.
      patterns_used: the patterns.
    """
    check_axes(axes)
    free = all(isinstance(pattern, patterns.Unstructured) for pattern in patterns_used)
    if not isinstance(rule, Mapping):
        free &= type(allocation.parse(rule)) in _WITHOUT_AXES
    if not (free or isinstance(axes, Axes)) and (heads := _half_heads(leaves, axes)):
        raise ValueError(
            f"the shapes of query/kernel and out/kernel tell the axes of "
            f"{listed(heads)}, but one of the two is left out; give "
            "axes={glob: jp.Axes(inputs=..., outputs=...)}, for (in, heads, size) "
            "jp.Axes((-3,), (-2, -1))"
        )


def _half_heads(
    leaves: Mapping[str, Any], axes: Mapping[str, Axes] | None
) -> list[str]:
    """The kernels of attention whose query or output projection was left out."""
    named = {n: leaf for n, leaf in leaves.items() if not tree.is_excluded(leaf)}
    ruled = tree.by_rule(axes or {}, list(named), None, "axes")
    names = []
    # A leaf for which the caller gave axes has no need of its partner.
    for (name, leaf), leaf_axes in zip(named.items(), ruled, strict=True):
        match = re.fullmatch(r"(.*/)?(query|key|value|out)/kernel", name)
        if match and leaf_axes is None and leaf.ndim >= 3:
            pair = [leaves.get(f"{match[1] or ''}{n}/kernel") for n in ("query", "out")]
            names += [name] if any(map(tree.is_excluded, pair)) else []
    return names


def _stacked(
    leaf: jax.Array, axes: Axes, stack: tuple[int, ...], kept: int, pattern: Pattern
) -> Selection:
    """The selection of one leaf, so many units of each of its matrices."""
    units, rows = _units(leaf, pattern, axes), math.prod(stack)
    if not stack or not units.size or pattern.sparsity is not None:
        # Where a pattern fixes the sparsity of each group, all matrices have it too.
        return Selection(units, thresholds.cut_each([units], [kept * rows])[0], axes)
    if isinstance(pattern, patterns.Unstructured):  # its units have the leaf's axes
        matrices = units.reshape(rows, *leaf.shape[len(stack) :])
        cut = thresholds.cut_rows(matrices, kept)
        return Selection(units, thresholds.Cut(*(x.reshape(stack) for x in cut)), axes)
    # Units of other patterns have one axis of matrices in front: (batch, ...).
    return Selection(units, thresholds.cut_rows(units, kept), axes)


def _selections(
    leaves: Sequence[jax.Array], quotas: Quotas, pattern: Pattern
) -> Iterator[Selection]:
    """The selections of one ranking of all leaves together, or of a ranking of each.

    Outside of `jit` the units of a pattern are made when their turn comes, if no
    ranking spans leaves.
    """
    traced = any(isinstance(leaf, jax.core.Tracer) for leaf in leaves)
    free = traced or isinstance(pattern, patterns.Unstructured)
    if not (quotas.together or free):
        for leaf, axes, number in zip(leaves, quotas.axes, quotas.kept, strict=True):
            units = _units(leaf, pattern, axes)
            yield Selection(units, thresholds.cut_each([units], [number])[0], axes)
        return
    unit_scores = [
        _units(leaf, pattern, axes)
        for leaf, axes in zip(leaves, quotas.axes, strict=True)
    ]
    if quotas.together:
        cuts = thresholds.cut_together(unit_scores, quotas.kept[0])
    else:
        cuts = thresholds.cut_each(unit_scores, quotas.kept)
    for units, cut, axes in zip(unit_scores, cuts, quotas.axes, strict=True):
        yield Selection(units, cut, axes)


def _warn_of_emptied(names: Sequence[str], selections: Sequence[Selection]) -> None:
    """Names leaves of which one ranking leaves nothing: such a layer passes nothing."""
    # All are started before the first answer is waited for.
    flags = [
        thresholds.keeps_any(selection.units, selection.cut) for selection in selections
    ]
    if any(isinstance(flag, jax.core.Tracer) for flag in flags):
        return  # constants of a function that is traced
    kept = jax.device_get(flags)
    pairs = zip(names, selections, kept, strict=True)
    emptied = [name for name, s, keeps in pairs if s.units.size and not keeps]
    # Where nothing at all is left, another sentence says so.
    if emptied and any(kept):
        warnings.warn(
            f"one ranking of all leaves leaves nothing of {listed(emptied)}; rank each "
            "by itself with allocation='layer', or remove less",
            stacklevel=4,
        )


def _units(leaf: jax.Array, pattern: Pattern, axes: Axes) -> jax.Array:
    """The scores of a leaf's units; on one device by one compiled program a shape."""
    # Of what is spread over a mesh a pattern must see where it lies.
    alone = placement.is_concrete(leaf) and len(leaf.sharding.device_set) == 1
    if isinstance(pattern, patterns.Unstructured) or not alone:
        return pattern.units(leaf, axes)
    return _compiled_units(leaf, pattern, axes)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _compiled_units(leaf: jax.Array, pattern: Pattern, axes: Axes) -> jax.Array:
    return pattern.units(leaf, axes)


def selected_mask(
    selection: Selection, pattern: Pattern, shape: tuple[int, ...]
) -> jax.Array:
    """The mask of a leaf of this shape, where its scores are."""
    return _expanded(selection.units, selection.cut, pattern, shape, selection.axes)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _expanded(
    units: jax.Array,
    cut: thresholds.Cut,
    pattern: Pattern,
    shape: tuple[int, ...],
    axes: Axes,
) -> jax.Array:
    return pattern.expand(thresholds.above_cut(units, cut), shape, axes)
