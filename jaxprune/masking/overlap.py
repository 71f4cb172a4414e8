"""How much two masks of one model agree, counted exactly."""

from typing import NamedTuple

import jax

from jaxprune.arrays import counting, placement, tree
from jaxprune.arrays.messages import columns
from jaxprune.masking.checks import checked
from jaxprune.typing import Masks


class Overlap(NamedTuple):
    """What two masks keep, counted exactly.

    Attributes:
      both: weights that both keep, a Python integer.
      either: weights that at least one of them keeps, a Python integer.
      by_leaf: path name to (both, either) of that leaf.
    """

    both: int
    either: int
    by_leaf: dict[str, tuple[int, int]]

    @property
    def total(self) -> float:
        """both / either, in [0, 1]: 1 where the masks are the same."""
        return self.both / self.either if self.either else 1.0

    def __str__(self) -> str:
        """A table: one line a leaf, the total last."""
        rows = [*self.by_leaf.items(), ("total", (self.both, self.either))]
        return columns(
            [
                (name, f"{both / either if either else 1:7.2%}", f"of {either:,}")
                for name, (both, either) in rows
            ]
        )


def overlap(masks: Masks, others: Masks) -> Overlap:
    """How much two masks agree: what both keep over what one of them keeps.

    Between two events of a schedule it says how many weights came and went.

    Args:
      masks: masks.
      others: masks of the same parameters, in any container; a leaf without a mask in
        one of the two is not counted.

    Returns:
      Exact counts as Python integers; `print` it for a table.

    Raises:
      ValueError: the two are of different models.
      TypeError: they are not boolean.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxprune as jp
      >>> a, b = jnp.array([True, True, False]), jnp.array([False, True, False])
      >>> jp.overlap({"w": a}, {"w": b}).total
      0.5
    """
    checked(masks, masks)
    masks = tree.with_nodes(masks, tree.named_leaves(others))
    pairs = zip(tree.named_leaves(masks).items(), checked(masks, others), strict=True)
    counts = {
        name: _counts(mask, placement.together(other, mask))
        for (name, mask), other in pairs
        if not tree.is_excluded(mask) and not tree.is_excluded(other)
    }
    by_leaf = {
        name: (counting.whole(both), counting.whole(either))
        for name, (both, either) in jax.device_get(counts).items()
    }
    both, either = (sum(row[i] for row in by_leaf.values()) for i in range(2))
    return Overlap(both, either, by_leaf)


@jax.jit
def _counts(mask: jax.Array, other: jax.Array) -> tuple[jax.Array, jax.Array]:
    number = lambda bits: counting.parts(bits, mask.size)  # noqa: E731
    return number(mask & other), number(mask | other)
