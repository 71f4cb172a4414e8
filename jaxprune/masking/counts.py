"""How many units each weight keeps, and what the arguments of a call agree on.

A sparsity is a share in [0, 1). The number of units that a weight loses is the integer
nearest to sparsity times size (a half goes to the even one). Counts are Python
integers, since a model may have more weights than 32 bits can count.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, TypeAlias

import jax
import numpy as np

from jaxprune.arrays import tree
from jaxprune.arrays.axes import Axes
from jaxprune.arrays.messages import listed
from jaxprune.masking import allocation as allocation_
from jaxprune.masking import patterns
from jaxprune.masking.allocation import Global, Layer, Name, Weight
from jaxprune.typing import Pattern

Sparsity: TypeAlias = float | Mapping[str, float] | None
"""One share, a share for each {glob on the path name}, or None."""

Allocation: TypeAlias = allocation_.Rule | Name | Mapping[str, float]
"""A rule, its name, or {glob on the path name: share}."""


def agreed(
    sparsity: Sparsity, pattern: Pattern, allocation: Allocation = "layer"
) -> tuple[float | Mapping[str, float], allocation_.Rule]:
    """The sparsity and the rule that a call means, where its arguments agree.

    A pattern may fix the sparsity; then none needs to be given, and no rule may share
    out another.

    Args:
      sparsity: share or shares that the call asks for.
      pattern: pattern that may fix the share.
      allocation: a rule, its name, or {glob: share} in the place of a sparsity.

    Returns:
      One share in [0, 1) or {glob: share}, and the rule.

    Raises:
      ValueError: the arguments disagree, or a share is out of range.
      TypeError: a share is no number, or the allocation no rule.

    Example:
      >>> from jaxprune.masking import counts, patterns
      >>> counts.agreed(None, patterns.NM(2, 4))
      (0.5, Layer())
    """
    # Shares by leaf may stand in the place of either.
    if isinstance(allocation, Mapping):
        if sparsity is not None:
            raise ValueError(
                "shares by leaf must be given once, but both "
                f"allocation={dict(allocation)} and sparsity={sparsity} were given; "
                "leave the sparsity out"
            )
        sparsity, allocation = allocation, "layer"
    share = sparsity
    if not (sparsity is None or isinstance(sparsity, Mapping)):
        share = checked_sparsity(sparsity)
    rule, fixed = allocation_.parse(allocation), pattern.sparsity
    if isinstance(sparsity, Mapping) and not sparsity:
        raise ValueError(
            "shares by leaf must name one leaf at least, but {} was given; write "
            "{glob: share}, or one number for all"
        )
    if isinstance(sparsity, Mapping) and not isinstance(rule, Layer | Global):
        raise ValueError(
            f"allocation={rule} needs one sparsity to share out, but "
            f"sparsity={sparsity} gives shares by leaf; leave the allocation out"
        )
    if fixed is None and sparsity is None:
        raise ValueError(
            f"how much to remove is not said, and {pattern} leaves it free; give "
            "sparsity=0.5"
        )
    if fixed is not None and share is not None and (share != fixed):
        raise ValueError(
            f"{pattern} removes exactly {fixed:.4g} of each weight, but "
            f"sparsity={sparsity} was asked for; leave the sparsity out"
        )
    if fixed is not None and not isinstance(rule, Layer | Global):
        raise ValueError(
            f"allocation={rule} needs one sparsity to share out, but {pattern} removes "
            f"exactly {fixed:.4g} of each weight; leave the allocation out"
        )
    return (fixed if share is None else share), rule  # type: ignore[return-value]


def checked_sparsity(sparsity: Any, place: str = "") -> float:
    """A sparsity as a float in [0, 1), or one clear error that says which it is."""
    if isinstance(sparsity, bool | str):
        raise TypeError(f"sparsity must be a number in [0, 1), got {sparsity!r}{place}")
    # NumPy's and JAX's scalars pass; a traced one raises a TypeError.
    try:
        value = float(sparsity)
    except TypeError as error:
        raise TypeError(
            f"sparsity must be a number in [0, 1) or {{glob: number}}, got "
            f"{type(sparsity).__name__}{place}; under jit it must be static"
        ) from error
    if not 0 <= value < 1:
        hint = f"; give {value / 100:g} for {value:g} %" if 1 <= value < 100 else ""
        raise ValueError(
            f"sparsity must be in [0, 1), the share to remove, got {value}{place}{hint}"
        )
    return value


def kept_units(sparsity: float | Fraction, size: int) -> int:
    """How many of so many units a sparsity keeps.

    Args:
      sparsity: share to remove, in [0, 1].
      size: number of units.

    Returns:
      The size less the integer nearest to sparsity times size; a half goes to even.

    Example:
      >>> from jaxprune.masking import counts
      >>> counts.kept_units(0.5, 5)
      3
    """
    return size - round(sparsity * size)


def split_evenly(total: int, parts: int) -> list[int]:
    """A total as `parts` integers that differ by at most one, the larger ones first.

    `matrix_mask.spread` does the same with a total that is traced.

    Args:
      total: total of the parts.
      parts: number of parts.

    Returns:
      One integer a part.
    """
    share, larger = divmod(total, max(parts, 1))
    return [share + (i < larger) for i in range(parts)]


def by_leaf(
    sparsity: float | Mapping[str, float], names: Sequence[str], sizes: Sequence[int]
) -> list[int]:
    """How many of each leaf's units are pruned where no rule shares them out.

    Args:
      sparsity: one share for all leaves, or {glob on the path name: share}; the first
        match counts and a leaf that no glob matches keeps all.
      names: path names of the leaves.
      sizes: numbers of units of the leaves.

    Returns:
      One count a leaf.

    Raises:
      ValueError: a share is out of range or a glob matches nothing.

    Example:
      >>> from jaxprune.masking import counts
      >>> counts.by_leaf({"mlp/*": 0.5}, ["mlp/up", "out"], [10, 10])
      [5, 0]
    """
    # Checked here too: this is also called without `agreed`.
    if isinstance(sparsity, Mapping):
        rules = {g: checked_sparsity(s, f" for {g!r}") for g, s in sparsity.items()}
        shares = tree.by_rule(rules, names, 0.0, "sparsity")
    else:
        shares = [checked_sparsity(sparsity)] * len(names)
    return [
        size - kept_units(share, size)
        for share, size in zip(shares, sizes, strict=True)
    ]


def by_rule(
    sparsity: float | Mapping[str, float],
    rule: allocation_.Rule,
    weights: Sequence[Weight],
    units: Sequence[int],
) -> list[int]:
    """How many of each weight's units are pruned, by what `agreed` returned."""
    if isinstance(sparsity, Mapping):
        return by_leaf(sparsity, [weight.name for weight in weights], units)
    shares = rule.sparsities(weights, sparsity)
    names = [weight.name for weight in weights]
    if wrong := [
        f"{n} {float(s):g}"
        for n, s in dict(zip(names, shares, strict=True)).items()
        if not 0 <= s <= 1
    ]:
        raise ValueError(
            f"an allocation must give each weight a sparsity in [0, 1], but {rule} "
            f"gives {listed(wrong)}; mend its `sparsities`"
        )
    return [
        number - kept_units(share, number)
        for share, number in zip(shares, units, strict=True)
    ]


