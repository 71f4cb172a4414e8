"""Which weights are kept, decided before any mask is made.

All that can be refused is refused here, for all leaves at once. What comes out is a
threshold for each leaf, from which `masks` makes masks and `pruning` prunes in place.
"""

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxprune.arrays import axes as axes_
from jaxprune.arrays import tree
from jaxprune.arrays.axes import Axes
from jaxprune.masking import counts as allocate
from jaxprune.masking import patterns
from jaxprune.topk import thresholds
from jaxprune.typing import Pattern, Scope, Scores


class Choice(NamedTuple):
    """Which weights of one leaf are kept.

    Attributes:
      units: scores of the units that live or die together.
      cut: where the units are cut.
      axes: which axes of the leaf are input and output.
    """

    units: jax.Array
    cut: thresholds.Cut
    axes: Axes


def choose(
    scores: Scores,
    sparsity: float | Mapping[str, float] | None,
    *,
    allocation: Scope,
    pattern: Pattern,
    axes: Axes | Mapping[str, Axes] | None,
) -> Iterator[Choice]:
    """What `masks.make` keeps.

    Args:
      scores: as all the arguments, those of `masks.make`.
      sparsity: the share to remove.
      allocation: "layer" or "global".
      pattern: which weights live and die together.
      axes: which axes are input and output.

    Returns:
      One choice for each leaf that is not left out, in order. All checks are done by
      then. Outside of `jit` the units of a pattern are made when their turn comes, if
      no ranking spans leaves.

    Raises:
      ValueError: a sparsity, pattern or rule does not fit, or a score is NaN.
      TypeError: scores are not floating.
    """
    named = floating(scores)
    names, leaves = list(named), list(named.values())
    own_axes = _axes(axes, names, leaves, pattern)
    share = _agreed(sparsity, pattern)
    sizes = _sizes(pattern, leaves, own_axes)
    if allocation == "global":
        counts = [sum(sizes) - allocate.in_all(share, sizes)]
    elif allocation == "layer":
        removed = allocate.by_leaf(share, names, sizes)
        counts = [size - out for size, out in zip(sizes, removed, strict=True)]
    else:
        raise ValueError(f"allocation must be 'layer' or 'global', got {allocation!r}")
    return _choices(leaves, own_axes, counts, allocation, pattern)


def floating(scores: Scores) -> dict[str, jax.Array]:
    """The scores' leaves by name, floating and without NaN where that can be seen.

    Args:
      scores: a tree.

    Returns:
      Path name to leaf, without leaves that are left out.

    Raises:
      ValueError: there is no leaf, or one holds a NaN.
      TypeError: a leaf is not floating.
    """
    named = {
        k: v for k, v in tree.named_leaves(scores).items() if not tree.is_excluded(v)
    }
    if not named:
        raise ValueError("scores must have at least one leaf to prune, but have none")
    if wrong := [name for name, leaf in named.items() if not tree.is_floating(leaf)]:
        raise TypeError(
            f"scores must be floating arrays, but {wrong[:6]} are not; cast them with "
            "astype(jnp.float32)"
        )
    concrete = {k: v for k, v in named.items() if not isinstance(v, jax.core.Tracer)}
    with thresholds.at_once(list(concrete.values())):
        nan = jax.device_get({name: _has_nan(leaf) for name, leaf in concrete.items()})
    if wrong := [name for name, found in nan.items() if found]:
        raise ValueError(
            f"scores must not be NaN, but {wrong[:6]} hold some; look for the step at "
            "which training diverged, or replace them with jnp.nan_to_num"
        )
    return named


def _choices(
    leaves: Sequence[jax.Array],
    own_axes: Sequence[Axes],
    counts: Sequence[int],
    allocation: Scope,
    pattern: Pattern,
) -> Iterator[Choice]:
    traced = any(isinstance(leaf, jax.core.Tracer) for leaf in leaves)
    free = traced or isinstance(pattern, patterns.Unstructured)
    if allocation == "layer" and not free:
        for leaf, own, kept in zip(leaves, own_axes, counts, strict=True):
            units = pattern.units(leaf, own)
            yield Choice(units, thresholds.cut_each([units], [kept])[0], own)
        return
    every = [pattern.units(*pair) for pair in zip(leaves, own_axes, strict=True)]
    if allocation == "layer":
        cuts = thresholds.cut_each(every, counts)
    else:
        cuts = thresholds.cut_together(every, counts[0])
    for units, cut, own in zip(every, cuts, own_axes, strict=True):
        yield Choice(units, cut, own)


def _sizes(
    pattern: Pattern, leaves: Sequence[jax.Array], own_axes: Sequence[Axes]
) -> list[int]:
    """How many units each leaf has."""
    if isinstance(pattern, patterns.Unstructured):
        return [leaf.size for leaf in leaves]
    units = [
        jax.eval_shape(functools.partial(pattern.units, axes=own), leaf)
        for leaf, own in zip(leaves, own_axes, strict=True)
    ]
    return [math.prod(each.shape) for each in units]


def _agreed(
    sparsity: float | Mapping[str, float] | None, pattern: Pattern
) -> float | Mapping[str, float]:
    """The sparsity asked for, or the one that the pattern fixes."""
    if pattern.sparsity is None:
        if sparsity is None:
            raise ValueError(f"{pattern} leaves the sparsity free; give sparsity=0.5")
        return sparsity
    if sparsity is not None and (
        isinstance(sparsity, Mapping) or allocate.checked(sparsity) != pattern.sparsity
    ):
        raise ValueError(
            f"{pattern} removes exactly {pattern.sparsity:.4g} of each leaf, but "
            f"sparsity={sparsity} was asked for; leave the sparsity out"
        )
    return pattern.sparsity


def _axes(
    rules: Axes | Mapping[str, Axes] | None,
    names: Sequence[str],
    leaves: Sequence[jax.Array],
    pattern: Pattern,
) -> list[Axes]:
    """The leaves' axes, after the pattern has looked at every shape."""
    if isinstance(pattern, patterns.Unstructured) and rules is None:
        return [Axes()] * len(leaves)
    resolved = axes_.resolve(rules, names, leaves)
    problems = [
        f"{problem} at {name!r}"
        for name, leaf, own in zip(names, leaves, resolved, strict=True)
        if (problem := own.problem(leaf.ndim) or pattern.problem(leaf.shape, own))
    ]
    if problems:
        raise ValueError(
            f"{'; '.join(problems)}; leave such leaves out of the scores with "
            "prunable=jp.tree.excluding('...')"
        )
    return resolved


@jax.jit
def _has_nan(leaf: jax.Array) -> jax.Array:
    # Not by a maximum: on a CPU, XLA's does not hand NaN on.
    return jnp.any(jnp.isnan(leaf))
