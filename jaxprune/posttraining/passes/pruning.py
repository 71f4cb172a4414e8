"""Passes that choose which weights of a matrix are kept, and with which values.

`Prune` is their base, and that of a pass of your own: one pure function, `solve`, from
a matrix and the statistics of its input to a new matrix and its mask. It is compiled
once for a shape, whatever the number of weights that is kept.
"""

import dataclasses
from typing import Any, Literal, TypeAlias, get_args

import jax.numpy as jnp

from jaxprune.masking import patterns
from jaxprune.masking.counts import Allocation, Sparsity
from jaxprune.posttraining.passes.base import Inputs, Matrix, Observation, Pass
from jaxprune.posttraining.solvers import alps, sparsegpt
from jaxprune.posttraining.solvers.layer_problem import Solution
from jaxprune.scores import from_activations
from jaxprune.typing import Pattern

Name: TypeAlias = Literal["magnitude", "wanda", "ria", "sparsegpt", "alps"]
"""The pruning passes by the names that commands give them."""


@dataclasses.dataclass(frozen=True)
class Prune(Pass):
    """Base of the passes that choose which weights are kept; subclass it for your own.

    A subclass is a frozen dataclass with `solve` and, where it reads the inputs,
    `observes`, which may be a plain class attribute.

    Attributes:
      sparsity: share of the weights to remove, in [0, 1), or {glob on the weight's
        name: share}, of which the first match counts. None where the pattern or the
        allocation fixes it.
      pattern: which weights are pruned together: a value of `jp.patterns`, or its name
        such as "2:4"; None is the method's own pattern, `usual_pattern`.
      allocation: how the sparsity is shared out: "layer" gives each weight the same,
        "global" ranks all magnitudes together, "erk", "owl", a value of
        `jp.allocation`, or {glob on the weight's name: share}.
    """

    sparsity: Sparsity = None
    _: dataclasses.KW_ONLY
    pattern: Pattern | str | None = None
    allocation: Allocation = "layer"

    @property
    def usual_pattern(self) -> Pattern:
        """The pattern that its paper uses where nothing else is asked for."""
        return patterns.Unstructured()

    @property
    def inputs(self) -> Inputs:
        """Which input a weight is pruned for, "left" or "dense"."""
        return "left"

    @property
    def relative(self) -> bool:
        """Whether each sample is divided by its root mean square first."""
        return False

    @property
    def damping(self) -> float:
        """Share of the Hessian's mean diagonal that solvers add to it."""
        return SparseGPT.damping

    @property
    def quantizes(self) -> bool:
        """Whether `solve` itself puts the kept weights on the matrix's levels."""
        return False

    @property
    def settings(self) -> dict[str, Any]:
        """What it was set to by name, without sparsity, pattern and allocation."""
        names = (field.name for field in dataclasses.fields(self))
        return {name: getattr(self, name) for name in names if name not in _CHOSEN}

    @property
    def bare(self) -> "Prune":
        """The pass without sparsity, pattern and allocation: what `solve` depends on.

        Programs are compiled for this value, so one serves every sparsity.
        """
        return dataclasses.replace(
            self, sparsity=None, pattern=None, allocation="layer"
        )

    def solve(self, matrix: Matrix) -> Solution:
        """The pruned matrix.

        Args:
          matrix: the weight, the statistics of its input, and how many units are kept.

        Returns:
          The new weight (in, out), its mask, True where kept, and the damping used.
        """
        raise NotImplementedError(f"{type(self).__name__} needs a method solve(matrix)")


_CHOSEN = {"sparsity", "pattern", "allocation"}


@dataclasses.dataclass(frozen=True)
class Magnitude(Prune):
    """Removes the smallest weights: |w|. The baseline; it looks at no activation.

    Reference:
      Han et al., "Learning both Weights and Connections for Efficient Neural Networks",
      2015, arXiv 1506.02626.
    """

    def solve(self, matrix: Matrix) -> Solution:
        """The pruned matrix."""
        return matrix.keep_highest(jnp.abs(matrix.weight))


