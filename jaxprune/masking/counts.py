"""One target, many leaves: how many weights each leaf (or all together) loses.

The count removed is the integer nearest to sparsity times size (a half goes to the even
one), of each leaf under the allocation "layer", of the whole under "global". Counts are
Python integers: a model may have more weights than 32 bits can count.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from jaxprune.arrays import tree


def checked(sparsity: Any, where: str = "") -> float:
    """A sparsity as a float in [0, 1).

    Args:
      sparsity: a Python or NumPy number.
      where: which leaf or rule it is for, for the error.

    Returns:
      The number.

    Raises:
      ValueError: it is NaN or out of range.
      TypeError: it is no number.
    """
    if isinstance(sparsity, bool | str):
        raise TypeError(f"sparsity must be a number in [0, 1), got {sparsity!r}{where}")
    try:
        value = float(sparsity)
    except TypeError as error:
        raise TypeError(
            f"sparsity must be a number in [0, 1) or {{glob: number}}, got "
            f"{type(sparsity).__name__}{where}; under jit it must be static"
        ) from error
    if math.isnan(value) or not 0 <= value < 1:
        raise ValueError(
            f"sparsity must be in [0, 1), the share to remove, got {value}{where}"
            + ("; give 0.6 for 60 %" if 1 <= value <= 100 else "")
        )
    return value


def by_leaf(
    sparsity: float | Mapping[str, float], names: Sequence[str], sizes: Sequence[int]
) -> list[int]:
    """How many of each leaf's units are removed.

    Args:
      sparsity: one number for all leaves, or {glob on the path name: number}; the first
        match counts and a leaf that no rule matches keeps all.
      names: the leaves' path names.
      sizes: the leaves' numbers of units.

    Returns:
      One count a leaf.

    Raises:
      ValueError: a number is out of range or a rule matches nothing.

    Example:
      >>> from jaxprune.masking import counts as allocate
      >>> allocate.by_leaf({"mlp/*": 0.5}, ["mlp/up", "out"], [10, 10])
      [5, 0]
    """
    if isinstance(sparsity, Mapping):
        rules = {g: checked(s, f" for {g!r}") for g, s in sparsity.items()}
        shares = tree.by_rule(rules, names, 0.0, "sparsity")
    else:
        shares = [checked(sparsity)] * len(names)
    return [round(s * size) for s, size in zip(shares, sizes, strict=True)]


def in_all(sparsity: float | Mapping[str, float], sizes: Sequence[int]) -> int:
    """How many units are removed from all leaves together.

    Args:
      sparsity: one number.
      sizes: the leaves' numbers of units.

    Returns:
      One count.

    Raises:
      ValueError: the number is out of range, or rules by leaf were given.
    """
    if isinstance(sparsity, Mapping):
        raise ValueError(
            "allocation='global' takes one sparsity, since one ranking shares it out, "
            "but rules by leaf were given; use allocation='layer'"
        )
    return round(checked(sparsity) * sum(sizes))
