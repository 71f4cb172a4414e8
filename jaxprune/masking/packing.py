"""Masks at one bit a weight, and back.

Rows along the last axis are filled up to whole bytes, so that a sharding survives.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxprune.arrays import placement, tree
from jaxprune.arrays.messages import listed
from jaxprune.masking.checks import aligned_masks
from jaxprune.masking.packed_mask import PackedMask, is_packed
from jaxprune.typing import Masks


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
    aligned_masks(masks, masks)
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
    if wrong := [
        name
        for name, leaf in tree.named_leaves(packed, is_leaf=is_packed).items()
        if not (is_packed(leaf) or tree.is_excluded(leaf))
    ]:
        raise TypeError(
            f"unpack needs what jp.masks.pack returned, but {listed(wrong)} are not "
            "packed; take masks of booleans as they are"
        )
    return jax.tree.map(_unpack, packed, is_leaf=is_packed)


def leaf_name(name: str) -> str:
    """The name of the leaf to which packed bits belong: "w" for "w/bits"."""
    return name.removesuffix("bits").removesuffix("/")


@jax.jit
def _pack(mask: jax.Array) -> PackedMask:
    row = jnp.atleast_1d(mask)
    # No shard may end inside a byte.
    row = placement.divisible(row, *[1] * (row.ndim - 1), 8)
    return PackedMask(jnp.packbits(row, axis=-1, bitorder="little"), mask.shape)


@jax.jit
def _unpack(packed: PackedMask) -> jax.Array:
    if not packed.bits.size:  # `unpackbits` takes no empty axis
        return jnp.zeros(packed.bits.shape[:-1] + packed.shape[-1:], bool)
    length = packed.shape[-1] if packed.shape else 1
    # `count` leaves out what filled the last byte up.
    bits = jnp.unpackbits(packed.bits, axis=-1, count=length, bitorder="little")
    return bits.reshape(packed.bits.shape[:-1] + packed.shape[-1:]).astype(bool)
