"""Masks: made from scores, applied to parameters, combined, packed to bits.

A mask is True where a weight is kept. A removed weight becomes +0 by selection, never
by multiplication, so NaN, infinity and -0 go too.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune import axes as axes_
from jaxprune import patterns, select, tree
from jaxprune.axes import Axes
from jaxprune.base import Masks, Params, Pattern, Scope, Scores
from jaxprune.choices import Choice, choose, floating


def make(
    scores: Scores,
    sparsity: float | Mapping[str, float] | None = None,
    *,
    scope: Scope = "layer",
    pattern: Pattern = patterns.Unstructured(),
    axes: Axes | Mapping[str, Axes] | None = None,
) -> Masks:
    """Keeps the highest scores, exactly as many as the sparsity says.

    Args:
      scores: a tree of floating arrays; higher is kept. Under `jit`, where nothing can
        be raised, a NaN ranks lowest.
      sparsity: the share to remove, in [0, 1), or {glob on the path name: share}, of
        which the first match counts (unmatched leaves keep all). None where the pattern
        fixes it. Static under `jit`.
      scope: "layer" removes the share from each leaf; "global" ranks all leaves
        together.
      pattern: which weights live and die together.
      axes: which axes are input and output, for patterns that care; one for all leaves
        or {glob: Axes}; Flax's [..., in, out] by default.

    Returns:
      Masks like `scores`, boolean, with the scores' sharding. Ties keep the first by
      (leaf, flat index).

    Raises:
      ValueError: a sparsity, pattern or rule does not fit, or a score is NaN; the
        sentence names the leaves.
      TypeError: scores are not floating.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxprune as jp
      >>> scores = {"w": jnp.array([[4.0, 1.0], [2.0, 3.0]])}
      >>> jp.masks.make(scores, sparsity=0.5)["w"].tolist()
      [[True, False], [False, True]]
    """
    chosen = choose(scores, sparsity, scope=scope, pattern=pattern, axes=axes)
    bits = [
        axes_.placed(of_choice(choice, pattern, leaf.shape), leaf)
        for choice, leaf in zip(chosen, jax.tree.leaves(scores), strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(scores), bits)


def above(scores: Scores, threshold: float) -> Masks:
    """Keeps every score above a threshold, in any number.

    Args:
      scores: a tree of floating arrays.
      threshold: what is at or under it goes, finite and at least 0; the rate, for
        `scores.threshold`.

    Returns:
      Masks like `scores`; under `jit` a NaN goes.

    Raises:
      ValueError: the threshold is out of range, or a score is NaN.
      TypeError: scores are not floating.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxprune as jp
      >>> jp.masks.above({"w": jnp.array([0.5, 2.0])}, 1.0)["w"].tolist()
      [False, True]
    """
    floating(scores)
    if not 0 <= threshold < math.inf:
        raise ValueError(f"threshold must be finite and at least 0, got {threshold}")
    return jax.tree.map(lambda score: score > threshold, scores)


def apply(params: Params, masks: Masks) -> Params:
    """The parameters with +0 where the masks are False.

    Args:
      params: the parameters.
      masks: masks of these parameters, in any container; a left-out leaf
        (`optax.MaskedNode()`) comes back as the same object.

    Returns:
      Parameters of the same structure, dtypes and sharding.

    Raises:
      ValueError: the masks are another model's.
      TypeError: the masks are not boolean.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxprune as jp
      >>> jp.masks.apply({"w": jnp.ones(2)}, {"w": jnp.array([True, False])})
      {'w': Array([1., 0.], dtype=float32)}
    """
    aligned = checked(params, masks)
    leaves = [
        leaf if tree.is_masked(mask) else _where(mask, leaf)
        for leaf, mask in zip(tree.named_leaves(params).values(), aligned, strict=True)
    ]
    return jax.tree.unflatten(
        jax.tree.structure(params, is_leaf=tree.is_masked), leaves
    )


def combine(first: Masks, second: Masks) -> Masks:
    """What both masks keep.

    Args:
      first: masks.
      second: masks of the same parameters; where one of the two leaves a leaf out, the
        other alone decides.

    Returns:
      Masks like `first`.

    Raises:
      ValueError: the two are of different models.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxprune as jp
      >>> a, b = jnp.array([True, True]), jnp.array([True, False])
      >>> jp.masks.combine({"w": a}, {"w": b})["w"].tolist()
      [True, False]
    """
    other = checked(first, second)

    def both(a: Any, b: Any) -> Any:
        return b if tree.is_masked(a) else a if tree.is_masked(b) else a & b

    mine = tree.named_leaves(first).values()
    leaves = [both(a, b) for a, b in zip(mine, other, strict=True)]
    return jax.tree.unflatten(jax.tree.structure(first, is_leaf=tree.is_masked), leaves)


def of_choice(choice: Choice, pattern: Pattern, shape: tuple[int, ...]) -> jax.Array:
    """The mask of one leaf.

    Args:
      choice: what was chosen for the leaf.
      pattern: the pattern that it was chosen by.
      shape: the leaf's shape.

    Returns:
      A boolean array of that shape.
    """
    return pattern.expand(_of_units(choice.units, choice.cut), shape, choice.axes)


def checked(params: Params, masks: Masks) -> list[Any]:
    """The masks' leaves in the parameters' order, or one clear error.

    Args:
      params: the parameters, or masks of them.
      masks: masks in any container.

    Returns:
      Boolean arrays, `optax.MaskedNode()` where left out.

    Raises:
      ValueError: the masks are another model's.
      TypeError: the masks are not boolean.
    """
    aligned = tree.align(params, masks, "masks")
    wrong = [
        name
        for name, mask in zip(tree.names(params), aligned, strict=True)
        if not tree.is_masked(mask) and mask.dtype != bool
    ]
    if wrong:
        raise TypeError(
            f"masks must be boolean, True for kept, but {wrong[:6]} are not; make them "
            "with jp.masks.make(scores, sparsity), or unpack packed ones"
        )
    return aligned


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


def pack(masks: Masks) -> Any:
    """The masks at one bit a weight.

    Rows along the last axis are filled up to whole bytes, so that a sharding survives;
    a last axis of 1 therefore costs a byte a weight.

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
    return jax.tree.map(_pack, masks)


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
    if not all(map(is_packed, jax.tree.leaves(packed, is_leaf=is_packed))):
        raise TypeError("unpack needs what jp.masks.pack returned; got other leaves")
    return jax.tree.map(_unpack, packed, is_leaf=is_packed)


_of_units = jax.jit(select.mask)


@jax.jit
def _where(mask: jax.Array, leaf: jax.Array) -> jax.Array:
    return jnp.where(mask, leaf, jnp.zeros((), leaf.dtype))


@jax.jit
def _pack(mask: jax.Array) -> PackedMask:
    row = jnp.atleast_1d(mask)
    row = axes_.divisible(row, *[1] * (row.ndim - 1), 8)
    return PackedMask(jnp.packbits(row, axis=-1, bitorder="little"), mask.shape)


@jax.jit
def _unpack(packed: PackedMask) -> jax.Array:
    length = packed.shape[-1] if packed.shape else 1
    bits = jnp.unpackbits(packed.bits, axis=-1, count=length, bitorder="little")
    return bits.reshape(packed.shape).astype(bool)
