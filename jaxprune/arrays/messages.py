"""Wording that the errors of every folder share, and tables of plain text."""

import numbers
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar, cast

T = TypeVar("T")


def listed(items: Iterable[Any], most: int = 6) -> str:
    """The first few items for a sentence, names quoted, and how many more there are."""
    items = list(items)
    shown = ", ".join(f"'{x}'" if isinstance(x, str) else str(x) for x in items[:most])
    return shown + (f" and {len(items) - most} more" if len(items) > most else "")


def one_line(text: str, most: int = 80) -> str:
    """A text as it is; one of several lines, as arrays print, as the start of one."""
    if "\n" not in text:
        return text
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[:most]} …"


def first_line(failure: BaseException) -> str:
    """The first line of what an exception of another package says, or nothing."""
    return (str(failure).strip().splitlines() or [""])[0]


def columns(rows: Sequence[Sequence[str]], *, right: bool = False) -> str:
    """A table of plain text.

    Args:
      rows: rows of cells, a header first where there is one.
      right: whether all columns but the first are aligned to the right.

    Returns:
      Lines.

    Example:
      >>> print(columns([["name", "size"], ["a", "10"]], right=True))
      name  size
      a       10
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    side = str.rjust if right else str.ljust
    lines = (
        "  ".join([row[0].ljust(widths[0]), *map(side, row[1:], widths[1:])])
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def refuse_fractions(what: str, **settings: Any) -> None:
    """Refuses settings that must be integers and are not; True is none either."""
    for name, value in settings.items():
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise TypeError(
                f"{what} needs an integer {name}, got {one_line(repr(value))}"
            )


def check_steps(what: str, **settings: Any) -> None:
    """Refuses numbers of steps that are no integers, or more than can be counted."""
    refuse_fractions(what, **settings)
    for name, value in settings.items():
        if value >= 2**31:
            raise ValueError(f"{what} needs {name} under 2**31, got {value}; give less")


def chosen(
    what: str, setting: Any, names: Mapping[str, T], method: str, others: str
) -> T:
    """The value that a name stands for, or the value given, known by its method."""
    if isinstance(setting, str):
        if setting in names:
            return names[setting]
    elif hasattr(setting, method) and not isinstance(setting, type):
        return cast(T, setting)
    error = ValueError if isinstance(setting, str) else TypeError
    raise error(
        f"{what} must be one of {', '.join(names)}, {others}, got "
        f"{one_line(repr(setting))}"
    )
