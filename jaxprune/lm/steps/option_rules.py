"""Rules of options, in the words of the command: `Rule`s that name flags.

A job checks its whole table before it opens a file. What the values of a table are
called is what the options are called, whatever group they are in.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from jaxprune.arrays.rules import Rule, within


def option_values(job: Any) -> dict[str, Any]:
    """Name of each option of a job, whatever its group, to its value."""
    fields = {field.name: getattr(job, field.name) for field in dataclasses.fields(job)}
    # After the job's own names: an option may be called as its group is.
    for group in list(fields.values()):
        if dataclasses.is_dataclass(group):
            fields |= option_values(group)
    return fields


def at_least(option: str, least: int, unit: str = "") -> Rule:
    """A rule that a number, if there is one, is not under another."""
    bound = "not be negative" if least == 0 else f"be at least {least}{unit}"
    return within(
        option, least, math.inf, f"{_flag(option)} must {bound}, got {{{option}}}"
    )


def open_share(option: str) -> Rule:
    """A rule that a number, if there is one, lies in (0, 1)."""
    return Rule(
        lambda v: getattr(v, option) is None or 0 < getattr(v, option) < 1,
        f"{_flag(option)} must be in (0, 1), got {{{option}}}",
    )


def idle_without(group: type[Any], option: str, condition: str, needed: str) -> Rule:
    """A rule that an option which does nothing without another is at its default.

    Args:
      group: dataclass with the option and its default.
      option: name of the option.
      condition: name of the value that says whether the option does something.
      needed: what to give for that, in words.

    Returns:
      The rule.
    """
    default = getattr(group, option)  # a dataclass keeps it on the class
    return Rule(
        lambda v: getattr(v, condition) or getattr(v, option) == default,
        f"{_flag(option)} needs {needed}",
    )


def not_while(
    condition: str,
    option: str,
    sentence: str,
    hint: str,
    clashes: Callable[[Any], bool] | None = None,
) -> Rule:
    """A rule that an option is not given under a condition.

    Args:
      condition: name of the value that says whether the rule is asked at all.
      option: name of the option; "{flag}" of the sentence becomes its flag.
      sentence: what the rule says.
      hint: the way out.
      clashes: whether the option is given, of all values; if left out, its truth.

    Returns:
      The rule.
    """
    is_given = clashes or (lambda v: bool(getattr(v, option)))
    return Rule(
        lambda v: not (getattr(v, condition) and is_given(v)),
        sentence.replace("{flag}", _flag(option)),
        hint,
    )


def _flag(option: str) -> str:
    return "--" + option.replace("_", "-")


SEED = Rule(  # JAX reads 32 bits
    lambda v: 0 <= v.seed < 2**32, "--seed must be from 0 to 2**32 - 1, got {seed}"
)
"""A seed that every generator takes."""
