"""How an average is held: float32, or in two bytes or one by dithered rounding.

A running average moves by less than a bfloat16 can show, so rounding to the nearest
would stop it. Rounded up with the probability of the remainder it is right on average;
here the threshold is no fresh random number but a low-discrepancy sequence over the
snapshots, u(n) = frac(u(0) + n / golden ratio), started elsewhere for each position. A
value that moves by a tenth of a step at each snapshot goes up at very nearly every
tenth, so the errors of many roundings cancel instead of adding up.

The one-byte code holds the sign and seven bits of log2(1 + |x| / unit): steps of
1/16 of the unit near zero, of 3 to 6 % above it, up to 247 units. The unit is a power
of two, one for each leaf. What is never negative (squares, magnitudes) has eight bits,
up to 61,439 units. A value of the code is rounded to itself.
"""

import dataclasses
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, BFloat16, Float32, Int32, UInt32

from jaxprune.arrays import counting
from jaxprune.arrays.messages import listed, one_line

__all__ = ["Int8", "decode"]


def __dir__() -> list[str]:
    return __all__


Storage: TypeAlias = Literal["float32", "bfloat16", "int8"]
"""What an average is held in: 4, 2 or 1 bytes a weight."""

STORAGES: tuple[Storage, ...] = ("float32", "bfloat16", "int8")

_GOLDEN = 0x9E3779B9  # 2^32 / golden ratio: the step of the sequence over snapshots
_PLASTIC = 0xC13FA9A9  # 2^32 / plastic ratio: its start moves by this along a leaf
_MANTISSA = 4  # bits of the one-byte code below a factor of two
_DROPPED = 23 - _MANTISSA
_ONE = 0x3F800000  # the bits of 1.0
_NAN = -128
_LEAST = -120  # 2^-120 / 16, the finest step, is a normal number still


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8:
    """A floating leaf in one byte a number; `np.asarray` and `decode` give float32.

    Attributes:
      codes: int8, of the leaf's shape; -128 is NaN.
      exponent: int32 scalar, the unit is two to this power.
      signed: whether a code has a sign (static).
    """

    codes: jax.Array
    exponent: jax.Array
    signed: bool = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """The leaf's shape."""
        return self.codes.shape

    @property
    def ndim(self) -> int:
        """How many axes the leaf has."""
        return self.codes.ndim

    @property
    def size(self) -> int:
        """How many numbers the leaf holds."""
        return self.codes.size

    @property
    def dtype(self) -> np.dtype:
        """What the leaf stands for: float32."""
        return np.dtype(np.float32)

    def count_nonzero(self) -> jax.Array:
        """How many numbers are not zero, `counting.parts`."""
        zero = 0 if self.signed else -127
        return counting.parts(self.codes != zero, self.codes.size)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(decode(self), dtype, copy=copy)


def is_int8(node: Any) -> bool:
    """Whether a node is a leaf held in one byte."""
    return isinstance(node, Int8)


def with_exponents(codes: Any, exponents: Any, *, signed: bool) -> Any:
    """A tree of codes with its scalars in order, as `Int8` leaves; else as it is."""
    scalars = jax.tree.leaves(exponents)
    if not scalars:
        return codes
    leaves, structure = jax.tree.flatten(codes)
    pairs = zip(leaves, scalars, strict=True)
    return jax.tree.unflatten(structure, [Int8(*pair, signed) for pair in pairs])


def checked_storage(storage: str) -> Storage:
    """The storage that a user asked for, or an error that names those there are."""
    if not isinstance(storage, str) or storage not in STORAGES:
        raise ValueError(
            f"storage must be one of {listed(STORAGES)}, got {one_line(repr(storage))}"
        )
    return storage


def dither(
    shape: tuple[int, ...], start: UInt32[Array, ""] | np.uint32, n: jax.Array | int
) -> UInt32[Array, "*shape"]:
    """The thresholds u(n) of a leaf, in units of 2^-32.

    They depend on position, start and n alone, so on no sharding.

    Args:
      shape: shape of the leaf.
      start: threshold u(0) of its first element; see `phase`.
      n: number of the snapshot, a scalar.

    Returns:
      uint32, of that shape, evenly spread over positions and over n.
    """
    moved = jnp.asarray(n).astype(np.uint32) * np.uint32(_GOLDEN)
    return start + moved + flat_index(shape, _PLASTIC)


def phase(stream: int) -> np.uint32:
    """Where the thresholds of a leaf start: MurmurHash3's finaliser of its seed."""
    bits = stream & 0xFFFFFFFF
    bits = (bits ^ (bits >> 16)) * 0x85EBCA6B & 0xFFFFFFFF
    bits = (bits ^ (bits >> 13)) * 0xC2B2AE35 & 0xFFFFFFFF
    return np.uint32(bits ^ (bits >> 16))


def flat_index(shape: tuple[int, ...], factor: int = 1) -> UInt32[Array, "*shape"]:
    """Each element's row-major position times any integer factor, modulo 2^32."""
    index, stride = jnp.zeros((1,) * len(shape), np.uint32), factor
    for axis in reversed(range(len(shape))):
        along = [1] * len(shape)
        along[axis] = shape[axis]
        iota = jax.lax.broadcasted_iota(np.uint32, along, axis)
        index = index + iota * np.uint32(stride & 0xFFFFFFFF)
        stride *= shape[axis]
    return index


