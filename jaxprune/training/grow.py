"""Which weights come back when masks change: the growth of sparse-to-sparse training.

At an event a part of what is kept is pruned beyond the schedule, and as much is grown
elsewhere, so that the number kept is the schedule's. The values are read as functions:
`jp.grow.gradient(0.3)`.

    RigL's (SET's)         ours
    delta T                `every` of the schedule
    T_end                  `end` of the schedule
    alpha (zeta)           `fraction`
    f_decay(t)             `part(step, first, last)`
    drop by |theta|        `criterion=jp.scores.magnitude` of `gradual`
    grow by |dL / dtheta|  `gradient`; (at random) `random`
    s^l by Erdos-Renyi     `allocation="erk"` of `gradual`
"""

import dataclasses
import math
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

from jaxprune.arrays import placement
from jaxprune.arrays.rules import is_between

__all__ = ["gradient", "random"]


def __dir__() -> list[str]:
    return __all__


class Grow(Protocol):
    """A rule of what comes back at an event.

    Attributes:
      reads_gradient: whether `scores` reads the gradient.
    """

    reads_gradient: bool

    def part(self, step: int, first: int, last: int) -> float:
        """The part of what is kept that is exchanged at an event, in [0, 1]."""

    def scores(
        self, gradient: jax.Array, step: jax.Array, leaf: int
    ) -> Float32[Array, "..."]:
        """What is grown first, higher first; of leaf number `leaf`."""


@dataclasses.dataclass(frozen=True)
class _Part:
    """The part that is exchanged, and how it falls."""

    fraction: float = 0.3
    decay: Literal["cosine", "constant"] = "cosine"

    def __post_init__(self) -> None:
        """Refuses what is out of range."""
        name = type(self).__name__
        if not is_between(self.fraction, 0, 1):
            raise ValueError(
                f"grow.{name} needs a fraction in [0, 1], got {self.fraction}"
            )
        if self.decay not in ("cosine", "constant"):
            raise ValueError(
                f"grow.{name} needs decay='cosine' or 'constant', got {self.decay!r}"
            )

    def part(self, step: int, first: int, last: int) -> float:
        """The part of what is kept that is exchanged at an event, in [0, 1]."""
        if self.decay == "constant":
            return self.fraction
        progress = (step - first) / max(last - first, 1)  # from 0 to 1
        return self.fraction / 2 * (1 + math.cos(math.pi * progress))


@dataclasses.dataclass(frozen=True)
class gradient(_Part):
    """What has the largest gradient grows: RigL.

    Args:
      fraction: part of what is kept that is exchanged at an event, in [0, 1].
      decay: "cosine" lets the fraction fall to zero at the last event, "constant" keeps
        it.

    Returns:
      A value for `jp.gradual(..., grow=...)`.

    Raises:
      ValueError: an argument is out of range.

    Example:
      >>> import jaxprune as jp
      >>> jp.grow.gradient(0.3)
      gradient(fraction=0.3, decay='cosine')

    Reference:
      Evci, Gale, Menick, Castro, Elsen, "Rigging the Lottery: Making All Tickets
      Winners", 2020, arXiv 1911.11134, section 3.
    """

    reads_gradient = True

    def scores(
        self, gradient: jax.Array, step: jax.Array, leaf: int
    ) -> Float32[Array, "..."]:
        """The gradient's magnitude."""
        del step, leaf
        # NaN would rank under what is kept already (minus infinity), which cannot grow.
        return jnp.nan_to_num(
            jnp.abs(gradient).astype(jnp.float32), nan=0, posinf=jnp.inf
        )


@dataclasses.dataclass(frozen=True)
class random(_Part):
    """What grows is drawn at random: SET.

    Args:
      fraction: part of what is kept that is exchanged at an event, in [0, 1].
      decay: "cosine" lets the fraction fall to zero at the last event, "constant" keeps
        it.
      seed: rng seed of the draws; each event and each leaf has draws of its own.

    Returns:
      A value for `jp.gradual(..., grow=...)`.

    Raises:
      ValueError: an argument is out of range.

    Example:
      >>> import jaxprune as jp
      >>> jp.grow.random(0.3, decay="constant")
      random(fraction=0.3, decay='constant', seed=0)

    Reference:
      Mocanu et al., "Scalable Training of Artificial Neural Networks with Adaptive
      Sparse Connectivity inspired by Network Science", 2018, arXiv 1707.04780.
    """

    seed: int = 0
    reads_gradient = False

    def scores(
        self, gradient: jax.Array, step: jax.Array, leaf: int
    ) -> Float32[Array, "..."]:
        """Uniform numbers, the same on any sharding."""
        key = jax.random.fold_in(jax.random.key(self.seed), step)
        uniform = jax.random.uniform(jax.random.fold_in(key, leaf), gradient.shape)
        return placement.placed(uniform, gradient)


def parse_growth(growth: Any) -> Grow | None:
    """A growth from its name, "rigl" or "set", or the value itself.

    Args:
      growth: name, a value of `jp.grow`, or None for no growth.

    Returns:
      The value.

    Raises:
      ValueError: the name is unknown.
      TypeError: it is no growth; a class that was not called, say.
    """
    if isinstance(growth, str) and growth not in ("rigl", "set"):
        raise ValueError(
            f"grow must be 'rigl', 'set' or a value of jp.grow, got {growth!r}"
        )
    if (
        growth is not None
        and not isinstance(growth, str)
        and (not (hasattr(growth, "scores") and not isinstance(growth, type)))
    ):
        raise TypeError(
            f"grow must be a value of jp.grow, got {growth!r}; call it, as in "
            "grow=jp.grow.gradient()"
        )
    if isinstance(growth, str):
        return {"rigl": gradient, "set": random}[growth]()
    return growth
