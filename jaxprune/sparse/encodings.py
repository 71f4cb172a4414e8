"""How the kept values of a matrix are stored: as they are, or as levels times scales.

Levels are those of `jp.passes.quantize`: symmetric, a scale for each row and group of
inputs. Two levels of four bits share a byte, the first in the low half, as in a compact
file.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jaxprune.posttraining.solvers.quantization import BITS, Quantization

WORD = 32
"""Rows are filled up to whole words of so many weights."""
SPARE = 64
"""Elements behind the last value: a vector load may read past the end."""
DTYPES: dict[str, np.dtype] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
"""The dtypes in which values are kept as they are."""


class Levels(NamedTuple):
    """A matrix on levels.

    Attributes:
      levels: int8 (rows, in).
      scales: float32 (rows, groups).
      group: number of inputs that share a scale.
    """

    levels: np.ndarray
    scales: np.ndarray
    group: int


def to_levels(rows: np.ndarray, name: str, group: int) -> Levels:
    """The nearest levels of a matrix, and their scales.

    Args:
      rows: floating (rows, in).
      name: "int8" or "int4".
      group: number of inputs that share a scale, a multiple of 16; 0 for whole rows.

    Returns:
      Levels and scales. A scale is that with the least squared error, a bfloat16.
    """
    inputs = rows.shape[1]
    # A group of a whole row is what `Quantization` makes of one that is longer.
    grid = Quantization(BITS[name], group or max(16, -(-inputs // 16) * 16))
    width = max(1, min(grid.group, inputs))
    wide = np.pad(rows.astype(np.float32), ((0, 0), (0, -inputs % width)))
    # (rows, groups, group)
    groups = wide.reshape(len(rows), wide.shape[1] // width, width)
    if not groups.size:
        empty = np.zeros((len(rows), groups.shape[1]), np.float32)
        return Levels(np.zeros(rows.shape, np.int8), empty, width)
    scales = np.asarray(_scales(jnp.asarray(groups), grid))  # (rows, groups)
    # No level is NaN: the scale of a group that is not finite says it.
    scales = np.where(np.isfinite(groups).all(axis=-1), scales, np.float32(np.nan))
    with np.errstate(invalid="ignore"):
        levels = np.nan_to_num(np.rint(groups / scales[..., None]))
    levels = np.clip(levels, -grid.most, grid.most)
    levels = levels.reshape(wide.shape)[:, :inputs].astype(np.int8)
    return Levels(levels, scales, width)


def _scales(groups: jax.Array, grid: Quantization) -> jax.Array:
    """The scale of each group, (rows, groups)."""
    by_row = jax.vmap(grid.scale)  # of (rows, group, out), out being the groups
    return by_row(jnp.swapaxes(groups, 1, 2))


def store(values: np.ndarray, name: str) -> np.ndarray:
    """Kept values as they are stored, with spare elements behind them.

    Args:
      values: (kept,), of the dtype that the name says, or int8 levels.
      name: "float32", "bfloat16", "float16", "int8" or "int4".

    Returns:
      (kept + spare,) in that dtype, int8, or uint8 with two levels a byte.
    """
    padded = np.pad(values, (0, SPARE))
    if name != "int4":
        return padded
    nibbles = (
        np.pad(padded, (0, padded.size % 2)).view(np.uint8) & 15
    )  # two's complement of four bits
    return nibbles[0::2] | nibbles[1::2] << 4


def stored_values(values: jax.Array | np.ndarray, name: str) -> np.ndarray:
    """What `store` was given and its spare elements; of int4 there may be one more."""
    stored = np.asarray(values)
    if name != "int4":
        return stored
    nibbles = np.stack([stored & 15, stored >> 4], axis=1).reshape(-1)
    return ((nibbles ^ 8).astype(np.int8) - 8).astype(np.int8)


def load(values: jax.Array, positions: jax.Array, name: str) -> jax.Array:
    """The values at some positions: floats as they are, levels of int8 as float32."""
    return decode(as_bits(values)[positions], name)


def as_bits(values: jax.Array) -> jax.Array:
    """Stored values as unsigned integers of their width, to be picked as they are."""
    # A platform without two-byte floats computes in wider ones, and what a NaN says
    # besides would be lost.
    form = jnp.dtype(f"uint{8 * values.dtype.itemsize}")
    return jax.lax.bitcast_convert_type(values, form)


def decode(bits: jax.Array, name: str) -> jax.Array:
    """The values of which `as_bits` gave these: floats, or levels as float32.

    Args:
      bits: unsigned integers (..., stored).
      name: how they are stored.

    Returns:
      (..., stored), or twice as many of "int4".
    """
    if name == "int4":
        pairs = bits.astype(jnp.int32)
        nibbles = jnp.stack([pairs & 15, pairs >> 4], axis=-1)  # (..., stored, 2)
        levels = ((nibbles ^ 8) - 8).astype(jnp.float32)  # the fourth bit is the sign
        return levels.reshape(*bits.shape[:-1], 2 * bits.shape[-1])
    if name == "int8":
        return jax.lax.bitcast_convert_type(bits, jnp.int8).astype(jnp.float32)
    return jax.lax.bitcast_convert_type(bits, DTYPES[name])


def stored_bytes(count: int, name: str) -> int:
    """The bytes of so many values, spare elements left out."""
    bits = BITS.get(name) or 8 * DTYPES[name].itemsize
    return math.ceil(count * bits / 8)
