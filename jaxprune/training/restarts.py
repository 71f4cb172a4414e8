"""A weight that comes back starts anew: fresh moments, and a count of its own.

What an optimizer holds of a weight that was pruned is stale, so a weight that grows
gets what `init` would give it. Adam divides its moments by 1 - b^t, since their
averages began at zero t steps before. They began later for a weight that came back a
steps ago, and by the t of all others its first step would be
(1 - b1) / sqrt(1 - b2) = 3.16 times too large. So its update is multiplied by

    (1 - b1^t) / (1 - b1^a) sqrt((1 - b2^a) / (1 - b2^t)),

which leaves out Adam's epsilon. No state of optax holds b1 and b2, so `gradual` takes
them as `decays`; a decay of 0 corrects nothing. The state has the age of each weight,
two bytes. NAdam and RAdam get the same ratio, which is not quite theirs: NAdam's first
step is 1.3 times a fresh one's. Other optimizers that count steps get none, and a
warning says so.

Xiao et al., "Memory-Efficient LLM Training with Dynamic Sparsity", 2026, arXiv
2606.00888 (SMET), count so too; their warm-up of such weights is not here.
"""

import warnings
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float32, Int32

from jaxprune.arrays import tree
from jaxprune.training.masked import map_masked, masked_step, select_kept, zeros_of
from jaxprune.typing import Masks, Params

# optax's states whose bias correction counts steps too, but is not Adam's.
_UNCORRECTED = {
    "ScaleByAdemamixState",
    "ScaleByBeliefState",
    "ScaleByRStdDevWithCountState",
    "ScaleByRmsWithCountState",
}
# What two bytes hold. By then Adam's correction is 1, if b2 is not within 1e-5 of it.
_OLDEST = 2**16 - 1


def start_ages(
    optimizer: optax.GradientTransformation,
    inner: optax.OptState,
    masks: Masks,
    params: Params,
) -> Params | tuple[()]:
    """The ages of weights of which none has come back.

    Args:
      optimizer: optimizer whose state `inner` is.
      inner: state of the optimizer.
      masks: boolean masks like the parameters.
      params: parameters, or optax's stand-in for them.

    Returns:
      Zeros, uint16, of the leaves that have a mask, placed like them; () where no part
      of the optimizer counts steps as Adam does.

    Raises:
      ValueError: optax cannot tell which parts of the state belong to the parameters.
    """
    counts_steps = bool(_adam_nodes(inner))
    if tree.is_placeholder(params):
        return params if counts_steps else ()
    try:
        _moments(optimizer, inner, masks)
    except Exception as error:  # whatever an optimizer's `init` says of a stand-in
        raise ValueError(
            "a weight that grows needs fresh moments, but optax.tree.map_params cannot "
            "tell which parts of this optimizer's state belong to the parameters "
            f"({error}); leave optax.flatten and the like out"
        ) from error
    nodes = jax.tree.leaves(inner, is_leaf=_is_uncorrected)
    if any(map(_is_uncorrected, nodes)):
        warnings.warn(
            "this optimizer's bias correction is not Adam's, so the first steps of a "
            "weight that comes back may be several times too large; take optax.adam "
            "or the like, or a lower learning rate",
            stacklevel=3,  # the caller of `init`
        )
    return zeros_of(masks, params, jnp.uint16) if counts_steps else ()


