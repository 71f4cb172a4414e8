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
from jaxprune.arrays.axes import Axes, check_axes, resolve_axes
from jaxprune.arrays.messages import listed
from jaxprune.arrays.topk import thresholds
from jaxprune.masking import allocation, counts, patterns
from jaxprune.masking.checks import floating
from jaxprune.typing import Pattern, Scores

# Rules that only count a leaf's weights.
_WITHOUT_AXES = (allocation.Uniform, allocation.Global)


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
    named = floating(scores)
    share, parsed_rule = counts.agreed(sparsity, pattern, rule)
    check_heads(tree.named_leaves(scores), axes, rule, [pattern])
    if isinstance(parsed_rule, allocation.PerMatrix):
        names, leaves = list(named), list(named.values())
        _axes(axes, names, leaves, pattern)
        leaf_axes = resolve_axes(axes, names, leaves)
        return _of_matrices(named, leaf_axes, share, pattern)
    quota = quotas(named, sparsity, rule=rule, pattern=pattern, axes=axes)
    return _selections(list(named.values()), quota, pattern)


def check_heads(
    leaves: Mapping[str, Any],
    axes: Axes | Mapping[str, Axes] | None,
    rule: counts.Allocation,
    patterns_used: Sequence[Pattern],
) -> None:
    """Refuses heads that only a leaf could tell from a stack that was left out.

    Args:
      every: leaves by name, with those that were left out.
      axes: what was given for them.
      rule: how the sparsity is shared out.
      each: the patterns.
    """
    check_axes(axes)
    free = all(isinstance(pattern, patterns.Unstructured) for pattern in patterns_used)
    if not isinstance(rule, Mapping):
        free &= type(allocation.named(rule)) in _WITHOUT_AXES
    if free or isinstance(axes, Axes):
        return
    named = {n: leaf for n, leaf in leaves.items() if not tree.is_excluded(leaf)}
    ruled = tree.by_rule(axes or {}, list(named), None, "axes")
    half = []
    for (name, leaf), leaf_axes in zip(named.items(), ruled, strict=True):
        match = re.fullmatch(r"(.*/)?(query|key|value|out)/kernel", name)
        if match and leaf_axes is None and leaf.ndim >= 3:
            pair = [leaves.get(f"{match[1] or ''}{n}/kernel") for n in ("query", "out")]
            half += [name] if any(map(tree.is_excluded, pair)) else []
    if half:
        raise ValueError(
            f"the shapes of query/kernel and out/kernel tell the axes of {listed(half)}"
            ", but one of the two is left out; give axes={glob: jp.Axes(inputs=..., "
            "outputs=...)}, for (in, heads, size) jp.Axes((-3,), (-2, -1))"
        )


class Quotas(NamedTuple):
    """How many units are kept, as Python integers.

    Attributes:
      kept: of all leaves together, or of each.
      together: whether one ranking spans all leaves.
      axes: which axes of each leaf are input and output.
    """

    kept: list[int]
    together: bool
    axes: list[Axes]


def quotas(
    named: Mapping[str, Any],
    sparsity: counts.Sparsity,
    *,
    rule: counts.Allocation,
    pattern: Pattern,
    axes: Axes | Mapping[str, Axes] | None,
) -> Quotas:
    """How many units are kept; most rules need only the leaves' shapes and dtypes."""
    names, leaves = list(named), list(named.values())
    leaf_axes = _axes(axes, names, leaves, pattern)
    share, parsed_rule = counts.agreed(sparsity, pattern, rule)
    sizes = unit_counts(pattern, leaves, leaf_axes)
    way = "rank the matrices of a stack by allocation='matrix', or split the leaf"
    _refuse_large(names, sizes, way)
    if isinstance(parsed_rule, allocation.Global) and not isinstance(share, Mapping):
        kept = [sum(sizes) - round(share * sum(sizes))]
        if sum(sizes) and not kept[0]:
            warnings.warn(
                "this sparsity leaves nothing of all leaves together; give a lower one",
                stacklevel=4,
            )
        return Quotas(kept, together=True, axes=leaf_axes)
    if isinstance(parsed_rule, allocation.Uniform):
        pruned = counts.by_leaf(share, names, sizes)
    else:
        weights = _weights(
            names, leaves, resolve_axes(axes, names, leaves), parsed_rule
        )
        pruned = counts.by_rule(share, parsed_rule, weights, sizes)
    kept = [size - out for size, out in zip(sizes, pruned, strict=True)]
    _warn_of_empty(names, sizes, kept)
    return Quotas(kept, together=False, axes=leaf_axes)


