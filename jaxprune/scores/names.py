"""Criteria by their names, as patterns and allocations are given by theirs."""

from typing import Any

from jaxprune import scores
from jaxprune.arrays.messages import chosen
from jaxprune.typing import Criterion


def parse_criterion(criterion: Any) -> Criterion:
    """A criterion from its name, or the function itself.

    Args:
      criterion: name in `jp.scores`, or a function of (params, importance).

    Returns:
      The function.

    Raises:
      ValueError: the name is unknown.
      TypeError: it is no function; scores that a criterion has made already, say.
    """
    names = {name: getattr(scores, name) for name in scores.__all__}
    choices = "or a function of (params, importance)"
    return chosen("criterion", criterion, names, "__call__", choices)