def restarted_step(
    optimizer: optax.GradientTransformationExtraArgs,
    before: Masks,
    masks: Masks,
    gradients: optax.Updates,
    inner: optax.OptState,
    ages: Params | tuple[()],
    params: Params,
    extra_args: Mapping[str, Any],
    decays: tuple[float, float],
) -> tuple[optax.Updates, optax.OptState, Params | tuple[()]]:
    """A masked step at which what comes back starts anew; see `masked_step`.

    Args:
      optimizer: the wrapped optimizer.
      before: boolean masks of the step before.
      masks: boolean masks of this step.
      gradients: gradients, like the parameters.
      inner: the optimizer's state.
      ages: 1 and the number of steps since a weight came back; 0 for one that never
        did, is pruned, or came back 65535 steps ago.
      params: the parameters.
      extra_args: extra arguments of the optimizer's `update`.
      decays: b1 and b2 of Adam.

    Returns:
      The update, the optimizer's new state and the new ages.
    """
    returned = map_masked(lambda mask, old: mask & ~old, masks, before)
    inner = _fresh_moments(optimizer, inner, returned, select_kept(masks, params))
    updates, stepped = masked_step(
        optimizer, masks, gradients, inner, params, extra_args
    )
    if not ages:
        return updates, stepped, ages
    named, named_ages = tree.named_leaves(updates), tree.named_leaves(ages)
    named_returned, named_masks = map(tree.named_leaves, (returned, masks))
    corrected = {name for name, age in named_ages.items() if tree.is_excluded(age)}
    for old, new in zip(_adam_nodes(inner), _adam_nodes(stepped), strict=True):
        for name, moment in tree.named_leaves(new.mu).items():
            # A leaf is of the first of Adam's states that holds it; a node that was
            # left out may stand for a whole subtree.
            if tree.is_excluded(moment) or name in corrected:
                continue
            corrected.add(name)
            age = jnp.where(named_returned[name], 1, named_ages[name].astype(jnp.int32))
            # A step that collects gradients, or leaves them out, makes nothing older.
            older = age + new.count - old.count
            known = (age > 0) & named_masks[name] & (older <= _OLDEST)
            factor = _correction(new.count, older - 1, decays)
            # All others keep their bits; removals, -w, are of what is pruned.
            scaled = (named[name] * factor).astype(named[name].dtype)
            named[name] = jnp.where(known, scaled, named[name])
            named_ages[name] = jnp.where(known, older, 0).astype(jnp.uint16)
    updates, ages = (
        jax.tree.unflatten(
            jax.tree.structure(like, is_leaf=tree.is_leaf), leaves.values()
        )
        for like, leaves in ((updates, named), (ages, named_ages))
    )
    return updates, stepped, ages


def _fresh_moments(
    optimizer: optax.GradientTransformation,
    inner: optax.OptState,
    returned: Masks,
    params: Params,
) -> optax.OptState:
    """The optimizer's state, that of its `init` where a weight comes back."""

    def leaf(chosen: Any, fresh: Any, value: Any) -> Any:
        if chosen is False:
            return value
        return jnp.where(jnp.broadcast_to(chosen, value.shape), fresh, value)

    moments = _moments(optimizer, inner, returned)
    fresh = _without_trackers(optimizer.init(params))
    result = jax.tree.map(leaf, moments, fresh, _without_trackers(inner))
    return jax.tree.map(
        lambda node, new: node if _is_tracker(node) else new,
        inner,
        result,
        is_leaf=_is_tracker,
    )


def _correction(
    count: jax.Array, steps: Int32[Array, "..."], decays: tuple[float, float]
) -> Float32[Array, "..."]:
    """The factor for Adam's update of a weight that has taken this many steps."""

    def corrections(steps: jax.Array) -> list[jax.Array]:
        # 1 - b^n; 1 for a decay of 0. `expm1` would take half as long again, for digits
        # that the ratio does not need.
        steps = jnp.maximum(steps, 1).astype(jnp.float32)
        logs = jnp.log(jnp.asarray(decays, jnp.float32))
        return [1 - jnp.exp(steps * log) for log in logs]

    (first, second), (first_of_all, second_of_all) = map(corrections, (steps, count))
    return first_of_all / first * jnp.sqrt(second / second_of_all)


def _adam_nodes(state: optax.OptState) -> list[Any]:
    """Adam's states, in the order of the tree; AMSGrad's are such."""

    def is_adams(node: Any) -> bool:
        return isinstance(node, optax.ScaleByAdamState | optax.ScaleByAmsgradState)

    nodes = jax.tree.leaves(_without_trackers(state), is_leaf=is_adams)
    return [node for node in nodes if is_adams(node)]


def _moments(
    optimizer: optax.GradientTransformation, state: optax.OptState, chosen: Any
) -> Any:
    """The state with what is chosen in the place of moments, False elsewhere."""

    def mark(value: Any, chosen: Any) -> Any:
        if tree.is_excluded(value):
            return value
        if tree.is_excluded(chosen):
            return False
        # Adafactor's sums over rows are like the parameters, and are of no weight.
        last_axes = jnp.shape(value)[-chosen.ndim :] if chosen.ndim else ()
        fits = tree.is_floating(value) and last_axes == chosen.shape
        return chosen if fits else False

    return optax.tree.map_params(
        lambda params: _without_trackers(optimizer.init(params)),
        mark,
        _without_trackers(state),
        chosen,
        transform_non_params=lambda _: False,
        is_leaf=tree.is_excluded,
    )


def _without_trackers(state: optax.OptState) -> Any:
    """The state without what trackers average, and without LoRA's factors."""
    # Averages are of the whole run, and moments of factors are of no weight.
    return jax.tree.map(
        lambda node: () if _is_tracker(node) else node, state, is_leaf=_is_tracker
    )


def _is_tracker(node: Any) -> bool:
    return hasattr(node, "importance_fields")


def _is_uncorrected(node: Any) -> bool:
    return type(node).__name__ in _UNCORRECTED
