"""The words of the package: what importance, scores, masks and patterns are.

Polarity, everywhere: a higher score is kept, and a mask is True where a weight is
kept. A leaf that must not be pruned is `optax.MaskedNode()` in scores and masks.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

import jax
from jaxtyping import Array, Bool, Float

from jaxprune.arrays.axes import Axes

Params: TypeAlias = Any
"""A pytree of arrays: dict, tuple, Linen or NNX state, Equinox module."""

Scores: TypeAlias = Any
"""Like Params, floating; higher is kept; `optax.MaskedNode()` where unprunable."""

Masks: TypeAlias = Any
"""Like Params, boolean; True is kept; `optax.MaskedNode()` where unprunable."""

Weighting: TypeAlias = Callable[[jax.Array], jax.Array]
"""Snapshot index i = 1, 2, ... (int32 scalar) to its gain c(i) / S(i) (float32)."""

Prunable: TypeAlias = Callable[[str, Any], bool]
"""Path name and leaf to whether the leaf may be pruned."""

PrunableLike: TypeAlias = Prunable | str | Sequence[str]
"""A `Prunable`, or globs on path names: the matrices whose names match one."""


class Importance(NamedTuple):
    """What was accumulated over training; a field is None where nobody tracked it.

    Attributes:
      weight: weighted average of the weights, like the parameters.
      magnitude: weighted average of their magnitudes |w|.
      square: average of the squared gradients g^2, or an adaptive optimizer's own
        second moment, in that optimizer's dtype.
      taylor: average of |w g|.

    A leaf is as it is held: float32, bfloat16 or a `low_bit.Int8`, of which
    `low_bit.decode(leaf)` or `np.asarray(leaf)` makes float32. Criteria take any.
    """

    weight: Params | None = None
    magnitude: Params | None = None
    square: Params | None = None
    taylor: Params | None = None


class Criterion(Protocol):
    """A function that says how much each weight matters."""

    def __call__(self, params: Params, importance: Any = None) -> Scores:
        """Scores like `params`; `importance` is an `Importance`, a state, or None."""


class Pattern(Protocol):
    """Which weights are pruned together, and how those that are kept may lie.

    It is hashable, as a frozen dataclass is: a program is compiled for each pattern.

    Attributes:
      sparsity: the share that the pattern itself fixes, or None where it is free.
    """

    @property
    def sparsity(self) -> float | None:
        """The share that the pattern itself fixes, or None where it is free."""

    def problem(self, shape: tuple[int, ...], axes: Axes) -> str | None:
        """Why a leaf of this shape cannot take the pattern, or None if it can."""

    def units(
        self, scores: Float[Array, "*shape"], axes: Axes
    ) -> Float[Array, "*units"]:
        """The scores of the units that are pruned together."""

    def expand(
        self, kept: Bool[Array, "*units"], shape: tuple[int, ...], axes: Axes
    ) -> Bool[Array, "*shape"]:
        """The mask of a leaf of this shape from the mask of its units."""
