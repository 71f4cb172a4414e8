"""Post-training methods: what is kept of one matrix, and with which values.

A method is a frozen value with one pure function, `prune`: a matrix, the statistics of
its input and how many units are kept, to a new matrix and its mask. It is compiled once
for a shape, whatever the number that is kept.
"""

import dataclasses
import numbers
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, TypeAlias, get_args

import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

from jaxprune.arrays.messages import chosen
from jaxprune.masking import matrix_mask, patterns
from jaxprune.posttraining.solvers import alps, sparsegpt
from jaxprune.posttraining.solvers.layer_problem import Solution
from jaxprune.posttraining.solvers.rounding import Rounding
from jaxprune.scores import from_activations
from jaxprune.typing import Pattern

Name: TypeAlias = Literal["magnitude", "wanda", "ria", "sparsegpt", "alps"]
"""The methods by the names that commands give them."""


Needs: TypeAlias = Literal["nothing", "mean_square", "hessian"]
"""Which statistics of its input a method reads."""


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
      hessian: (in, in) float32, X^T X / samples; None where the method needs none.
      kept: how many units of the pattern are kept, uint32 scalar.
      pattern: which weights are pruned as a unit.
      rounding: the levels that the kept weights shall lie on, or None. Where a method
        ignores this field, `pruned` rounds the weights that the method returns.
    """

    weight: Float[Array, "in out"]
    mean_square: Float[Array, " in"]
    hessian: Any
    kept: Integer[Array, ""]
    pattern: Pattern
    rounding: Rounding | None = None


class Method(Protocol):
    """How one matrix is pruned.

    Three more attributes are optional. Where `relative` is true, each sample is divided
    by its root mean square before the statistics are summed up. Where `rounds` is true,
    `prune` itself rounds the kept weights to the levels of `Matrix.rounding`. Where
    `correction` is above 0, `prune` is given matrices that were changed to make up for
    what earlier matrices lost.

    Attributes:
      needs: which statistics of the input it reads.
      inputs: which input these statistics are of, "left" or "dense"; see `Inputs`.
      pattern: the pattern that its paper uses where nothing else is asked for.
    """

    @property
    def needs(self) -> Needs:
        """Which statistics of the input it reads."""

    @property
    def inputs(self) -> Inputs:
        """Which input that is."""

    @property
    def pattern(self) -> Pattern:
        """The pattern that its paper uses where nothing else is asked for."""

    def prune(self, matrix: Matrix) -> Solution:
        """The pruned matrix."""


@dataclasses.dataclass(frozen=True)
class Magnitude:
    """Removes the smallest weights: |w|. The baseline; it looks at no activation.

    Reference:
      Han et al., "Learning both Weights and Connections for Efficient Neural Networks",
      2015, arXiv 1506.02626.
    """

    needs: ClassVar[Needs] = "nothing"
    inputs: ClassVar[Inputs] = "left"
    pattern: ClassVar[Pattern] = patterns.Unstructured()

    def prune(self, matrix: Matrix) -> Solution:
        """The pruned matrix."""
        return _masked(matrix, jnp.abs(matrix.weight))


@dataclasses.dataclass(frozen=True)
class Wanda:
    """Removes what changes its output least: |w_ij| sqrt(E[x_i^2]), by output.

    Attributes:
      inputs: "dense" gives the paper's masks.
      relative: whether each sample, a token say, is divided by the root mean square of
        its features first. As in the paper it is not, and a few tokens with massive
        activations are most of every sum.

    Reference:
      Sun, Liu, Bair, Kolter, "A Simple and Effective Pruning Approach for Large
      Language Models", 2023, arXiv 2306.11695, equation 1.
    """

    inputs: Inputs = "left"
    relative: bool = False
    needs: ClassVar[Needs] = "mean_square"
    pattern: ClassVar[Pattern] = patterns.PerOutput()

    def prune(self, matrix: Matrix) -> Solution:
        """The pruned matrix."""
        return _masked(
            matrix, from_activations.wanda(matrix.weight, matrix.mean_square)
        )


@dataclasses.dataclass(frozen=True)
class RIA:
    """Relative importance and activations.

    (|w_ij| / sum_i |w_ij| + |w_ij| / sum_j |w_ij|) (sum x_i^2)^(power / 2): no input or
    output channel is emptied for being small as a whole.

    Attributes:
      power: of the input's norm; the paper's is 1/2.
      inputs: as of `Wanda`.
      relative: as of `Wanda`.

    Reference:
      Zhang, Bai, Lin, Zhao, Hou, Cannistraci, "Plug-and-Play: An Efficient
      Post-training Pruning Method for Large Language Models", ICLR 2024.
    """

    power: float = 0.5
    inputs: Inputs = "left"
    relative: bool = False
    needs: ClassVar[Needs] = "mean_square"
    pattern: ClassVar[Pattern] = patterns.Unstructured()

    def prune(self, matrix: Matrix) -> Solution:
        """The pruned matrix."""
        scores = from_activations.ria(matrix.weight, matrix.mean_square, self.power)
        return _masked(matrix, scores)


@dataclasses.dataclass(frozen=True)
class SparseGPT:
    """Input by input, the kept weights make up for those that are removed.

    Attributes:
      damping: added to the Hessian's diagonal, as a share of its mean.
      block: inputs whose mask is chosen together.
      inputs: as of `Wanda`.
      relative: as of `Wanda`.
      correction: the share of the error of earlier matrices that each matrix makes up
        for, in [0, 1]; see `jaxprune.posttraining.solvers.dense_target`. 0 is the
        paper's method. Above 0 the dense model runs beside the pruned one, so
        activations are held twice. Weights that are several matrices, such as experts,
        are solved without a correction.

    Reference:
      Frantar, Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in
      One-Shot", 2023, arXiv 2301.00774, algorithm 1.
    """

    damping: float = 0.01
    block: int = 128
    inputs: Inputs = "left"
    relative: bool = False
    correction: float = 0.0
    needs: ClassVar[Needs] = "hessian"
    pattern: ClassVar[Pattern] = patterns.Unstructured()
    rounds: ClassVar[bool] = True

    def prune(self, matrix: Matrix) -> Solution:
        """The pruned matrix."""
        return sparsegpt.solve(
            matrix.weight,
            matrix.hessian,
            matrix.kept,
            pattern=matrix.pattern,
            damping=self.damping,
            block=self.block,
            rounding=matrix.rounding,
        )


@dataclasses.dataclass(frozen=True)
class ALPS:
    """Alternating directions on the layer's squared error, then the best weights.

    The stronger and slower solver; see `jaxprune.posttraining.solvers.alps`.

    Attributes:
      damping: added to the Hessian's diagonal, as a share of its mean.
      inputs: as of `Wanda`.
      relative: as of `Wanda`.
      correction: as of `SparseGPT`.

    Reference:
      Meng, Behdin, Wang, Mazumder, "ALPS: Improved Optimization for Highly Sparse
      One-Shot Pruning for Large Language Models", 2024, arXiv 2406.07831.
    """

    damping: float = 0.01
    inputs: Inputs = "left"
    relative: bool = False
    correction: float = 0.0
    needs: ClassVar[Needs] = "hessian"
    pattern: ClassVar[Pattern] = patterns.Unstructured()

    def prune(self, matrix: Matrix) -> Solution:
        """The pruned matrix."""
        return alps.solve(
            matrix.weight,
            matrix.hessian,
            matrix.kept,
            pattern=matrix.pattern,
            damping=self.damping,
        )


METHODS: dict[str, Method] = {
    "magnitude": Magnitude(),
    "wanda": Wanda(),
    "ria": RIA(),
    "sparsegpt": SparseGPT(),
    "alps": ALPS(),
}
"""Each method with its usual settings, by its name."""


def pruned(method: Method, matrix: Matrix) -> Solution:
    """The matrix, pruned by a method and on its levels where it has a rounding."""
    found = method.prune(matrix)
    rounding = matrix.rounding
    if rounding is None or getattr(method, "rounds", False):
        return found
    if matrix.hessian is None:
        return found._replace(weight=rounding.nearest(found.weight))
    # What an input loses by rounding the later ones make up for, as in GPTQ.
    added = damping(method)
    rounded = sparsegpt.update(
        found.weight, matrix.hessian, found.mask, damping=added, rounding=rounding
    )
    return rounded._replace(damping=jnp.maximum(found.damping, rounded.damping))


def named(method: Method | Name) -> Method:
    """A method from its name in `METHODS`, or the method itself.

    Args:
      method: a name, or a value such as `SparseGPT(relative=True)`.

    Returns:
      The method.

    Raises:
      ValueError: the name is unknown, or a setting out of range.
      TypeError: it is neither a name nor a method.

    Example:
      >>> import jaxprune as jp
      >>> jp.methods.named("wanda")
      Wanda(inputs='left', relative=False)
    """
    choices = "or a value such as jp.methods.SparseGPT()"
    found = chosen("method", method, METHODS, "prune", choices)
    if found.inputs not in get_args(Inputs):
        raise ValueError(
            f"a method's inputs must be one of {', '.join(get_args(Inputs))}, got "
            f"{found.inputs!r}"
        )
    _check_correction(found)
    return found


def correction(method: Method) -> float:
    """The method's `correction`; 0 where the method has no such attribute."""
    return float(getattr(method, "correction", 0.0))


