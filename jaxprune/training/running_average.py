"""Running averages of whole trees, updated leaf by leaf, in any storage.

A_n = A_{n-1} + gain(n) (x_n - A_{n-1}), in float32; only the leaf at hand is ever wide,
and with averages in host memory only that one is on the device.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32
from optax import MaskedNode

from jaxprune.arrays import low_bit, placement, tree
from jaxprune.arrays.low_bit import Storage
from jaxprune.typing import Params

Memory: TypeAlias = Literal["device", "pinned_host"]
"""Where an average is between two snapshots."""


class Statistic(NamedTuple):
    """The number of a weight that is averaged.

    Attributes:
      function: function of the leaves of the averaged trees, float32; where the
        magnitudes of its arguments grow, its own magnitude must not fall.
      signed: whether it can be negative.
      skips_nonfinite: whether a number that is not finite is passed over.
    """

    function: Callable[..., jax.Array]
    signed: bool
    skips_nonfinite: bool


class AverageLeaves(NamedTuple):
    """An average as a state holds it: an array a leaf, whatever the storage.

    A container in an array's place would not do: NNX's optimizer makes a `State` of it
    at the first step, and the second step would be another program.

    Attributes:
      leaves: tree like the parameters; codes where the storage is "int8".
      exponents: int32 scalars, one for each leaf of codes, in order.
    """

    leaves: Params
    exponents: tuple[jax.Array, ...]

    @classmethod
    def of(cls, structure: Any, leaves: list[Any]) -> "AverageLeaves":
        """The leaves, arrays or `low_bit.Int8`, taken apart."""
        codes = [leaf.codes if low_bit.is_int8(leaf) else leaf for leaf in leaves]
        exponents = tuple(leaf.exponent for leaf in leaves if low_bit.is_int8(leaf))
        return cls(jax.tree.unflatten(structure, codes), exponents)


@dataclasses.dataclass(frozen=True)
class Average:
    """What is averaged and how it is held.

    Attributes:
      statistic: number of a weight that is averaged.
      storage: "float32", "bfloat16" or "int8".
      memory: "device" or "pinned_host".
      stream: rng seed of the stochastic rounding; different for each average.
    """

    statistic: Statistic
    storage: Storage
    memory: Memory
    stream: int

    def start(self, params: Params, *, from_values: bool) -> AverageLeaves:
        """Before any snapshot: of the parameters, or zero; of floating leaves only."""

        def first(number: int, leaf: Any) -> Any:
            if not tree.is_floating(leaf):
                return MaskedNode()
            abstract = isinstance(leaf, jax.ShapeDtypeStruct)
            value = jnp.zeros_like(leaf) if abstract else leaf
            phase = low_bit.phase(self.stream + number)
            return _first_average(value, phase, self, from_values and not abstract)

        structure: Any
        leaves, structure = jax.tree.flatten(params, is_leaf=tree.is_excluded)
        averages = [first(number, leaf) for number, leaf in enumerate(leaves)]
        return AverageLeaves.of(structure, averages)

    def update(
        self,
        average: AverageLeaves,
        gain: Float32[Array, ""],
        n: Int32[Array, ""],
        *trees: Params,
    ) -> AverageLeaves:
        """The average after snapshot n = 1, ..., by its gain c(n) / S(n)."""
        structure: Any
        joined = low_bit.with_exponents(*average, signed=self.statistic.signed)
        old, structure = jax.tree.flatten(joined, is_leaf=tree.is_leaf)
        # The arguments of the statistic, leaf by leaf.
        inputs = list(zip(*map(structure.flatten_up_to, trees), strict=True))

        tracked = [i for i, leaf in enumerate(old) if not tree.is_excluded(leaf)]
        exponents = self._exponents(old, inputs, tracked, n)
        if exponents is not None or self.memory == "pinned_host":
            # The inputs are written down once and read from there; made again for
            # each reader, they would keep their own inputs alive until the step's end.
            inputs, exponents = jax.lax.optimization_barrier((inputs, exponents))
        new = list(old)
        for before, number in zip([None, *tracked], tracked, strict=False):
            if self.memory == "pinned_host" and before is not None:
                # One after the other, so that one leaf at a time is on the device.
                old[number], new[before] = jax.lax.optimization_barrier(
                    (old[number], new[before])
                )
            exponent = None if exponents is None else exponents[number]
            value = self._moved(low_bit.decode(old[number]), inputs[number], gain)
            phase = low_bit.phase(self.stream + number)
            new[number] = self._encode(value, phase, n, exponent)
        placed = [leaf if tree.is_excluded(leaf) else self._put(leaf) for leaf in new]
        return AverageLeaves.of(structure, placed)

    def _moved(
        self,
        average: Float32[Array, "*shape"],
        inputs: tuple[jax.Array, ...],
        gain: Float32[Array, ""],
    ) -> Float32[Array, "*shape"]:
        """A_{n-1} + gain (x_n - A_{n-1}) of one leaf."""
        value = self.statistic.function(*map(_widened, inputs))
        moved = average + gain * (value - average)
        if not self.statistic.skips_nonfinite:
            return moved
        # In the end: between square and subtraction it would decide which of XLA's
        # loops round the square, and bits would depend on the sharding.
        return jnp.where(jnp.isfinite(moved), moved, average)

    def _encode(
        self,
        value: Float32[Array, "*shape"],
        phase: jax.Array | np.uint32,
        n: jax.Array | int,
        exponent: Int32[Array, ""] | None,
    ) -> Any:
        """A leaf as it is held."""
        if self.storage == "float32":
            return value
        thresholds = low_bit.dither(value.shape, phase, n)
        if self.storage == "bfloat16":
            return low_bit.encode_bfloat16(value, thresholds)
        if exponent is None:
            exponent = low_bit.unit_exponent(value, signed=self.statistic.signed)
        return low_bit.encode_int8(
            value, exponent, thresholds, signed=self.statistic.signed
        )

    def _exponents(
        self,
        average: list[Any],
        inputs: list[tuple[jax.Array, ...]],
        tracked: list[int],
        n: jax.Array,
    ) -> dict[int, jax.Array] | None:
        """The units of the one-byte codes, fitted now and then.

        At n = 1, 2, 4, ... and at every 64th snapshot, to the average and what it moves
        towards; in between nothing can leave the range but what grows suddenly.
        """
        if self.storage != "int8":
            return None

        def fitted(number: int) -> jax.Array:
            old = low_bit.largest(low_bit.on_device(average[number]))
            # The statistic grows with the size of its inputs: no value is larger.
            new = self.statistic.function(*map(_largest, inputs[number]))
            signed = self.statistic.signed
            return jnp.maximum(
                low_bit.unit_exponent(old, signed=signed),
                low_bit.unit_exponent(new, signed=signed),
            )

        exponents = jax.lax.cond(
            ((n & (n - 1)) == 0) | (n % 64 == 0),
            lambda: [fitted(i) for i in tracked],
            lambda: [low_bit.on_device(average[i].exponent) for i in tracked],
        )
        return dict(zip(tracked, exponents, strict=True))

    def _put(self, leaf: Any) -> Any:
        return low_bit.on_host(leaf) if self.memory == "pinned_host" else leaf


@functools.partial(jax.jit, static_argnums=(2, 3))
def _first_average(
    leaf: jax.Array, phase: np.uint32, average: Average, from_values: bool
) -> Any:
    """A leaf's average before the first snapshot, in a buffer of its own."""
    value = placement.zeros_like(leaf, np.float32)
    if from_values:
        # Returned as it is, the parameter's own buffer would be shared.
        value = jnp.array(average.statistic.function(leaf), np.float32, copy=True)
    return average._put(average._encode(value, phase, 0, None))