@dataclasses.dataclass(frozen=True)
class ByInputs(Prune):
    """Base of the passes that look at a weight's inputs.

    Attributes:
      inputs: which input a weight is pruned for: "left" is the one that earlier pruned
        weights leave it, "dense" that of its layer while it is dense. "dense" gives the
        papers' masks, but where `prunable` leaves out a matrix of some layers alone:
        layers are then cut elsewhere.
      relative: whether each sample, a token say, is divided by the root mean square of
        its features first. As in the papers it is not, and a few tokens with massive
        activations are most of every sum.
    """

    _: dataclasses.KW_ONLY
    inputs: Inputs = "left"
    relative: bool = False

    def __post_init__(self) -> None:
        """Refuses inputs of another name."""
        if self.inputs not in get_args(Inputs):
            raise ValueError(
                f"a method's inputs must be one of {', '.join(get_args(Inputs))}, got "
                f"{self.inputs!r}"
            )

    @property
    def observes(self) -> frozenset[Observation]:
        """The mean square of each input feature."""
        return frozenset({"squares"})


@dataclasses.dataclass(frozen=True)
class Wanda(ByInputs):
    """Removes what changes its output least: |w_ij| sqrt(E[x_i^2]), by output.

    Reference:
      Sun, Liu, Bair, Kolter, "A Simple and Effective Pruning Approach for Large
      Language Models", 2023, arXiv 2306.11695, equation 1.
    """

    @property
    def usual_pattern(self) -> Pattern:
        """The weights of each output are ranked together."""
        return patterns.PerOutput()

    def solve(self, matrix: Matrix) -> Solution:
        """The pruned matrix."""
        return matrix.keep_highest(
            from_activations.wanda(matrix.weight, matrix.mean_square)
        )


@dataclasses.dataclass(frozen=True)
class RIA(ByInputs):
    """Relative importance and activations.

    (|w_ij| / sum_i |w_ij| + |w_ij| / sum_j |w_ij|) (sum x_i^2)^(power / 2): no input or
    output channel is emptied for being small as a whole.

    Attributes:
      power: exponent of the input's norm; the paper's is 1/2.

    Reference:
      Zhang, Bai, Lin, Zhao, Hou, Cannistraci, "Plug-and-Play: An Efficient
      Post-training Pruning Method for Large Language Models", ICLR 2024.
    """

    _: dataclasses.KW_ONLY
    power: float = 0.5

    def solve(self, matrix: Matrix) -> Solution:
        """The pruned matrix."""
        return matrix.keep_highest(
            from_activations.ria(matrix.weight, matrix.mean_square, self.power)
        )


@dataclasses.dataclass(frozen=True)
class SparseGPT(ByInputs):
    """Input by input, the kept weights make up for those that are removed.

    Attributes:
      damping: share of the Hessian's mean diagonal that is added to its diagonal.
      block: number of inputs whose mask is chosen together.

    Reference:
      Frantar, Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in
      One-Shot", 2023, arXiv 2301.00774, algorithm 1.
    """

    _: dataclasses.KW_ONLY
    damping: float = 0.01
    block: int = 128

    @property
    def observes(self) -> frozenset[Observation]:
        """The Hessian of the layer's squared error."""
        return frozenset({"hessian"})

    @property
    def quantizes(self) -> bool:
        """It does: later inputs make up for the quantization of earlier ones too."""
        return True

    def solve(self, matrix: Matrix) -> Solution:
        """The pruned matrix."""
        return sparsegpt.solve(
            matrix.weight,
            matrix.hessian,
            matrix.kept,
            pattern=matrix.pattern,
            damping=self.damping,
            block=self.block,
            quantization=matrix.quantization,
        )


@dataclasses.dataclass(frozen=True)
class ALPS(ByInputs):
    """Alternating directions on the layer's squared error, then the best weights.

    The stronger and slower solver; see `jaxprune.posttraining.solvers.alps`.

    Attributes:
      damping: share of the Hessian's mean diagonal that is added to its diagonal.

    Reference:
      Meng, Behdin, Wang, Mazumder, "ALPS: Improved Optimization for Highly Sparse
      One-Shot Pruning for Large Language Models", 2024, arXiv 2406.07831.
    """

    _: dataclasses.KW_ONLY
    damping: float = 0.01

    @property
    def observes(self) -> frozenset[Observation]:
        """The Hessian of the layer's squared error."""
        return frozenset({"hessian"})

    def solve(self, matrix: Matrix) -> Solution:
        """The pruned matrix."""
        return alps.solve(
            matrix.weight,
            matrix.hessian,
            matrix.kept,
            pattern=matrix.pattern,
            damping=self.damping,
        )


METHODS: dict[str, type[Prune]] = {
    "magnitude": Magnitude,
    "wanda": Wanda,
    "ria": RIA,
    "sparsegpt": SparseGPT,
    "alps": ALPS,
}
"""Each pruning pass by its name."""
