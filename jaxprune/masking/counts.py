"""How many units each weight loses, and what the arguments of a call agree on.

A sparsity is a share in [0, 1). The number of units that a weight loses is the integer
nearest to sparsity times size (a half goes to the even one). Counts are Python
integers, since a model may have more weights than 32 bits can count.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from jaxprune.arrays import tree
from jaxprune.masking.allocation import Global, Name, Rule, Uniform, Weight, named
from jaxprune.typing import Pattern

Sparsity: TypeAlias = float | Mapping[str, float] | None
"""One share, a share for each {glob on the path name}, or None."""

Allocation: TypeAlias = Rule | Name | Mapping[str, float]
"""A rule, its name, or {glob on the path name: share}."""


def agreed(
    sparsity: Sparsity, pattern: Pattern, allocation: Allocation = "layer"
) -> tuple[float | Mapping[str, float], Rule]:
    """The sparsity and the rule that a call means, where its arguments agree.

    A pattern may fix the sparsity; then none needs to be given, and no rule may share
    out another.

    Args:
      sparsity: what was asked for.
      pattern: the pattern.
      allocation: a rule, its name, or {glob: share} in the place of a sparsity.

    Returns:
      One share in [0, 1) or {glob: share}, and the rule.

    Raises:
      ValueError: the arguments disagree, or a share is out of range.
      TypeError: a share is no number, or the allocation no rule.

    Example:
      >>> from jaxprune.masking import counts, patterns
      >>> counts.agreed(None, patterns.NM(2, 4))
      (0.5, Uniform())
    """
    if isinstance(allocation, Mapping):
        if sparsity is not None:
            raise ValueError(
                "shares by leaf must be given once, but both "
                f"allocation={dict(allocation)} and sparsity={sparsity} were given; "
                "leave the sparsity out"
            )
        sparsity, allocation = allocation, "layer"
    if isinstance(sparsity, Mapping) and not sparsity:
        raise ValueError(
            "shares by leaf must name one leaf at least, but {} was given; write "
            "{glob: share}, or one number for all"
        )
    rule, fixed = named(allocation), pattern.sparsity
    by_leaf = isinstance(sparsity, Mapping)
    if by_leaf and not isinstance(rule, Uniform):
        raise ValueError(
            f"allocation={rule} needs one sparsity to share out, but "
            f"sparsity={sparsity} gives shares by leaf; leave the allocation out"
        )
    if fixed is None:
        if sparsity is None:
            raise ValueError(f"{pattern} leaves the sparsity free; give sparsity=0.5")
        return sparsity if isinstance(sparsity, Mapping) else checked(sparsity), rule
    if sparsity is not None and (by_leaf or checked(sparsity) != fixed):
        raise ValueError(
            f"{pattern} removes exactly {fixed:.4g} of each weight, but "
            f"sparsity={sparsity} was asked for; leave the sparsity out"
        )
    if not isinstance(rule, Uniform | Global):
        raise ValueError(
            f"allocation={rule} needs one sparsity to share out, but {pattern} removes "
            f"exactly {fixed:.4g} of each weight; leave the allocation out"
        )
    return fixed, rule


def checked(sparsity: Any, place: str = "") -> float:
    """A sparsity as a float in [0, 1), or one clear error that says `where` it is."""
    if isinstance(sparsity, bool | str):
        raise TypeError(f"sparsity must be a number in [0, 1), got {sparsity!r}{place}")
    try:
        value = float(sparsity)
    except TypeError as error:
        raise TypeError(
            f"sparsity must be a number in [0, 1) or {{glob: number}}, got "
            f"{type(sparsity).__name__}{place}; under jit it must be static"
        ) from error
    if math.isnan(value) or not 0 <= value < 1:
        raise ValueError(
            f"sparsity must be in [0, 1), the share to remove, got {value}{place}"
            + (f"; give {value / 100:g} for {value:g} %" if 1 <= value < 100 else "")
        )
    return value


def by_leaf(
    sparsity: float | Mapping[str, float], names: Sequence[str], sizes: Sequence[int]
) -> list[int]:
    """How many of each leaf's units are pruned where no rule shares them out.

    Args:
      sparsity: one share for all leaves, or {glob on the path name: share}; the first
        match counts and a leaf that no glob matches keeps all.
      names: the leaves' path names.
      sizes: the leaves' numbers of units.

    Returns:
      One count a leaf.

    Raises:
      ValueError: a share is out of range or a glob matches nothing.

    Example:
      >>> from jaxprune.masking import counts
      >>> counts.by_leaf({"mlp/*": 0.5}, ["mlp/up", "out"], [10, 10])
      [5, 0]
    """
    if isinstance(sparsity, Mapping):
        rules = {g: checked(s, f" for {g!r}") for g, s in sparsity.items()}
        shares = tree.by_rule(rules, names, 0.0, "sparsity")
    else:
        shares = [checked(sparsity)] * len(names)
    return [round(s * size) for s, size in zip(shares, sizes, strict=True)]


def by_rule(
    sparsity: float | Mapping[str, float],
    rule: Rule,
    weights: Sequence[Weight],
    units: Sequence[int],
) -> list[int]:
    """How many of each weight's units are pruned, by what `agreed` returned."""
    if isinstance(sparsity, Mapping):
        return by_leaf(sparsity, [weight.name for weight in weights], units)
    shares = rule.sparsities(weights, sparsity)
    return [round(share * number) for share, number in zip(shares, units, strict=True)]
