"""Wording that the errors of every folder share."""

from collections.abc import Iterable
from typing import Any


def listed(items: Iterable[Any], most: int = 6) -> str:
    """The first few items for a sentence, and how many more there are.

    Args:
      items: names, which are quoted, or numbers.
      most: how many are written out.

    Returns:
      The items, parted by commas.

    Example:
      >>> listed(["a", "b", "c"], most=2)
      "'a', 'b' and 1 more"
    """
    items = list(items)
    shown = ", ".join(f"'{x}'" if isinstance(x, str) else str(x) for x in items[:most])
    return shown + (f" and {len(items) - most} more" if len(items) > most else "")
