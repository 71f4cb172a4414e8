"""Floats as integers in their order, and how many lie at or above some of them.

Floats of one width are ordered by their bits; -0 and +0 rank alike, NaN ranks lowest,
under minus infinity. Integers are compared and not floats, because some backends take
subnormal numbers for zero.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt, UInt32


class Line(NamedTuple):
    """The ranks of the floats of one width as positions 0, 1, 2, ...

    All scores, NaN too, lie at 0 or above, none at `top`.
    """

    signed: np.dtype  # of ranks
    unsigned: np.dtype  # of positions
    top: int  # the position over infinity

    @classmethod
    def of(cls, *dtypes: Any) -> "Line":
        """The positions of bfloat16, float32 or float64, the first that holds these."""
        # Not by promotion: a user may have forbidden it, and of one byte there is none.
        sizes = [1 if d == jnp.bfloat16 else np.dtype(d).itemsize for d in dtypes]
        holding: dict[int, Any] = {1: jnp.bfloat16, 8: np.float64}
        dtype = np.dtype(holding.get(max(sizes), np.float32))
        info = jnp.finfo(dtype)
        infinity = int(np.array(np.inf, dtype).view(f"int{info.bits}"))
        return cls(
            np.dtype(f"int{info.bits}"),
            np.dtype("uint64" if info.bits == 64 else "uint32"),
            (1 << info.bits - 1) + infinity + 1,
        )

    def rank(self, position: UInt[Array, "..."]) -> Int[Array, "..."]:
        """The rank at a position."""
        zero = self.unsigned.type(1 << np.iinfo(self.signed).bits - 1)
        return (position - zero).astype(self.signed)


def of(scores: Float[Array, "..."], signed: Any) -> Int[Array, "..."]:
    """The ranks of scores as such integers; narrower scores are widened first."""
    info = np.iinfo(signed)
    if scores.dtype.itemsize * 8 != info.bits:
        scores = scores.astype("bfloat16" if info.bits == 16 else f"float{info.bits}")
    integer, infinity = info.dtype.type, np.array(np.inf, scores.dtype).view(info.dtype)
    bits = jax.lax.bitcast_convert_type(scores, signed)
    size = bits & integer(info.max)
    ranks = jnp.where(bits < 0, -size, size)
    return jnp.where(size > infinity, integer(info.min), ranks)


def count_true(
    flags: Sequence[Bool[Array, "..."]], axes: Sequence[int]
) -> Sequence[UInt32[Array, "..."]]:
    """How many are True over the axes, in one read of what the flags come from."""
    # One reduction of several operands: XLA fuses it with what makes the flags, where
    # on a CPU it writes them out before a reduction of one.
    zeros = (np.uint32(0),) * len(flags)
    ones = tuple(flag.astype(np.uint32) for flag in flags)

    def add(a: Sequence[jax.Array], b: Sequence[jax.Array]) -> list[jax.Array]:
        return [x + y for x, y in zip(a, b, strict=True)]

    return jax.lax.reduce(ones, zeros, add, tuple(axes))
