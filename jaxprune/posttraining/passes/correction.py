"""A pass by which each matrix makes up for what earlier segments lost.

The dense model runs beside the pruned one, one segment ahead, and what the solver comes
near is not the weight but `jaxprune.posttraining.solvers.dense_target`. So activations
are held twice. Weights that are several matrices, such as experts, are solved without.
"""

import dataclasses
import numbers

import jax
from jaxtyping import Array, Float

from jaxprune.posttraining.passes.base import Observation, Pass
from jaxprune.posttraining.solvers.dense_target import corrected


@dataclasses.dataclass(frozen=True)
class Correct(Pass):
    """Each matrix makes up for a share of the error of earlier ones.

    Attributes:
      share: share of the error of earlier matrices that each matrix makes up for, in
        [0, 1]; see `jaxprune.posttraining.solvers.dense_target`. 0 does without.

    Example:
      >>> import jaxprune as jp
      >>> jp.passes.chain(jp.passes.sparsegpt(0.5), jp.passes.correct(0.5)).correction
      0.5
    """

    share: float = 0.5

    def __post_init__(self) -> None:
        """Refuses what is no share."""
        if not _is_share(self.share):
            raise ValueError(
                f"a correction must be a share in [0, 1], got {self.share!r}; 0.5 goes "
                "half of the way, and 0 does without"
            )

    @property
    def observes(self) -> frozenset[Observation]:
        """The Hessian, and how far the dense model's input is from this one."""
        return frozenset({"hessian", "drift"} if self.share else ())

    def target(
        self,
        weight: Float[Array, "in out"],
        hessian: Float[Array, "in in"],
        drift: Float[Array, "in in"],
        damping: float,
    ) -> jax.Array:
        """The matrix whose outputs for the pruned model's inputs are the dense ones."""
        return corrected(weight, hessian, drift, share=self.share, damping=damping)


def _is_share(share: object) -> bool:
    real = isinstance(share, numbers.Real) and not isinstance(share, bool)
    return real and 0 <= share <= 1  # type: ignore[operator]
