"""How many weights of a tree are zero, counted exactly."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.arrays import counting, lazy, tree
from jaxprune.arrays.messages import columns, listed
from jaxprune.arrays.topk import float_order
from jaxprune.arrays.topk.float_order import Line


class Sparsity(NamedTuple):
    """How many weights are zero, counted exactly.

    Attributes:
      zeros: zeros in all leaves, a Python integer.
      size: weights in all leaves, a Python integer.
      by_leaf: path name to (zeros, size) of that leaf.
    """

    zeros: int
    size: int
    by_leaf: dict[str, tuple[int, int]]

    @property
    def total(self) -> float:
        """The share of zeros in all leaves, in [0, 1]; 0 for an empty tree."""
        return self.zeros / self.size if self.size else 0.0

    def __str__(self) -> str:
        """A table: one line a leaf, the total last."""
        rows = [*self.by_leaf.items(), ("total", (self.zeros, self.size))]
        return columns(
            [
                (name, f"{zeros / max(size, 1):7.2%}", f"of {size:,}")
                for name, (zeros, size) in rows
            ]
        )


def sparsity(params: Any, masks: Any = None) -> Sparsity:
    """The share of zeros in each leaf and in all, exact.

    Args:
      params: a pytree of arrays of any dtype; of masks, False counts as zero. Averages
        in one byte and packed masks count as what they stand for; random keys are no
        weights and do not count.
      masks: masks of these parameters; only leaves that have one are counted, not the
        excluded ones. All are counted if left out.

    Returns:
      Exact counts as Python integers; `print` it for a table.

    Raises:
      ValueError: the masks are another model's.
      TypeError: the masks are packed.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxprune as jp
      >>> jp.sparsity({"a": jnp.array([0.0, 1.0]), "b": jnp.ones(2)}).total
      0.25
    """
    named = tree.named_leaves(params, is_leaf=_is_leaf)
    aligned = list(named.values())
    if masks is not None:
        held = tree.named_leaves(masks, is_leaf=_is_leaf)
        if packed := [k for k, mask in held.items() if _counts_itself(mask)]:
            raise TypeError(
                f"masks must be boolean arrays, True for kept, but {listed(packed)} "
                "are packed; unpack them with jp.masks.unpack(masks)"
            )
        aligned = tree.align(params, tree.with_nodes(masks, named), "masks")
    leaves = {
        name: leaf
        for (name, leaf), mask in zip(named.items(), aligned, strict=True)
        if _is_counted(leaf) and not tree.is_excluded(mask)
    }
    nonzero = jax.device_get({k: _nonzero(v) for k, v in leaves.items()})
    by_leaf = {
        name: (int(leaf.size) - counting.whole(nonzero[name]), int(leaf.size))
        for name, leaf in leaves.items()
    }
    zeros = sum(z for z, _ in by_leaf.values())
    return Sparsity(zeros, sum(n for _, n in by_leaf.values()), by_leaf)


def _is_leaf(node: Any) -> bool:
    return tree.is_leaf(node) or _counts_itself(node)


def _counts_itself(leaf: Any) -> bool:
    """Whether a node holds numbers in a code of its own: `Int8`, `PackedMask`."""
    return hasattr(leaf, "count_nonzero")


def _is_counted(leaf: Any) -> bool:
    if not hasattr(leaf, "dtype"):
        return False
    return not jnp.issubdtype(leaf.dtype, jax.dtypes.extended)


def _nonzero(leaf: Any) -> Any:
    if isinstance(leaf, np.ndarray):  # of 64 bits, which JAX may not hold
        return np.count_nonzero(leaf)
    return leaf.count_nonzero() if _counts_itself(leaf) else _count(lazy.array(leaf))


@jax.jit
def _count(leaf: jax.Array) -> jax.Array:
    if jnp.issubdtype(leaf.dtype, jnp.floating):
        # As integers: a CPU takes subnormal floats for zeros when it compares them.
        leaf = float_order.of(leaf, Line.of(leaf.dtype).signed)
    return counting.parts(leaf != jnp.zeros((), leaf.dtype), leaf.size)
