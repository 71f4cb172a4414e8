"""Criteria by their names, as patterns and allocations are given by theirs."""

from collections.abc import Mapping
from typing import Any

from jaxprune import scores
from jaxprune.arrays.rules import Rule, check
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
    check(_CRITERION, criterion=criterion)
    return CRITERIA[criterion] if isinstance(criterion, str) else criterion


_CRITERION = (
    Rule(
        lambda v: not isinstance(v.criterion, str) or v.criterion in CRITERIA,
        "criterion must be one of {names} or a function of (params, importance), got "
        "{criterion!r}",
        details=lambda _: {"names": ", ".join(sorted(CRITERIA))},
    ),
    Rule(
        lambda v: isinstance(v.criterion, str) or callable(v.criterion),
        "criterion must be a function of (params, importance), got a {kind}",
        "pass jp.scores.magnitude itself, which is called at each event",
        error=TypeError,
        details=lambda v: {"kind": type(v.criterion).__name__},
    ),
)
