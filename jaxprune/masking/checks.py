"""What scores and masks must be: floating without NaN, boolean, of these parameters."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.arrays import tree
from jaxprune.arrays.low_bit import is_int8
from jaxprune.arrays.messages import listed
from jaxprune.arrays.topk import thresholds
from jaxprune.masking.packed_mask import is_packed
from jaxprune.typing import Importance, Masks, Params, Scores


def floating(scores: Scores) -> dict[str, jax.Array]:
    """The scores' leaves by name, floating and free of NaN, without excluded ones."""
    refuse_other(scores)
    named = {
        k: jnp.asarray(v) if isinstance(v, np.ndarray) else v  # JAX may know no float64
        for k, v in tree.named_leaves(scores).items()
        if not tree.is_excluded(v)
    }
    if not named:
        raise ValueError(
            "scores must have at least one leaf to prune, but have none; make them by "
            "a criterion such as jp.scores.magnitude(params), and see with "
            "jp.tree.explain(params) what it prunes"
        )
    if held := [name for name, leaf in named.items() if is_int8(leaf)]:
        raise TypeError(
            f"scores must be floating arrays, but {listed(held)} are averages in one "
            "byte; make scores of them with jp.scores.averaged_weight(params, "
            "importance)"
        )
    if wrong := [name for name, leaf in named.items() if not tree.is_floating(leaf)]:
        raise TypeError(
            f"scores must be floating arrays, but {listed(wrong)} are not; cast them "
            "with astype(jnp.float32)"
        )
    concrete = {k: v for k, v in named.items() if not isinstance(v, jax.core.Tracer)}
    with thresholds.at_once(list(concrete.values())):
        nan = jax.device_get({name: _has_nan(leaf) for name, leaf in concrete.items()})
    if wrong := [name for name, has_nan in nan.items() if has_nan]:
        raise ValueError(
            f"scores must not be NaN, but {listed(wrong)} hold some; look for the step "
            "at which training diverged, or replace them with jnp.nan_to_num"
        )
    return named


def refuse_other(scores: Any) -> None:
    """Refuses a sparsity or an importance where scores belong."""
    if isinstance(scores, Importance | int | float):
        what = "an Importance" if isinstance(scores, Importance) else scores
        raise TypeError(
            f"scores must be a tree that a criterion made, got {what}; call "
            "jp.masks.make(scores, sparsity) or jp.prune(params, scores, sparsity), "
            "with scores = jp.scores.trajectory(params, importance)"
        )


def checked(params: Params, masks: Masks) -> list[Any]:
    """The masks' leaves in the parameters' order; None and True exclude a leaf."""
    named = tree.named_leaves(params)
    held = tree.named_leaves(masks, is_leaf=is_packed)
    if packed := [name for name, mask in held.items() if is_packed(mask)]:
        raise TypeError(
            f"masks must be boolean arrays, True for kept, but {listed(packed)} are "
            "packed; unpack them with jp.masks.unpack(masks)"
        )
    aligned = tree.align(params, tree.with_nodes(masks, named), "masks")
    wrong = [
        name
        for name, mask in zip(named, aligned, strict=True)
        if not tree.is_excluded(mask) and not _is_boolean(mask)
    ]
    if wrong:
        raise TypeError(
            f"masks must be boolean arrays, True for kept, but {listed(wrong)} are not"
            "; make them with jp.masks.make(scores, sparsity)"
        )
    return aligned


def _is_boolean(mask: Any) -> bool:
    return hasattr(mask, "dtype") and jnp.issubdtype(mask.dtype, jnp.bool_)


@jax.jit
def _has_nan(leaf: jax.Array) -> jax.Array:
    # Not by a maximum: on a CPU, XLA's does not hand NaN on.
    return jnp.any(jnp.isnan(leaf))
