"""Criteria by their names, as patterns and allocations are given by theirs."""

from collections.abc import Mapping
from typing import Any

from jaxprune import scores
from jaxprune.typing import Criterion

CRITERIA: Mapping[str, Criterion] = {
    name: getattr(scores, name) for name in scores.__all__
}
"""Each criterion by its name."""


def parse_criterion(criterion: Any) -> Criterion:
    """A criterion from its name, or the function itself.

    Args:
      criterion: name in `CRITERIA`, or a function of (params, importance).

    Returns:
      The function.

    Raises:
      ValueError: the name is unknown.
      TypeError: it is no function; scores that a criterion has made already, say.
    """
    if isinstance(criterion, str) and criterion not in CRITERIA:
        raise ValueError(
            f"criterion must be one of {', '.join(sorted(CRITERIA))} or a function of "
            f"(params, importance), got {criterion!r}"
        )
    if not isinstance(criterion, str) and not callable(criterion):
        raise TypeError(
            "criterion must be a function of (params, importance), got a "
            f"{type(criterion).__name__}; pass jp.scores.magnitude itself, which is "
            "called at each event"
        )
    return CRITERIA[criterion] if isinstance(criterion, str) else criterion