def unit_count(pattern: Pattern, shape: Sequence[int], axes: Axes | None = None) -> int:
    """How many units of a pattern an array of this shape has.

    Args:
      pattern: which weights are pruned together.
      shape: shape of a leaf, or of a weight (batch, in, out).
      axes: its input and output axes; Flax's [..., in, out] by default.

    Returns:
      The number of units, a Python integer.

    Example:
      >>> import jaxprune as jp
      >>> from jaxprune.masking import counts
      >>> counts.unit_count(jp.patterns.Block(4, 4), (8, 6))
      4
    """
    # Where a unit is a weight nothing needs to be traced.
    if isinstance(pattern, patterns.Unstructured | patterns.PerOutput):
        return math.prod(shape)
    # Units follow from the shape alone; the dtype is not read.
    scores = jax.ShapeDtypeStruct(tuple(shape), np.float32)
    units = functools.partial(pattern.units, axes=axes or Axes())
    return math.prod(jax.eval_shape(units, scores).shape)


def unit_counts(
    pattern: Pattern, leaves: Sequence[Any], leaf_axes: Sequence[Axes]
) -> list[int]:
    """How many units each leaf has; see `unit_count`."""
    keys = [
        (tuple(leaf.shape), axes) for leaf, axes in zip(leaves, leaf_axes, strict=True)
    ]
    # A pattern is traced once for all leaves of a shape.
    sizes = {key: unit_count(pattern, *key) for key in dict.fromkeys(keys)}
    return [sizes[key] for key in keys]
