"""What scores and masks must be: floating without NaN, boolean, of these parameters."""

import warnings
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import leaves
from jaxprune.arrays import placement, tree
from jaxprune.arrays.low_bit import is_int8
from jaxprune.arrays.messages import listed
from jaxprune.masking.packed_mask import is_packed
from jaxprune.typing import Importance, Masks, Params, Scores


def floating_scores(scores: Scores) -> dict[str, jax.Array]:
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
    if wrong := [name for name, leaf in named.items() if is_int8(leaf)]:
        raise TypeError(
            f"scores must be floating arrays, but {listed(wrong)} are averages in one "
            "byte; make scores of them with jp.scores.averaged_weight(params, "
            "importance)"
        )
    if wrong := [k for k, leaf in named.items() if not tree.is_floating(leaf)]:
        raise TypeError(
            f"scores must be floating arrays, but {listed(wrong)} are not; cast them "
            "with astype(jnp.float32)"
        )
    if wrong := _with_nan(named):
        raise ValueError(
            f"scores must not be NaN, but {listed(wrong)} hold some; look for the step "
            "at which training diverged, or replace them with jnp.nan_to_num"
        )
    return named


def warn_of_parameters(scores: Scores) -> None:
    """Says where what is ranked may be the parameters and not scores of them.

    No criterion of ours makes a negative score, or one of a leaf that is named as a
    bias, a norm or an embedding. Both together are what parameters look like.

    Args:
      scores: a tree of floating arrays; traced ones are not looked at.
    """
    named = {
        name: leaf
        for name, leaf in tree.named_leaves(scores).items()
        if placement.is_concrete(leaf) and leaves.is_kept_by_name(name)
    }
    with placement.at_once(list(named.values())):
        negative = jax.device_get({name: jnp.any(x < 0) for name, x in named.items()})
    names = [name for name, is_negative in negative.items() if is_negative]
    if names:
        warnings.warn(
            f"scores are negative at {listed(names)}, which no criterion prunes by "
            "default, so these may be the parameters; rank scores of them, as in "
            "jp.masks.make(jp.scores.magnitude(params), 0.5)",
            stacklevel=3,
        )


def refuse_other(scores: Any) -> None:
    """Refuses a sparsity or an importance where scores belong."""
    if isinstance(scores, Importance | int | float):
        what = "an Importance" if isinstance(scores, Importance) else scores
        raise TypeError(
            f"scores must be a tree that a criterion made, got {what}; call "
            "jp.masks.make(scores, sparsity) or jp.prune(params, scores, sparsity), "
            "with scores = jp.scores.preconditioned_magnitude(params, importance)"
        )


def aligned_masks(params: Params, masks: Masks) -> list[Any]:
    """The masks' leaves in the parameters' order; None and True exclude a leaf."""
    named = tree.named_leaves(params)
    check_unpacked(masks)
    aligned = tree.align(params, tree.with_nodes(masks, named), "masks")
    if wrong := [
        name
        for name, mask in dict(zip(named, aligned, strict=True)).items()
        if not tree.is_excluded(mask) and not _is_boolean(mask)
    ]:
        raise TypeError(
            f"masks must be boolean arrays, True for kept, but {listed(wrong)} are "
            "not; make them with jp.masks.make(scores, sparsity)"
        )
    return aligned


def check_unpacked(masks: Masks) -> None:
    """Refuses packed masks where booleans are needed."""
    if wrong := [
        name
        for name, mask in tree.named_leaves(masks, is_leaf=is_packed).items()
        if is_packed(mask)
    ]:
        raise TypeError(
            f"masks must be boolean arrays, True for kept, but {listed(wrong)} are "
            "packed; unpack them with jp.masks.unpack(masks)"
        )


def _with_nan(leaves: Mapping[str, jax.Array]) -> list[str]:
    """The names of leaves that hold a NaN; what `jit` traces cannot be looked at."""
    concrete = {k: v for k, v in leaves.items() if not isinstance(v, jax.core.Tracer)}
    with placement.at_once(list(concrete.values())):
        # All are started before the first answer is waited for.
        nan = jax.device_get({name: _has_nan(leaf) for name, leaf in concrete.items()})
    return [name for name, has_nan in nan.items() if has_nan]


@jax.jit
def _has_nan(leaf: jax.Array) -> jax.Array:
    # Not by a maximum: on a CPU, XLA's does not hand NaN on.
    return jnp.any(jnp.isnan(leaf))


def _is_boolean(mask: Any) -> bool:
    return hasattr(mask, "dtype") and jnp.issubdtype(mask.dtype, jnp.bool_)
