"""Wording that the errors of every folder share."""

import numbers
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar, cast

T = TypeVar("T")


def listed(items: Iterable[Any], most: int = 6) -> str:
    """The first few items for a sentence, names quoted, and how many more there are."""
    items = list(items)
    shown = ", ".join(f"'{x}'" if isinstance(x, str) else str(x) for x in items[:most])
    return shown + (f" and {len(items) - most} more" if len(items) > most else "")


def refuse_fractions(what: str, **settings: Any) -> None:
    """Refuses settings that must be integers and are not; True is none either."""
    for name, value in settings.items():
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise TypeError(f"{what} needs an integer {name}, got {value!r}")


def chosen(
    what: str, given: Any, names: Mapping[str, T], method: str, others: str
) -> T:
    """The value that a name stands for, or the value given, known by its method."""
    if isinstance(given, str):
        if given in names:
            return names[given]
    elif hasattr(given, method) and not isinstance(given, type):
        return cast(T, given)
    error = ValueError if isinstance(given, str) else TypeError
    raise error(f"{what} must be one of {', '.join(names)}, {others}, got {given!r}")