def damping(method: Method) -> float:
    """What is added to the Hessian's diagonal, as a share of its mean."""
    return float(getattr(method, "damping", SparseGPT.damping))


def _check_correction(method: Method) -> None:
    """Refuses a correction that is no share, or has nothing to make up for."""
    share = getattr(method, "correction", 0.0)
    real = isinstance(share, numbers.Real) and not isinstance(share, bool)
    if not (real and 0 <= share <= 1):
        raise ValueError(
            f"a method's correction must be a share in [0, 1], got {share!r}; 0.5 goes "
            "half of the way, and 0 does without"
        )
    if share and (method.inputs == "dense" or method.needs != "hessian"):
        raise ValueError(
            'a correction needs inputs="left" and a method that needs the Hessian, got '
            f"inputs={method.inputs!r} and needs={method.needs!r}; a matrix makes up "
            "for earlier ones by the inputs that they leave it"
        )


def _masked(matrix: Matrix, scores: Float[Array, "in out"]) -> Solution:
    """The matrix with its highest scores kept, as they are."""
    weight = matrix.weight
    mask = matrix_mask.mask(scores, matrix.kept, matrix.pattern)
    kept = jnp.where(mask, weight, jnp.zeros((), weight.dtype))
    return Solution(kept, mask, jnp.zeros((), weight.dtype))