def _largest(leaf: Float[Array, "*shape"]) -> Float32[Array, ""]:
    # A number that is not finite must not decide how coarse all others are.
    size = jnp.where(jnp.isfinite(leaf), jnp.abs(leaf), 0)
    return jnp.max(size, initial=0).astype(np.float32)


def _widened(leaf: Float[Array, "*shape"]) -> Float32[Array, "*shape"]:
    """The leaf in float32, rounded as it is stored.

    XLA may leave out a rounding to a narrow float that is followed by a widening; the
    average would then be of weights that the model never had.
    """
    wide = leaf.astype(np.float32)
    return wide if leaf.dtype.itemsize >= 4 else _rounded(wide, leaf.dtype)


@functools.partial(jax.jit, static_argnums=1)
def _rounded(wide: Float32[Array, "*shape"], dtype: Any) -> Float32[Array, "*shape"]:
    """The nearest numbers of a narrower dtype; its own numbers stay what they are."""
    info = jnp.finfo(dtype)
    # The digits alone: with its own exponents it would take subnormals for zero, and
    # in formats without infinity the largest numbers for infinity.
    rounded = jax.lax.reduce_precision(wide, 8, info.nmant)
    if info.nexp == 8:  # bfloat16, whose subnormals are float32's
        return rounded
    step = np.float32(info.smallest_subnormal)  # a power of two
    even = jnp.round(wide / step) * step
    rounded = jnp.where(jnp.abs(wide) < np.float32(info.smallest_normal), even, rounded)
    overflow = np.float32(np.array(np.inf, dtype))  # NaN where there is no infinity
    inside = ~(jnp.abs(rounded) > np.float32(info.max))  # NaN too
    return jnp.where(inside, rounded, jnp.copysign(overflow, wide))
