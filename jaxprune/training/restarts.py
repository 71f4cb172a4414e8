"""A weight that comes back starts anew: fresh moments, and a count of its own.

What an optimizer holds of a weight that was pruned is stale, so a weight that grows
gets what `init` would give it. Adam divides its moments by 1 - b^t, since their
averages began at zero t steps before. They began later for a weight that came back a
steps ago, and by the t of all others its first step would be
(1 - b1) / sqrt(1 - b2) = 3.16 times too large. So its update is multiplied by

    (1 - b1^t) / (1 - b1^a) sqrt((1 - b2^a) / (1 - b2^t)),

which leaves out Adam's epsilon. The state has its age for it, two bytes a weight.
NAdam and RAdam get the same ratio, which is not quite theirs: NAdam's first step is 1.3
times a fresh one's. Others that count steps get none, and a warning says so.

Xiao et al., "Memory-Efficient LLM Training with Dynamic Sparsity", 2026, arXiv
2606.00888 (SMET), count so too; their warm-up of such weights is not here.
"""

import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float32, Int32

from jaxprune.arrays import placement, tree
from jaxprune.scores.adamax import has_adams_type, is_linear, pairs_like
from jaxprune.training.masked import map_masked, masked_step, select_kept, zeros_of
from jaxprune.typing import Masks, Params

# Updates that a probe waits for a step of an optimizer that collects gradients.
_PROBES = 256
# optax's states whose bias correction counts steps too, but is not Adam's.
_UNCORRECTED = {
    "ScaleByAdemamixState",
    "ScaleByBeliefState",
    "ScaleByRStdDevWithCountState",
    "ScaleByRmsWithCountState",
}
# What two bytes hold. By then Adam's correction is 1, if b2 is not within 1e-5 of it.
_OLDEST = 2**16 - 1


class RestartState(NamedTuple):
    """How long ago weights came back.

    Attributes:
      ages: 1 and the number of steps since a weight came back, uint16 like the masks; 0
        of what never did, is pruned, or came back 65535 steps ago.
      decays: b1 and b2 of each of Adam's states, float32 (states, 2); 0 for none.
    """

    ages: Params
    decays: jax.Array


def start_restarts(
    optimizer: optax.GradientTransformation,
    inner: optax.OptState,
    masks: Masks,
    params: Params,
) -> RestartState | tuple[()]:
    """The state in which nothing has come back.

    Args:
      optimizer: optimizer whose state `inner` is; it is asked for steps of two numbers
        a leaf, from which Adam's decays are read.
      inner: state of the optimizer.
      masks: boolean masks like the parameters.
      params: parameters, or optax's stand-in for them.

    Returns:
      The state, on the devices of the parameters; () where nothing of the optimizer
      counts steps as Adam does.

    Raises:
      ValueError: optax cannot tell which parts of the state belong to the parameters.
    """
    states = len(_adam_nodes(inner))
    if tree.is_placeholder(params):
        none = jnp.zeros((states, 2), jnp.float32)
        return RestartState(params, none) if states else ()
    try:
        _moments(optimizer, inner, masks)
    except Exception as error:  # whatever an optimizer's `init` says of a stand-in
        raise ValueError(
            "a weight that grows needs fresh moments, but optax.tree.map_params cannot "
            "tell which parts of this optimizer's state belong to the parameters "
            f"({error}); leave optax.flatten and the like out"
        ) from error
    _warn_of_uncorrected(inner)
    if not states:
        return ()
    decays = jnp.asarray(_decays(optimizer, params, states))
    return RestartState(
        zeros_of(masks, params, jnp.uint16), placement.counter(params) + decays
    )


def restarted_step(
    optimizer: optax.GradientTransformationExtraArgs,
    before: Masks,
    masks: Masks,
    gradients: optax.Updates,
    inner: optax.OptState,
    restarts: RestartState | tuple[()],
    params: Params,
    extra_args: Mapping[str, Any],
) -> tuple[optax.Updates, optax.OptState, RestartState | tuple[()]]:
    """A masked step at which what comes back starts anew; see `masked_step`.

    Args:
      optimizer: the wrapped optimizer.
      before: boolean masks of the step before.
      masks: boolean masks of this step.
      gradients: gradients, like the parameters.
      inner: the optimizer's state.
      restarts: state of the restarts.
      params: the parameters.
      extra_args: extra arguments of the optimizer's `update`.

    Returns:
      The update and both new states.
    """
    returned = map_masked(lambda mask, old: mask & ~old, masks, before)
    inner = _fresh_moments(optimizer, inner, returned, select_kept(masks, params))
    updates, stepped = masked_step(
        optimizer, masks, gradients, inner, params, extra_args
    )
    if restarts:
        updates, restarts = _corrected(
            updates, restarts, returned, masks, inner, stepped
        )
    return updates, stepped, restarts


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