def unit_exponent(
    values: Float32[Array, "*shape"], *, signed: bool
) -> Int32[Array, ""]:
    """The power of two that the one-byte code of these values counts in.

    The largest value lies between a quarter and half of the range, so that an average
    may double before the code saturates.

    Args:
      values: float32 array of any shape.
      signed: whether there are negative ones.

    Returns:
      An int32 scalar from -120 to 121; -120 where a value is infinite.
    """
    # The range is 2^8 units with a sign and 2^16 without; 7 and 15 leave half of it.
    largest = jnp.max(jnp.abs(values), initial=0)
    above = (_bits(largest) >> 23) - 126  # largest < 2^above
    fitted = jnp.maximum(above - (7 if signed else 15), _LEAST).astype(np.int32)
    return jnp.where(largest < jnp.inf, fitted, _LEAST)


def largest(leaf: Int8) -> Float32[Array, ""]:
    """The largest magnitude that a leaf holds; NaN may count as the largest code.

    Args:
      leaf: a leaf in one byte.

    Returns:
      A float32 scalar. Only codes are read, and nothing but a scalar is made of them.
    """
    code = jnp.max(leaf.codes, initial=_NAN + 1).astype(np.int32)
    if leaf.signed:
        lowest = jnp.min(leaf.codes, initial=0).astype(np.int32)
        code = jnp.minimum(jnp.maximum(code, -lowest), 127)
    return decode(Int8(code, leaf.exponent, leaf.signed))


def encode_int8(
    values: Float32[Array, "*shape"],
    exponent: Int32[Array, ""],
    thresholds: UInt32[Array, "*#shape"],
    *,
    signed: bool,
) -> Int8:
    """Rounds to the one-byte code, unbiased; saturates outside its range.

    Args:
      values: float32 array of any shape; not negative unless `signed`.
      exponent: power of two of the unit; see `unit_exponent`.
      thresholds: thresholds of the rounding; see `dither`.
      signed: whether codes have a sign.

    Returns:
      The leaf; what was not finite is NaN.
    """
    # The bits of 1 + x are its logarithm, but for linear pieces between powers of two.
    above_one = 1 + jnp.abs(values) * power_of_two(-exponent)
    noise = (thresholds >> np.uint32(32 - _DROPPED)).astype(np.int32)
    code = (_bits(above_one) - np.int32(_ONE) + noise) >> _DROPPED
    if signed:
        code = jnp.minimum(code, 127)
        code = jnp.where(values < 0, -code, code)
    else:
        code = jnp.minimum(code, 254) - 127
    code = jnp.where(jnp.isfinite(values), code, _NAN)
    return Int8(code.astype(np.int8), exponent, signed)


def encode_bfloat16(
    values: Float32[Array, "*shape"], thresholds: UInt32[Array, "*#shape"]
) -> BFloat16[Array, "*shape"]:
    """Rounds to bfloat16, unbiased.

    Args:
      values: float32 array of any shape.
      thresholds: thresholds of the rounding; see `dither`.

    Returns:
      bfloat16, of that shape; infinity and NaN are kept.
    """
    noise = jnp.where(jnp.isfinite(values), thresholds >> np.uint32(16), 0)
    high = (jax.lax.bitcast_convert_type(values, np.uint32) + noise) >> np.uint32(16)
    return jax.lax.bitcast_convert_type(high.astype(np.uint16), jnp.bfloat16)


def decode(leaf: Any) -> Float32[Array, "..."]:
    """A held leaf as float32.

    Args:
      leaf: a floating array or an `Int8`, in device or host memory.

    Returns:
      float32 in device memory, placed like the leaf.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxprune.arrays import low_bit
      >>> low_bit.decode(jnp.ones(2, jnp.bfloat16))
      Array([1., 1.], dtype=float32)
    """
    leaf = on_device(leaf)
    if not is_int8(leaf):
        return leaf.astype(np.float32)
    code = leaf.codes.astype(np.int32)
    size = jnp.abs(code) if leaf.signed else code + 127
    above_one = _float((size << _DROPPED) + np.int32(_ONE))
    unit = power_of_two(leaf.exponent)
    if unit.ndim:  # one for each of the leaves that `vmap` stacked
        unit = unit.reshape(unit.shape + (1,) * (code.ndim - unit.ndim))
    value = (above_one - 1) * unit
    if leaf.signed:
        value = jnp.where(code < 0, -value, value)
    return jnp.where(code == _NAN, np.float32(np.nan), value)


def on_device(tree: Any) -> Any:
    """The tree with every array in device memory; those that are there stay."""
    return _moved(tree, jax.memory.Space.Device)


def on_host(tree: Any) -> Any:
    """The tree with every array in pinned host memory, placed as it was."""
    return _moved(tree, jax.memory.Space.Host)


def _moved(tree: Any, space: Any) -> Any:
    def move(leaf: Any) -> Any:
        in_space = jax.typeof(leaf).memory_space == space
        return leaf if in_space else jax.device_put(leaf, space)

    return jax.tree.map(move, tree)


def _bits(values: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(values, np.int32)


def _float(bits: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(bits, np.float32)


def power_of_two(exponent: jax.Array) -> jax.Array:
    """2^exponent, exact on every backend, for exponents of normal numbers."""
    return _float((exponent + 127) << 23)
