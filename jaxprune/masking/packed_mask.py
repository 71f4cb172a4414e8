"""A mask at one bit a weight: the leaf that `packing` makes and `checks` refuses."""

import dataclasses
import math
from typing import Any

import jax
import numpy as np

from jaxprune.arrays import counting


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


def is_packed(node: Any) -> bool:
    """Whether a node of a tree is a packed mask."""
    return isinstance(node, PackedMask)
