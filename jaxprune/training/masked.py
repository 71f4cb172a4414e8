"""What transformations with masks share: a masked step, leaf by leaf."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxprune.arrays import placement, tree
from jaxprune.masking import packing
from jaxprune.masking.packed_mask import PackedMask
from jaxprune.typing import Masks, Params


def masked_step(
    optimizer: optax.GradientTransformationExtraArgs,
    masks: Masks,
    gradients: optax.Updates,
    inner: optax.OptState,
    params: Params,
    extra_args: Mapping[str, Any],
) -> tuple[optax.Updates, optax.OptState]:
    """A step of the optimizer that neither sees nor moves what the masks prune.

    Args:
      optimizer: the wrapped optimizer.
      masks: boolean masks like the parameters, True for kept.
      gradients: gradients, like the parameters.
      inner: the optimizer's state.
      params: the parameters.
      extra_args: extra arguments of the optimizer's `update`.

    Returns:
      The update, u where kept and -w where pruned, and the optimizer's new state.
    """
    # With lookahead the gradient is of the fast half of the parameters.
    paired = isinstance(masks, optax.LookaheadParams)
    # Gradients and parameters are masked on the way in, before clipping, moments or
    # weight decay see them, so that what the optimizer holds of a pruned weight is 0.
    updates, inner = optimizer.update(
        select_kept(masks.fast if paired else masks, gradients),
        inner,
        select_kept(masks, params),
        **extra_args,
    )
    return select_kept(masks, updates, params), inner


def map_masked(
    function: Callable[..., Any], masks: Masks, *trees: Any, unmasked: Any = None
) -> Any:
    """The function of each mask and the leaves it belongs to, as a tree like them."""
    # A leaf without a mask is that of `unmasked`, or `optax.MaskedNode()` without one.
    defaults = () if unmasked is None else (unmasked,)

    def leaf(mask: Any, *values: Any) -> Any:
        if tree.is_excluded(mask):
            return values[0] if defaults else mask
        return function(mask, *values[len(defaults) :])

    return jax.tree.map(leaf, masks, *defaults, *trees, is_leaf=tree.is_excluded)


def select_kept(masks: Masks, values: Any, weights: Any = None) -> Any:
    """The values where the masks keep; elsewhere 0, or the weights' negatives."""

    def leaf(mask: Any, value: Any, *weight: Any) -> Any:
        if isinstance(value, jax.ShapeDtypeStruct):
            return value
        return select(mask, value, -weight[0] if weight else jnp.zeros_like(value))

    trees = (values,) if weights is None else (values, weights)
    return map_masked(leaf, masks, *trees, unmasked=values)


def select(mask: jax.Array, step: jax.Array, removal: jax.Array) -> jax.Array:
    """The step where the mask keeps, else the removal, in a dtype that holds both."""
    # The removal may be -w: rounded to a narrower dtype, it would not bring w to zero.
    dtype = _common_dtype(step.dtype, removal.dtype)
    return jnp.where(mask, step.astype(dtype), removal.astype(dtype))


def freeze_masks(masks: Masks, frozen: jax.Array) -> Masks:
    """The masks once they are frozen; before, all True, so that all weights train."""
    return map_masked(lambda mask: mask | ~frozen, masks)


def zeros_of(masks: Masks, params: Params, dtype: Any = None) -> Params:
    """Zeros of the leaves that have a mask, placed like them; of their own dtype."""
    return map_masked(
        lambda mask, leaf: placement.zeros_like(leaf, dtype or leaf.dtype),
        masks,
        params,
    )


def unpack_masks(packed: Any, params: Params) -> Masks:
    """The masks of a state that holds them packed, like the parameters."""
    # By names: `nnx.Optimizer` hands its state on without its dataclasses.
    named = tree.named_leaves(params)
    bits = {
        name if tree.is_excluded(leaf) else packing.leaf_name(name): leaf
        for name, leaf in tree.named_leaves(packed).items()
    }
    masks = [
        bits[name]
        if tree.is_excluded(bits[name])
        else _unpack(PackedMask(bits[name], leaf.shape), leaf)
        for name, leaf in named.items()
    ]
    structure = jax.tree.structure(params, is_leaf=tree.is_excluded)
    return jax.tree.unflatten(structure, masks)


def _unpack(mask: PackedMask, leaf: jax.Array) -> jax.Array:
    # Rows that devices share out inside of a byte are packed with other shards.
    return placement.placed(packing.unpack(mask), leaf)


def wrapped_optimizer(
    optimizer: Any, name: str, second: str
) -> optax.GradientTransformationExtraArgs:
    """The optimizer that `name(optimizer, second)` wraps, if it is one."""
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


def check_packed(packed: Any, name: str) -> None:
    """Refuses what is no yes or no for whether masks are held packed."""
    if not isinstance(packed, bool | np.bool_):
        raise TypeError(f"{name} needs packed=True or packed=False, got {packed!r}")


def require_params(params: Params | None, name: str) -> Params:
    """The parameters, without which the transformation `name` cannot step."""
    if params is None:
        raise ValueError(
            f"{name} needs the parameters; call tx.update(g, state, params)"
        )
    return params


def _common_dtype(*dtypes: Any) -> Any:
    """The first of the dtypes that holds the numbers of all, or float32."""

    def holds(wide: Any, narrow: Any) -> bool:
        if wide == narrow:
            return True
        if not all(jnp.issubdtype(dtype, jnp.floating) for dtype in (wide, narrow)):
            return bool(np.can_cast(narrow, wide))
        wide_info, narrow_info = jnp.finfo(wide), jnp.finfo(narrow)
        return (
            wide_info.nmant >= narrow_info.nmant and wide_info.nexp >= narrow_info.nexp
        )

    holders = (wide for wide in dtypes if all(holds(wide, dtype) for dtype in dtypes))
    return next(holders, jnp.float32)
