"""Rules about arguments, as data: what must hold, and the sentence where it does not.

A module lists its rules once and checks them in one line, so that the idea of a
function stands alone. A sentence names the rule and the value; a hint says the way out,
in the words of Python and, where it differs, in those of the command.
"""

import numbers
import string
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from jaxprune.arrays.messages import one_line


class Rule(NamedTuple):
    """What must hold of some values, and what is said where it does not.

    Attributes:
      holds: whether it does, of a namespace of the values.
      sentence: the rule and the value; fields in braces are filled in.
      hint: the way out for a caller in Python, filled in likewise.
      command: the way out for a user of the command; empty where it is the same.
      error: what is raised.
      details: more fields for the sentence, of the values; only asked where it breaks.
    """

    holds: Callable[[Any], bool]
    sentence: str
    hint: str = ""
    command: str = ""
    error: type[Exception] = ValueError
    details: Callable[[Any], dict[str, Any]] | None = None


def check(rules: Rule | Iterable[Rule], /, **values: Any) -> None:
    """Raises the sentence of the first rule that does not hold.

    Args:
      rules: one rule, or rules in the order in which they are asked; a later one may
        rely on an earlier.
      **values: values that the rules read and that fill their sentences.

    Raises:
      ValueError: or what the rule names; its attribute `command` has the sentence in
        the words of the command.

    Example:
      >>> rules = [Rule(lambda v: v.rank >= 1, "rank must be positive, got {rank}")]
      >>> check(rules, rank=4)
      >>> check(rules, rank=0)
      Traceback (most recent call last):
      ValueError: rank must be positive, got 0
    """
    namespace = SimpleNamespace(**values)
    for rule in (rules,) if isinstance(rules, Rule) else rules:
        if not rule.holds(namespace):
            details = rule.details(namespace) if rule.details is not None else {}
            sentence, hint, command = (
                _OneLine().format(text, **values, **details)
                for text in (rule.sentence, rule.hint, rule.command)
            )
            raise refusal(sentence, hint, command, rule.error)


class _OneLine(string.Formatter):
    """Fills sentences in; what prints as several lines is cut to one."""

    def format_field(self, value: Any, format_spec: str) -> str:
        return one_line(super().format_field(value, format_spec))


def refusal(
    sentence: str,
    hint: str = "",
    command: str = "",
    error: type[Exception] = ValueError,
) -> Exception:
    """An exception that says the way out in Python's words and in the command's.

    Args:
      sentence: the rule and the value.
      hint: the way out for a caller in Python.
      command: the way out for a user of the command; empty where it is the same.
      error: type of the exception.

    Returns:
      The exception; not raised yet.
    """
    exception = error("; ".join(filter(None, [sentence, hint])))
    words = "; ".join(filter(None, [sentence, command or hint]))
    exception.command = words  # type: ignore[attr-defined]
    return exception


def command_words(error: BaseException) -> str:
    """What an exception says to a user of the command: in its words where it has any.

    Args:
      error: exception that was caught.

    Returns:
      Its sentence.

    Example:
      >>> error = refusal("a seed is needed", "pass seed=0", "give --seed 0")
      >>> command_words(error), command_words(ValueError("no seed"))
      ('a seed is needed; give --seed 0', 'no seed')
    """
    return getattr(error, "command", "") or str(error)


def reworded(
    error: Exception, exception_type: type[Exception], prefix: str = ""
) -> Exception:
    """An error of another type, behind a prefix, in the words of both.

    Args:
      error: exception that was caught.
      exception_type: type of the new one.
      prefix: text before its sentence, such as the file that it is about.

    Returns:
      The exception; not raised yet.
    """
    exception = exception_type(f"{prefix}{error}")
    command = f"{prefix}{command_words(error)}"
    exception.command = command  # type: ignore[attr-defined]
    return exception


def within(
    name: str, low: float, high: float, sentence: str, hint: str = "", **more: Any
) -> Rule:
    """A rule that a number lies in [low, high], or is None.

    Args:
      name: name of the value.
      low: least value that is allowed.
      high: largest value that is allowed; `math.inf` for at least `low`.
      sentence: sentence of the `Rule`.
      hint: hint of the `Rule`.
      **more: other fields of the `Rule`.

    Returns:
      The rule; NaN breaks it.
    """

    def holds(values: Any) -> bool:
        value = getattr(values, name)
        return value is None or is_between(value, low, high)

    return Rule(holds, sentence, hint, **more)


def is_between(value: Any, low: float, high: float) -> bool:
    """Whether it is one number, and lies in [low, high].

    Args:
      value: whatever a caller gave.
      low: least value that is allowed.
      high: largest value that is allowed.

    Returns:
      False for NaN, and for what is no number.

    Example:
      >>> is_between(0.5, 0, 1), is_between("0.5", 0, 1), is_between(None, 0, 1)
      (True, False, False)
    """
    # NumPy's and JAX's scalars are no `numbers.Real`.
    is_scalar = hasattr(value, "dtype") and np.ndim(value) == 0
    is_number = is_scalar or isinstance(value, numbers.Real)
    return is_number and bool(low <= value <= high)
