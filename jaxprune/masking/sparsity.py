"""What is zero and what masks share, counted exactly: Python integers, a row a leaf."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.arrays import counting, lazy, placement, processes, tree
from jaxprune.arrays.messages import columns
from jaxprune.arrays.topk import float_order
from jaxprune.arrays.topk.float_order import Line
from jaxprune.masking.checks import aligned_masks, check_unpacked
from jaxprune.typing import Masks


class Sparsity(NamedTuple):
    """How many weights are zero, counted exactly.

    Under `jit` the counts are float32 scalars, which a step can return as a metric.

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
        return _table((k, zeros / max(size, 1), size) for k, (zeros, size) in rows)


class Overlap(NamedTuple):
    """What two masks keep, counted exactly; under `jit` in float32 scalars.

    Attributes:
      both: weights that both keep, a Python integer.
      either: weights that at least one of them keeps, a Python integer.
      by_leaf: path name to (both, either) of that leaf.
    """

    both: int
    either: int
    by_leaf: dict[str, tuple[int, int]]

    @property
    def total(self) -> Any:
        """both / either, in [0, 1]: 1 where the masks are the same."""
        if isinstance(self.either, jax.core.Tracer):
            return jnp.where(self.either > 0, self.both / self.either, 1.0)
        return self.both / self.either if self.either else 1.0

    def __str__(self) -> str:
        """A table: one line a leaf, the total last."""
        rows = [*self.by_leaf.items(), ("total", (self.both, self.either))]
        return _table(
            (k, both / either if either else 1, either) for k, (both, either) in rows
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
        check_unpacked(masks)
        aligned = tree.align(params, tree.with_nodes(masks, named), "masks")
    leaves = {
        name: leaf
        for (name, leaf), mask in zip(named.items(), aligned, strict=True)
        if _is_counted(leaf) and not tree.is_excluded(mask)
    }
    # Every count is started before the first is waited for.
    nonzero = _fetched({k: _nonzero(v) for k, v in leaves.items()})
    by_leaf = {
        name: (int(leaf.size) - counting.whole(nonzero[name]), int(leaf.size))
        for name, leaf in leaves.items()
    }
    zeros, size = (sum(row[i] for row in by_leaf.values()) for i in range(2))
    return Sparsity(zeros, size, by_leaf)


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
      >>> jp.masks.overlap({"w": a}, {"w": b}).total
      0.5
    """
    aligned_masks(masks, masks)
    masks = tree.with_nodes(masks, tree.named_leaves(others))
    pairs = zip(
        tree.named_leaves(masks).items(), aligned_masks(masks, others), strict=True
    )
    counts = {
        name: _both_and_either(mask, placement.together(other, mask))
        for (name, mask), other in pairs
        if not tree.is_excluded(mask) and not tree.is_excluded(other)
    }
    by_leaf = {
        name: (counting.whole(both), counting.whole(either))
        for name, (both, either) in _fetched(counts).items()
    }
    both, either = (sum(row[i] for row in by_leaf.values()) for i in range(2))
    return Overlap(both, either, by_leaf)


def _fetched(counts: Any) -> Any:
    """The counts on the host; under `jit`, where there is none, as they are."""
    traced = any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(counts))
    return counts if traced else processes.fetch(counts)


def _table(rows: Iterable[tuple[str, float, int]]) -> str:
    return columns([(k, f"{share:7.2%}", f"of {size:,}") for k, share, size in rows])


def _is_leaf(node: Any) -> bool:
    return tree.is_leaf(node) or _counts_itself(node)


def _counts_itself(leaf: Any) -> bool:
    """Whether a node holds numbers in a code of its own: `Int8`, `PackedMask`."""
    return hasattr(leaf, "count_nonzero")


def _is_counted(leaf: Any) -> bool:
    if not hasattr(leaf, "dtype"):
        return False
    return not jnp.issubdtype(leaf.dtype, jax.dtypes.extended)  # random keys


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


@jax.jit
def _both_and_either(mask: jax.Array, other: jax.Array) -> tuple[jax.Array, jax.Array]:
    both, either = mask & other, mask | other
    return counting.parts(both, mask.size), counting.parts(either, mask.size)
