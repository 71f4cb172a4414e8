"""A pass that puts the kept weights on a few levels: what int4 and int8 can hold.

With a pass that has the Hessian, later inputs make up for the quantization of earlier
ones, as in GPTQ; otherwise each weight becomes its nearest level.
"""

import dataclasses

import jax.numpy as jnp

from jaxprune.posttraining.passes.base import Matrix, Pass
from jaxprune.posttraining.solvers import sparsegpt
from jaxprune.posttraining.solvers.layer_problem import Solution
from jaxprune.posttraining.solvers.quantization import BITS, Name, Quantization


@dataclasses.dataclass(frozen=True)
class Quantize(Pass):
    """Kept weights become levels: integers times a scale, in the leaves' own dtype.

    "sparsegpt" and "alps" make up for the quantization in later inputs; the other
    methods take the nearest level. A kept weight may become zero. The integers are
    stored by `jaxprune compact`.

    Attributes:
      levels: "int4" or "int8".
      group: number of inputs that share a scale, a multiple of 16; the last group may
        be smaller.

    Example:
      >>> import jaxprune as jp
      >>> jp.passes.quantize("int4", group=64).quantization
      Quantization(bits=4, group=64)
    """

    levels: Name = "int4"
    _: dataclasses.KW_ONLY
    group: int = 128

    def __post_init__(self) -> None:
        """Refuses what no file of ours holds."""
        if self.levels not in BITS:
            raise ValueError(
                f"levels must be one of {', '.join(BITS)}, got {self.levels!r}"
            )
        _ = self.quantization  # which refuses its group

    @property
    def quantization(self) -> Quantization:
        """The levels."""
        return Quantization(BITS[self.levels], self.group)

    def settle(self, matrix: Matrix, solution: Solution, damping: float) -> Solution:
        """The kept weights on their levels."""
        if matrix.hessian is None:
            nearest = self.quantization.nearest(solution.weight)
            return solution._replace(weight=nearest)
        # What an input loses by it the later ones make up for, as in GPTQ.
        settled = sparsegpt.update(
            solution.weight,
            matrix.hessian,
            solution.mask,
            damping=damping,
            quantization=self.quantization,
        )
        worst = jnp.maximum(solution.damping, settled.damping)
        return settled._replace(damping=worst)
