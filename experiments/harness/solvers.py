"""Solvers in the place of a criterion, each with the allocation that feeds it.

"sparsegpt_preconditioned_magnitude" is SparseGPT, the sparsity shared out by one global
ranking of the preconditioned magnitudes; "alps_uniform" is ALPS, each matrix losing the
same share. The criterion then says how many weights a matrix loses, and the solver
which. With "+correction" each matrix makes up for half of what those before it lost.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jaxprune as jp
from experiments.harness.criteria import CRITERIA
from jaxprune.typing import Scores


def corrected(method: Any, share: float = 0.5) -> Any:
    """A method by which each matrix makes up for a share of what is lost before it."""
    return jp.passes.chain(method, jp.passes.correct(share))


SOLVERS: dict[str, Callable[..., Any]] = {
    "sparsegpt": jp.passes.sparsegpt,
    "sparsegpt+correction": lambda *a, **k: corrected(jp.passes.sparsegpt(*a, **k)),
    "alps": jp.passes.alps,
    "alps+correction": lambda *a, **k: corrected(jp.passes.alps(*a, **k)),
    "wanda": jp.passes.wanda,
}
"""Name to a function that makes its passes from a sparsity and an allocation."""

ALLOCATIONS = ("uniform", "owl", "erk")
"""Rules of `jp.allocation` without a score; each name of `CRITERIA` is one too."""


class Solver(NamedTuple):
    """A solver and its allocation.

    Attributes:
      method: a name of `SOLVERS`.
      allocation: a name of `ALLOCATIONS` or of `CRITERIA`.
    """

    method: str
    allocation: str

    def shared_out(self, scored: Callable[[str], Scores]) -> Any:
        """The allocation; `scored` gives the scores of a criterion."""
        if self.allocation in ALLOCATIONS:
            # The records of runs say "uniform".
            return jp.allocation.parse(
                "layer" if self.allocation == "uniform" else self.allocation
            )
        # The scores say how many weights each matrix loses, and not which.
        return jp.allocation.Ranked(scored(self.allocation))


def named(name: str) -> Solver | None:
    """What a name stands for; None where that is no solver with its allocation.

    Example:
      >>> named("sparsegpt_preconditioned_adam")
      Solver(method='sparsegpt', allocation='preconditioned_adam')
      >>> named("preconditioned_adam") is None
      True
    """
    method, _, allocation = name.partition("_")
    # The method ends at the first "_", which no method's name has; criteria do.
    known = method in SOLVERS and allocation in {*ALLOCATIONS, *CRITERIA}
    return Solver(method, allocation) if known else None


def rankings(names: Iterable[str]) -> list[str]:
    """The criteria that these names rank by, those of solvers' allocations too."""
    criteria = [(solver.allocation if (solver := named(n)) else n) for n in names]
    return [name for name in criteria if name in CRITERIA]