def _refuse_large(names: Sequence[str], sizes: Sequence[int], way: str) -> None:
    """Refuses what a uint32 cannot count."""
    if large := [n for n, size in zip(names, sizes, strict=True) if size >= 2**32]:
        raise ValueError(
            f"a ranking counts fewer than 2^32 units, but {listed(large)} have more; "
            f"{way}"
        )


def _of_matrices(
    named: Mapping[str, jax.Array],
    leaf_axes: Sequence[Axes],
    share: float | Mapping[str, float],
    pattern: Pattern,
) -> Iterator[Selection]:
    """The selections of a ranking of each matrix of each leaf."""
    names, leaves = list(named), list(named.values())
    stacks_or_none = [
        () if axes.problem(leaf.ndim) else axes.stack(leaf.shape)
        for leaf, axes in zip(leaves, leaf_axes, strict=True)
    ]
    if wrong := [
        n for n, stack in zip(names, stacks_or_none, strict=True) if stack is None
    ]:
        raise ValueError(
            f"allocation='matrix' needs stacks whose own axes come first, but "
            f"{listed(wrong)} have them elsewhere; leave them out of the scores, or "
            "rank them whole with allocation='layer'"
        )
    stacks = [stack or () for stack in stacks_or_none]
    whole = unit_counts(pattern, leaves, leaf_axes)
    sizes = [
        size // max(math.prod(stack), 1)
        for size, stack in zip(whole, stacks, strict=True)
    ]
    # A pattern that fixes the sparsity ranks a stack whole.
    counted = sizes if pattern.sparsity is None else whole
    _refuse_large(names, counted, "split the leaf")
    pruned = counts.by_leaf(share, names, sizes)
    kept = [size - out for size, out in zip(sizes, pruned, strict=True)]
    _warn_of_empty(names, sizes, kept)
    return (
        _stacked(leaf, axes, stack, number, pattern)
        for leaf, axes, stack, number in zip(
            leaves, leaf_axes, stacks, kept, strict=True
        )
    )


def _stacked(
    leaf: jax.Array, axes: Axes, stack: tuple[int, ...], kept: int, pattern: Pattern
) -> Selection:
    """The selection of one leaf, so many units of each of its matrices."""
    units, rows = _units(leaf, pattern, axes), math.prod(stack)
    if not stack or not units.size or pattern.sparsity is not None:
        # Where a pattern fixes the sparsity of each group, all matrices have it too.
        return Selection(units, thresholds.cut_each([units], [kept * rows])[0], axes)
    if isinstance(pattern, patterns.Unstructured):  # its units have the leaf's axes
        own_rows = units.reshape(rows, *leaf.shape[len(stack) :])
        cut = thresholds.cut_rows(own_rows, kept)
        return Selection(units, thresholds.Cut(*(x.reshape(stack) for x in cut)), axes)
    return Selection(units, thresholds.cut_rows(units, kept), axes)


def _warn_of_empty(
    names: Sequence[str], sizes: Sequence[int], kept: Sequence[int]
) -> None:
    """Names leaves that would lose all, which rounding may do to a small one."""
    pairs = zip(names, sizes, kept, strict=True)
    if empty := [name for name, size, number in pairs if size and not number]:
        warnings.warn(
            f"this sparsity leaves nothing of {listed(empty)}, which have few units to "
            "keep; leave them out of the scores with prunable=jp.tree.excluding('...')",
            stacklevel=5,
        )


