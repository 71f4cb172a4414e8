"""What a pass after training is: what it observes, and what it does to a matrix.

A pass is a frozen value. A segment of the program is all that leads to one input; the
matrices that read the input are pruned one by one, each for the input that it will
really have. For each matrix a pass may set what the solver aims at, choose which
weights are kept, or change those that are. Everything that the driver reads of a pass
is an attribute or a method here.
"""

import dataclasses
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

from jaxprune.masking import matrix_mask
from jaxprune.posttraining.solvers.layer_problem import Solution
from jaxprune.posttraining.solvers.quantization import Quantization
from jaxprune.typing import Pattern

Observation: TypeAlias = Literal["squares", "hessian", "drift"]
"""What the driver can observe for a pass.

"squares" is the mean square of each input feature, "hessian" X^T X / samples of the
input X, and "drift" X^T (D - X) / samples with D the same input in the dense model.
"""

Inputs: TypeAlias = Literal["left", "dense"]
"""Which input a weight is pruned for.

"left" is the input after all earlier weights were pruned. "dense" is the input while
all weights of the same layer are still dense and earlier layers are pruned, as in the
papers.
"""


class Matrix(NamedTuple):
    """One matrix, to be pruned.

    Attributes:
      weight: (in, out) float32.
      mean_square: (in,) float32, of each input feature.
      hessian: (in, in) float32, X^T X / samples; None where no pass observes it.
      kept: number of units of the pattern that are kept, uint32 scalar.
      pattern: which weights are pruned as a unit.
      quantization: the levels that the kept weights shall lie on, or None. Where a
        pass ignores this field, the chain quantizes the weights that the pass returns.
    """

    weight: Float[Array, "in out"]
    mean_square: Float[Array, " in"]
    hessian: Any
    kept: Integer[Array, ""]
    pattern: Pattern
    quantization: Quantization | None = None

    def keep_highest(self, scores: Float[Array, "in out"]) -> Solution:
        """The matrix with its highest scores kept, as they are.

        Args:
          scores: (in, out), higher is kept; the pattern says what is ranked together.

        Returns:
          The solution: exactly `kept` units, ties by position.
        """
        mask = matrix_mask.mask(scores, self.kept, self.pattern)
        zero = jnp.zeros((), self.weight.dtype)
        return Solution(jnp.where(mask, self.weight, zero), mask, zero)


@dataclasses.dataclass(frozen=True)
class Pass:
    """A step after training; as it stands, one that observes and does nothing."""

    @property
    def observes(self) -> frozenset[Observation]:
        """What it reads of the inputs and of the dense model."""
        return frozenset()

    @property
    def quantization(self) -> Quantization | None:
        """The levels that it puts kept weights on, or None."""
        return None

    def target(
        self,
        weight: Float[Array, "in out"],
        hessian: Float[Array, "in in"],
        drift: Float[Array, "in in"],
        damping: float,
    ) -> jax.Array:
        """The matrix that the solver is to come near; the weight itself by default.

        Called for a pass that observes "drift", in a program of its own.

        Args:
          weight: (in, out) float32.
          hessian: (in, in), X^T X / samples.
          drift: (in, in), X^T (D - X) / samples.
          damping: the solver's, a share of the Hessian's mean diagonal.

        Returns:
          (in, out) float32.
        """
        return weight

    def settle(self, matrix: Matrix, solution: Solution, damping: float) -> Solution:
        """The kept weights once the mask is chosen; as they are by default.

        Args:
          matrix: what was pruned.
          solution: what was made of it.
          damping: the solver's, a share of the Hessian's mean diagonal.

        Returns:
          The solution, of the same mask.
        """
        return solution
