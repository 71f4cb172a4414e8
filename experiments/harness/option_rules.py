"""What must hold of an experiment's options, as rules whose sentences name the flag.

Everything here is asked before a model is made: a run that takes hours must not end on
a flag that was wrong from its start.
"""

import math
from collections.abc import Collection, Mapping
from typing import Any

from jaxprune.arrays import rules
from jaxprune.arrays.rules import Rule


def at_least(name: str, least: float) -> Rule:
    """A rule that an option is no less than a number, or is left out."""
    sentence = f"{name} must be at least {least}, got {{{name}}}"
    return rules.within(name, least, math.inf, sentence)


def over_zero(name: str) -> Rule:
    """A rule that an option is positive and finite, or is left out."""

    def holds(options: Any) -> bool:
        value = getattr(options, name)
        return value is None or 0 < value < math.inf

    return Rule(holds, f"{name} must be over 0, got {{{name}}}")


# Seeds key random numbers; the others are counts, or shares of what was lost.
_FROM_ZERO = ("seeds", "draws", "passes", "corrections")


def check_names(config: Any, known: Mapping[str, Collection[str]]) -> None:
    """Refuses names that nothing has.

    Args:
      config: configuration with a tuple of names for each key of `known`.
      known: option to the names that it may have.

    Raises:
      ValueError: an option has other names; the sentence lists them.
    """
    for name, allowed in known.items():
        unknown = [value for value in getattr(config, name) if value not in allowed]
        check_known(name, ", ".join(allowed), unknown)


def check_known(name: str, known: str, unknown: Collection[str]) -> None:
    """Refuses unknown names of one option.

    Args:
      name: name of the option.
      known: names that it may have, in words.
      unknown: names that were asked for and are none of these.

    Raises:
      ValueError: there are unknown names.
    """
    if unknown:
        raise ValueError(f"{name} must be of {known}, got {', '.join(unknown)}")


def check_lists(config: Any, *names: str) -> None:
    """Refuses empty lists, doubles, and numbers out of range.

    Args:
      config: configuration with a tuple for each name, and `sparsities` if it has any.
      *names: options that are lists.

    Raises:
      ValueError: an option is none of that; the sentence names it.
    """
    for sparsity in getattr(config, "sparsities", ()):
        if not 0 < sparsity < 1:
            raise ValueError(
                f"sparsities must be in (0, 1), got {sparsity}; the dense model is "
                "always measured"
            )
    for name in names:
        values = getattr(config, name)
        if not values:
            raise ValueError(f"{name} must name at least one")
        if len({*values}) != len(values):
            raise ValueError(f"{name} must be named once each, got {values}")
        if name in _FROM_ZERO and not min(values) >= 0:
            raise ValueError(f"{name} must be at least 0, got {values}")