def _weights(
    names: Sequence[str],
    leaves: Sequence[jax.Array],
    leaf_axes: Sequence[Axes],
    rule: allocation.Rule,
) -> list[allocation.Weight]:
    """What a rule may know of the leaves."""
    if rule.needs_inputs:
        raise ValueError(
            f"allocation={rule} reads the inputs of the weights, which scores do not "
            "hold; call jp.prune_trained, or use allocation='erk' or 'global'"
        )
    if flat := [
        name
        for name, leaf, axes in zip(names, leaves, leaf_axes, strict=True)
        if axes.problem(leaf.ndim)
    ]:
        raise ValueError(
            f"allocation={type(rule).__name__} needs leaves with an input and an "
            f"output axis, but {listed(flat)} have none; leave them out of the scores "
            "with prunable=jp.tree.excluding('...')"
        )
    return [
        allocation.Weight(
            name=name,
            leaf=name,
            index=(),
            shape=jax.eval_shape(axes.matrix, leaf).shape,  # (batch, in, out)
            view=axes.matrix,
            read=functools.partial(axes.matrix, leaf),
        )
        for name, leaf, axes in zip(names, leaves, leaf_axes, strict=True)
    ]


def _selections(
    leaves: Sequence[jax.Array], quota: Quotas, pattern: Pattern
) -> Iterator[Selection]:
    """The selections of one ranking of all leaves together, or of a ranking of each.

    Outside of `jit` the units of a pattern are made when their turn comes, if no
    ranking spans leaves.
    """
    traced = any(isinstance(leaf, jax.core.Tracer) for leaf in leaves)
    free = traced or isinstance(pattern, patterns.Unstructured)
    if not (quota.together or free):
        for leaf, axes, number in zip(leaves, quota.axes, quota.kept, strict=True):
            units = _units(leaf, pattern, axes)
            yield Selection(units, thresholds.cut_each([units], [number])[0], axes)
        return
    unit_scores = [
        _units(leaf, pattern, axes)
        for leaf, axes in zip(leaves, quota.axes, strict=True)
    ]
    if quota.together:
        cuts = thresholds.cut_together(unit_scores, quota.kept[0])
    else:
        cuts = thresholds.cut_each(unit_scores, quota.kept)
    for units, cut, axes in zip(unit_scores, cuts, quota.axes, strict=True):
        yield Selection(units, cut, axes)


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


def mask(selected: Selection, pattern: Pattern, shape: tuple[int, ...]) -> jax.Array:
    """The mask of a leaf of this shape, where its scores are."""
    return _mask(selected.units, selected.cut, pattern, shape, selected.axes)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _mask(
    units: jax.Array,
    cut: thresholds.Cut,
    pattern: Pattern,
    shape: tuple[int, ...],
    axes: Axes,
) -> jax.Array:
    return pattern.expand(thresholds.mask(units, cut), shape, axes)


def unit_counts(
    pattern: Pattern, leaves: Sequence[jax.Array], leaf_axes: Sequence[Axes]
) -> list[int]:
    """How many units each leaf has."""
    if isinstance(pattern, patterns.Unstructured):
        return [leaf.size for leaf in leaves]
    units = [
        jax.eval_shape(functools.partial(pattern.units, axes=axes), leaf)
        for leaf, axes in zip(leaves, leaf_axes, strict=True)
    ]
    return [math.prod(leaf_units.shape) for leaf_units in units]


def _axes(
    rules: Axes | Mapping[str, Axes] | None,
    names: Sequence[str],
    leaves: Sequence[jax.Array],
    pattern: Pattern,
) -> list[Axes]:
    """The leaves' axes, after the pattern has looked at every shape."""
    if isinstance(pattern, patterns.Unstructured) and rules is None:
        return [Axes()] * len(leaves)
    resolved = resolve_axes(rules, names, leaves)
    problems = [
        f"{problem} at {name!r}"
        for name, leaf, axes in zip(names, leaves, resolved, strict=True)
        if (problem := axes.problem(leaf.ndim) or pattern.problem(leaf.shape, axes))
    ]
    if problems:
        raise ValueError(
            f"{'; '.join(problems)}; leave such leaves out of the scores with "
            "prunable=jp.tree.excluding('...')"
        )
    return resolved
