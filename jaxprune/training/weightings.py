"""How much each snapshot of a running average counts: its gain c(n) / S(n).

A weighted average A_n = sum_i c(i) x_i / S(n), S(n) = sum_i c(i), i = 1..n, is the
recurrence A_n = A_{n-1} + (c(n) / S(n)) (x_n - A_{n-1}). A weighting is the function
from n to that gain. All here are closed forms, so nothing but n is ever stored and no
error adds up over a million steps.
"""

import math
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.typing import Weighting

_TABLE = 64


def uniform() -> Weighting:
    """Every snapshot counts alike: c(i) = 1, gain 1 / n.

    Returns:
      A weighting.

    Example:
      >>> import jaxprune as jp
      >>> float(jp.weightings.uniform()(4))
      0.25
    """
    return lambda n: 1.0 / jnp.asarray(n, jnp.float32)


def power(p: float) -> Weighting:
    """Later snapshots count more: c(i) = i^p.

    S(n) is tabulated up to n = 64 and then taken from the Euler-Maclaurin expansion,
    whose relative error is under 1e-9 for p up to 8.

    Args:
      p: the power, 0 to 8; 0.5 is what the method's authors use.

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
    if not 0 <= p <= 8:
        raise ValueError(f"power(p) needs p from 0 to 8, got {p}; the authors use 0.5")
    counts = np.arange(1, _TABLE + 1, dtype=np.float64) ** p
    exact = counts / np.cumsum(counts)
    constant = float(counts.sum() - _TABLE**p * _euler_maclaurin(p, float(_TABLE)))

    def gain(n: jax.Array) -> jax.Array:
        at = jnp.maximum(n, 1).astype(jnp.float32)
        table = jnp.asarray(exact, jnp.float32)[jnp.minimum(n, _TABLE) - 1]
        return jnp.where(
            n <= _TABLE, table, 1.0 / (_euler_maclaurin(p, at) + constant * at**-p)
        )

    return lambda n: gain(jnp.asarray(n))


def exponential(decay: float) -> Weighting:
    """The bias-corrected exponential moving average: c(i) = decay^(-i).

    Args:
      decay: how much of the average each snapshot keeps, in (0, 1).

    Returns:
      A weighting; its gain is (1 - decay) / (1 - decay^n).

    Raises:
      ValueError: decay is out of range.

    Example:
      >>> import jaxprune as jp
      >>> float(jp.weightings.exponential(0.5)(1))
      1.0
    """
    if not 0 < decay < 1:
        raise ValueError(
            f"exponential(decay) needs 0 < decay < 1, got {decay}; use uniform() to "
            "forget nothing"
        )
    log_decay = np.float32(math.log(decay))
    return lambda n: (
        jnp.expm1(log_decay) / jnp.expm1(log_decay * jnp.asarray(n, jnp.float32))
    )


def _euler_maclaurin(p: float, n: float | jax.Array) -> jax.Array:
    """S(n) / n^p less its constant term zeta(-p) / n^p, for large n."""
    series = n / (p + 1) + 0.5 + p / (12 * n) - p * (p - 1) * (p - 2) / (720 * n**3)
    return cast(jax.Array, series)
