"""Retraining under masks: an optimizer that keeps pruned weights at exactly zero.

The transformation that owns the masks wraps the optimizer, so there is no hook that a
user could forget: it masks gradients and parameters on the way in, before clipping,
momentum or weight decay see them, and on the way out emits u where kept and -w where
pruned, after which the weight is +0 exactly.
"""

from typing import Any, NamedTuple

import jax
import optax

from jaxprune.arrays import placement, tree
from jaxprune.masking import packing
from jaxprune.masking.checks import aligned_masks
from jaxprune.training.masked import (
    check_packed,
    masked_step,
    require_params,
    select_kept,
    unpack_masks,
    wrapped_optimizer,
)
from jaxprune.typing import Masks, Params


class KeepMasksState(NamedTuple):
    """State of `keep_masks`.

    Attributes:
      masks: the masks, like the parameters, boolean; packed where that was asked for.
      inner: the wrapped optimizer's state.
    """

    masks: Masks
    inner: optax.OptState


def keep_masks(
    optimizer: optax.GradientTransformation, masks: Masks, *, packed: bool = False
) -> optax.GradientTransformationExtraArgs:
    """Trains the kept weights; pruned ones, their updates and moments stay zero.

    Args:
      optimizer: optax optimizer, with its clipping. A tracker goes outside,
        `chain(keep_masks(optimizer, masks), track_importance())`, to see the step that
        is really taken.
      masks: boolean masks of the parameters that will be trained; True is kept, and a
        leaf with `optax.MaskedNode()`, None or True for its mask is trained as a whole.
        Inside `optax.partition` or `masked` those of other leaves are not used.
      packed: whether the state holds the masks at one bit a weight rather than eight.

    Returns:
      A transformation whose first step sets pruned weights to zero, whatever finite
      number they were, and whose later steps leave them there, if nothing behind it
      changes the updates: a learning rate or clipping goes inside. Extra arguments
      reach the optimizer. The masks are part of the state, placed as the parameters
      are, so a checkpoint of the state holds them. Updates that cannot hold the weights
      (bfloat16 gradients of float32 weights) come back in a dtype that can.

    Raises:
      ValueError: at `init`: the masks are another model's; at `update`: no parameters.
      TypeError: the optimizer is none; at `init`: the masks are not boolean.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import jaxprune as jp
      >>> params = {"w": jnp.array([1.0, 2.0])}
      >>> tx = jp.keep_masks(optax.adamw(0.1), {"w": jnp.array([True, False])})
      >>> updates, _ = tx.update({"w": jnp.ones(2)}, tx.init(params), params)
      >>> float(optax.apply_updates(params, updates)["w"][1])
      0.0
    """
    check_packed(packed, "keep_masks")
    optimizer = wrapped_optimizer(optimizer, "keep_masks", "masks")

    def init(params: Params) -> KeepMasksState:
        if tree.is_placeholder(params):
            return KeepMasksState(params, optimizer.init(params))
        leaves = tree.named_leaves(params).values()
        aligned = aligned_masks(params, _masks_of_trained(params, masks))
        # The user's own buffers stay his: a donated state must not delete them.
        copies = [
            mask if tree.is_excluded(mask) else placement.copied(mask, leaf)
            for mask, leaf in zip(aligned, leaves, strict=True)
        ]
        structure = jax.tree.structure(params, is_leaf=tree.is_excluded)
        state_masks = jax.tree.unflatten(structure, copies)
        # What starts from the parameters' values must not start from pruned ones.
        inner = optimizer.init(select_kept(state_masks, params))
        return KeepMasksState(
            packing.pack(state_masks) if packed else state_masks, inner
        )

    def update(
        updates: optax.Updates,
        state: KeepMasksState,
        params: Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, KeepMasksState]:
        params = require_params(params, "keep_masks")
        state_masks = unpack_masks(state.masks, params) if packed else state.masks
        updates, inner = masked_step(
            optimizer, state_masks, updates, state.inner, params, extra_args
        )
        return updates, KeepMasksState(state.masks, inner)

    return optax.GradientTransformationExtraArgs(init, update)


def _masks_of_trained(params: Params, masks: Masks) -> Masks:
    """The masks without those of leaves that another optimizer trains."""
    named = tree.named_leaves(params)
    untrained = [name for name, leaf in named.items() if tree.is_excluded(leaf)]
    if not untrained:
        return masks
    # One node may stand for a whole subtree, as under `optax.partition`.
    subtrees = tuple(f"{name}/" if name else "" for name in untrained)
    named_masks = tree.named_leaves(tree.with_nodes(masks, named))
    trained = {
        name: mask
        for name, mask in named_masks.items()
        if not f"{name}/".startswith(subtrees)
    }
    return trained | dict.fromkeys(untrained, optax.MaskedNode())
