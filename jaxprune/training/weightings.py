"""How much each snapshot of a running average counts: its gain c(n) / S(n).

A weighted average A_n = sum_i c(i) x_i / S(n), S(n) = sum_i c(i), i = 1..n, is the
recurrence A_n = A_{n-1} + (c(n) / S(n)) (x_n - A_{n-1}). A weighting is a frozen value
that is called with n and gives that gain. All here are closed forms, so nothing but n
is ever stored and no error adds up over a million steps. The classes are lower case
because they are read as functions: `jp.weightings.power(0.5)`.
"""

import dataclasses
import functools
import math
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int

from jaxprune.arrays.rules import is_between

__all__ = ["exponential", "power", "uniform"]


def __dir__() -> list[str]:
    return __all__


# Snapshots whose gains are summed one by one; later ones come from an expansion.
_TABLE = 64


@dataclasses.dataclass(frozen=True)
class uniform:
    """Every snapshot counts alike: c(i) = 1, gain 1 / n.

    Returns:
      A weighting.

    Example:
      >>> import jaxprune as jp
      >>> float(jp.weightings.uniform()(4))
      0.25
    """

    def __call__(self, n: Int[Array, ""] | int) -> Float32[Array, ""]:
        """The gain of snapshot n, float32."""
        return 1.0 / jnp.asarray(n, jnp.float32)


@dataclasses.dataclass(frozen=True)
class power:
    """Later snapshots count more: c(i) = i^p.

    S(n) is tabulated up to n = 64 and then taken from the Euler-Maclaurin expansion,
    whose relative error is under 1e-9 for p up to 8.

    Args:
      p: power, 0 to 8; 0.5 is what the method's authors use.

    Returns:
      A weighting.

    Raises:
      ValueError: p is out of range.

    Example:
      >>> import jaxprune as jp
      >>> round(float(jp.weightings.power(1.0)(3)), 6)  # 3 / (1 + 2 + 3)
      0.5

    Reference:
      Islam, Belhaouari, Bermak, "Neural Network Optimization with Weight Evolution",
      2023 (p = 0.5, one snapshot an epoch).
    """

    p: float

    def __post_init__(self) -> None:
        """Refuses powers outside of 0 to 8."""
        if not is_between(self.p, 0, 8):
            raise ValueError(
                f"power(p) needs p from 0 to 8, got {self.p}; the authors use 0.5"
            )

    def __call__(self, n: Int[Array, ""] | int) -> Float32[Array, ""]:
        """The gain of snapshot n, float32."""
        n = jnp.asarray(n)
        gains, constant = _tabulated(self.p)
        x = jnp.maximum(n, 1).astype(jnp.float32)
        exact = jnp.asarray(gains, jnp.float32)[jnp.minimum(n, _TABLE) - 1]
        # c(n) / S(n), both over n^p: neither leaves the range of float32.
        expansion = 1.0 / (_euler_maclaurin(self.p, x) + constant * x**-self.p)
        return jnp.where(n <= _TABLE, exact, expansion)


@dataclasses.dataclass(frozen=True)
class exponential:
    """The bias-corrected exponential moving average: c(i) = decay^(-i).

    Args:
      decay: part of the average that each snapshot keeps, in (0, 1).

    Returns:
      A weighting; its gain is (1 - decay) / (1 - decay^n).

    Raises:
      ValueError: decay is out of range.

    Example:
      >>> import jaxprune as jp
      >>> float(jp.weightings.exponential(0.5)(1))
      1.0
    """

    decay: float

    def __post_init__(self) -> None:
        """Refuses a decay outside of (0, 1)."""
        if not (is_between(self.decay, 0, 1) and 0 < self.decay < 1):
            raise ValueError(
                f"exponential(decay) needs 0 < decay < 1, got {self.decay}; use "
                "uniform() to forget nothing"
            )

    def __call__(self, n: Int[Array, ""] | int) -> Float32[Array, ""]:
        """The gain of snapshot n, float32."""
        log_decay = np.float32(math.log(self.decay))
        # (1 - decay) / (1 - decay^n) by expm1: near 1 the differences would cancel.
        return jnp.expm1(log_decay) / jnp.expm1(log_decay * jnp.asarray(n, jnp.float32))


@functools.cache
def _tabulated(p: float) -> tuple[np.ndarray, float]:
    """The first gains, and the constant term of S(n)."""
    counts = np.arange(1, _TABLE + 1, dtype=np.float64) ** p
    constant = float(counts.sum() - _TABLE**p * _euler_maclaurin(p, float(_TABLE)))
    return counts / np.cumsum(counts), constant


def _euler_maclaurin(p: float, n: float | jax.Array) -> jax.Array:
    """S(n) / n^p less its constant term zeta(-p) / n^p, for large n."""
    series = n / (p + 1) + 0.5 + p / (12 * n) - p * (p - 1) * (p - 2) / (720 * n**3)
    return cast(jax.Array, series)
