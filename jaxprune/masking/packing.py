"""Masks at one bit a weight, and back.

Rows along the last axis are filled up to whole bytes, so that a sharding survives.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.arrays import counting, placement, tree
from jaxprune.arrays.messages import listed
from jaxprune.masking.checks import checked
from jaxprune.typing import Masks


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedMask:
    """A mask at one bit a weight, eight along the last axis to a byte.

    Attributes:
      bits: uint8, the mask's shape with the last axis divided by 8, rounded up; the
        first weight is the lowest bit.
      shape: the mask's shape (static).
    """

    bits: jax.Array
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    @property
    def dtype(self) -> np.dtype:
        """What it stands for: bool."""
        return np.dtype(bool)

    @property
    def size(self) -> int:
        """How many weights the mask is of."""
        # Of what `vmap` stacks, `shape` is that of one.
        return math.prod(self.bits.shape[:-1] + self.shape[-1:])

    def count_nonzero(self) -> jax.Array:
        """How many are kept, `counting.parts`; rows are filled up with False."""
        return counting.parts(jax.lax.population_count(self.bits), self.size)


def pack(masks: Masks) -> Any:
    """The masks at one bit a weight.

    Rows along the last axis are filled up to whole bytes, so a last axis of 1 costs a
    byte a weight.

    Args:
      masks: boolean masks.

    Returns:
      A tree like `masks` with `PackedMask` leaves.

    Raises:
      TypeError: the masks are not boolean.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxprune as jp
      >>> jp.masks.pack({"w": jnp.array([True, False, True])})["w"].bits.tolist()
      [5]
    """
    checked(masks, masks)
    return jax.tree.map(_pack, tree.with_nodes(masks, ()))


def unpack(packed: Any) -> Masks:
    """The masks that `pack` packed.

    Args:
      packed: a tree with `PackedMask` leaves.

    Returns:
      Boolean masks of the original shapes.

    Raises:
      TypeError: a leaf is not packed.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxprune as jp
      >>> packed = jp.masks.pack({"w": jnp.array([True, False, True])})
      >>> jp.masks.unpack(packed)["w"].tolist()
      [True, False, True]
    """
    is_packed = lambda node: isinstance(node, PackedMask)  # noqa: E731
    if other := [
        name
        for name, leaf in tree.named_leaves(packed, is_leaf=is_packed).items()
        if not (is_packed(leaf) or tree.is_excluded(leaf))
    ]:
        raise TypeError(
            f"unpack needs what jp.masks.pack returned, but {listed(other)} are not "
            "packed; take masks of booleans as they are"
        )
    return jax.tree.map(_unpack, packed, is_leaf=is_packed)


def leaf_name(name: str) -> str:
    """The name of the leaf to which packed bits belong: "w" for "w/bits"."""
    return name.removesuffix("bits").removesuffix("/")


@jax.jit
def _pack(mask: jax.Array) -> PackedMask:
    row = jnp.atleast_1d(mask)
    row = placement.divisible(row, *[1] * (row.ndim - 1), 8)
    return PackedMask(jnp.packbits(row, axis=-1, bitorder="little"), mask.shape)


@jax.jit
def _unpack(packed: PackedMask) -> jax.Array:
    if not packed.bits.size:
        return jnp.zeros(packed.bits.shape[:-1] + packed.shape[-1:], bool)
    length = packed.shape[-1] if packed.shape else 1
    bits = jnp.unpackbits(packed.bits, axis=-1, count=length, bitorder="little")
    return bits.reshape(packed.bits.shape[:-1] + packed.shape[-1:]).astype(bool)