def _corrected(
    updates: optax.Updates,
    state: RestartState,
    returned: Masks,
    masks: Masks,
    before: optax.OptState,
    inner: optax.OptState,
) -> tuple[optax.Updates, RestartState]:
    """The updates, of weights that came back by Adam's correction for their age.

    `before` and `inner` are the optimizer's state before the step and after it.
    """
    named, ages = tree.named_leaves(updates), tree.named_leaves(state.ages)
    named_returned, named_masks = map(tree.named_leaves, (returned, masks))
    corrected = {name for name, age in ages.items() if tree.is_excluded(age)}
    nodes = zip(_adam_nodes(before), _adam_nodes(inner), state.decays, strict=True)
    for old, new, decays in nodes:
        for name, moment in tree.named_leaves(new.mu).items():
            # A leaf is of the first of Adam's states that holds it; a node that was
            # left out may stand for a whole subtree.
            if tree.is_excluded(moment) or name in corrected:
                continue
            corrected.add(name)
            age = jnp.where(named_returned[name], 1, ages[name].astype(jnp.int32))
            # A step that collects gradients, or leaves them out, makes nothing older.
            older = age + new.count - old.count
            known = (age > 0) & named_masks[name] & (older <= _OLDEST)
            factor = _correction(new.count, older - 1, decays)
            # All others keep their bits; removals, -w, are of what is pruned.
            scaled = (named[name] * factor).astype(named[name].dtype)
            named[name] = jnp.where(known, scaled, named[name])
            ages[name] = jnp.where(known, older, 0).astype(jnp.uint16)

    def like(reference: Any, leaves: dict[str, Any]) -> Any:
        structure = jax.tree.structure(reference, is_leaf=tree.is_leaf)
        return jax.tree.unflatten(structure, leaves.values())

    return like(updates, named), state._replace(ages=like(state.ages, ages))


def _correction(
    count: jax.Array, steps: Int32[Array, "..."], decays: Float32[Array, "2"]
) -> Float32[Array, "..."]:
    """What Adam's update of a weight of so many steps is multiplied by."""

    def corrections(steps: jax.Array) -> list[jax.Array]:
        # 1 - b^n; 1 for a decay of 0. `expm1` would take half as long again, for digits
        # that `decays` does not have.
        steps = jnp.maximum(steps, 1).astype(jnp.float32)
        return [1 - jnp.exp(steps * jnp.log(decay)) for decay in decays]

    (first, second), (first_of_all, second_of_all) = map(corrections, (steps, count))
    return first_of_all / first * jnp.sqrt(second / second_of_all)


def _adam_nodes(state: optax.OptState) -> list[Any]:
    """Adam's states, in the order of the tree; AMSGrad's are such."""
    nodes = jax.tree.leaves(_without_trackers(state), is_leaf=_is_adams)
    return [node for node in nodes if _is_adams(node)]


def _is_adams(node: Any) -> bool:
    return has_adams_type(node) or isinstance(node, optax.ScaleByAmsgradState)


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


def _decays(
    optimizer: optax.GradientTransformation, params: Params, states: int
) -> np.ndarray:
    """b1 and b2 of each of Adam's states (states, 2), read from its steps.

    A step on a gradient gives the moments values; the next, without a gradient, leaves
    b1 and b2 of them. Zero, which corrects nothing, where that shows no average: of
    what does not step, with a warning, and of Yogi's sum.
    """
    decays = np.zeros((states, 2), np.float32)
    optimizer = optax.with_extra_args_support(optimizer)
    try:
        with jax.ensure_compile_time_eval(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            zeros, gradients = pairs_like(params)
            state = optimizer.init(zeros)
            moved = []
            for gradient in (gradients, zeros):
                before = [_largest(node) for node in _adam_nodes(state)]
                for _ in range(_PROBES):
                    _, state = optimizer.update(gradient, state, zeros, value=0.0)
                    after = [_largest(node) for node in _adam_nodes(state)]
                    if after != before:
                        break
                moved.append(np.array(after))  # (states, 2)
            maxima = [is_linear(node.nu) for node in _adam_nodes(state)]
    except Exception as error:  # whatever an optimizer says of leaves of two numbers
        _warn(f"Adam's decays cannot be read from a step of two numbers ({error})")
        return decays
    if not moved[0].any():
        _warn(f"Adam took no step in {_PROBES} updates")
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.nan_to_num(moved[1] / moved[0])
    # A b1 of 0 leaves nothing of the first moment.
    averages = (ratios < 1).all(1) & (ratios[:, 1] > 0)  # (states,)
    decays[averages] = ratios[averages]
    decays[maxima, 1] = 0  # Adamax corrects its first moment alone
    return decays


def _warn_of_uncorrected(state: optax.OptState) -> None:
    def is_uncorrected(node: Any) -> bool:
        return type(node).__name__ in _UNCORRECTED

    if any(map(is_uncorrected, jax.tree.leaves(state, is_leaf=is_uncorrected))):
        _warn("this optimizer's bias correction is not Adam's")


def _warn(why: str) -> None:
    warnings.warn(
        f"{why}, so the first steps of a weight that comes back may be several times "
        "too large; take optax.adam or the like, or a lower learning rate",
        stacklevel=5,  # the caller of `init`
    )


def _largest(node: Any) -> tuple[float, float]:
    """The largest numbers of both moments."""
    first, second = (
        max((float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(part)), default=0.0)
        for part in (node.mu, node.nu)
    )
    return first, second
