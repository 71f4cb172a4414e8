"""What transformations with masks share: leaf by leaf, and of their arguments."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxprune.arrays import placement, tree
from jaxprune.masking import packing
from jaxprune.masking.packed_mask import PackedMask
from jaxprune.typing import Masks, Params


def on_masked(
    function: Callable[..., Any], masks: Masks, *trees: Any, rest: Any = None
) -> Any:
    """The function of each mask and the leaves it belongs to, as a tree like them."""
    # Where there is no mask it is the leaf of `rest`, or `optax.MaskedNode()` without.
    others = () if rest is None else (rest,)

    def leaf(mask: Any, *values: Any) -> Any:
        if tree.is_excluded(mask):
            return values[0] if others else mask
        return function(mask, *values[len(others) :])

    return jax.tree.map(leaf, masks, *others, *trees, is_leaf=tree.is_excluded)


def select(masks: Masks, values: Any, undo: Any = None) -> Any:
    """The values where the masks keep; elsewhere 0, or minus `undo` where given."""

    def leaf(mask: Any, value: Any, *pruned: Any) -> Any:
        if isinstance(value, jax.ShapeDtypeStruct):
            return value
        other = -pruned[0] if pruned else jnp.zeros_like(value)
        return where(mask, value, other)

    trees = (values,) if undo is None else (values, undo)
    return on_masked(leaf, masks, *trees, rest=values)


def where(mask: jax.Array, step: jax.Array, other: jax.Array) -> jax.Array:
    """Takes `step` where the mask keeps, else `other`, in a dtype that holds both."""
    # `other` may be -w: rounded to a narrower dtype, it would not bring w to zero.
    wide = _holding(step.dtype, other.dtype)
    return jnp.where(mask, step.astype(wide), other.astype(wide))


def unpacked(held: Any, params: Params) -> Masks:
    """The masks of a state that holds them packed, like the parameters."""
    # By names: `nnx.Optimizer` hands its state on without its dataclasses.
    named = tree.named_leaves(params)
    bits = {
        k if tree.is_excluded(v) else packing.leaf_name(k): v
        for k, v in tree.named_leaves(held).items()
    }
    own = [
        bits[name]
        if tree.is_excluded(bits[name])
        else _placed(PackedMask(bits[name], leaf.shape), leaf)
        for name, leaf in named.items()
    ]
    structure = jax.tree.structure(params, is_leaf=tree.is_excluded)
    return jax.tree.unflatten(structure, own)


def _placed(mask: PackedMask, leaf: jax.Array) -> jax.Array:
    # Rows that devices share out inside of a byte are packed with other shards.
    return placement.placed(packing.unpack(mask), leaf)


def wrapped(
    optimizer: Any, name: str, second: str
) -> optax.GradientTransformationExtraArgs:
    """The optimizer that `name(optimizer, second)` wraps."""
    if isinstance(optimizer, optax.MultiSteps):  # it is no transformation by its class
        optimizer = optax.GradientTransformationExtraArgs(
            optimizer.init, optimizer.update
        )
    if not hasattr(optimizer, "init") or not hasattr(optimizer, "update"):
        raise TypeError(
            f"{name} takes the optimizer first and the {second} second, but got "
            f"{type(optimizer).__name__} as the optimizer; call "
            f"jp.{name}(optimizer, {second})"
        )
    return optax.with_extra_args_support(optimizer)


def needed(params: Params | None, name: str) -> Params:
    """The parameters, without which a transformation with masks cannot step."""
    if params is None:
        raise ValueError(
            f"{name} needs the parameters; call tx.update(g, state, params)"
        )
    return params


def _holding(*kinds: Any) -> Any:
    """The first of the dtypes that holds the numbers of all, or float32."""

    def holds(kind: Any, other: Any) -> bool:
        if kind == other:
            return True
        if not all(jnp.issubdtype(k, jnp.floating) for k in (kind, other)):
            return bool(np.can_cast(other, kind))
        own, its = jnp.finfo(kind), jnp.finfo(other)
        return own.nmant >= its.nmant and own.nexp >= its.nexp

    every = (kind for kind in kinds if all(holds(kind, other) for other in kinds))
    return next(every, jnp.float32)
