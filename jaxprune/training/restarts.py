"""A weight that comes back starts anew: fresh moments, and a count of its own.

What an optimizer holds of a weight that was pruned is stale, so a weight that grows
gets what `init` would give it. Adam divides its moments by 1 - b^t, since their
averages began at zero t steps before. They began later for a weight that came back a
steps ago, and by the t of all others its first step would be
(1 - b1) / sqrt(1 - b2) = 3.16 times too large. So its update is multiplied by

    (1 - b1^t) / (1 - b1^a) sqrt((1 - b2^a) / (1 - b2^t)),

which leaves out Adam's epsilon. A weight needs no count for it but the number of the
event at which it came back, one byte; a table of 256 has the optimizer's count at each.
"""

import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float32

from jaxprune.arrays import placement, tree
from jaxprune.scores.adamax import has_adams_type, is_linear, pairs_like
from jaxprune.training.masked import map_masked, select_kept, zeros_of
from jaxprune.typing import Masks, Params

# Event numbers of one byte; 0 is for what never came back, or so many events ago.
_SLOTS = 256
# Updates that a probe waits for a step of an optimizer that collects gradients.
_PROBES = 32


class RestartState(NamedTuple):
    """Which weights came back, and when.

    Attributes:
      slots: number of the event at which a weight came back, uint8 like the masks.
      latest: number of the last event, from 1 to 255 and then from 1 again, int32.
      starts: count of each of Adam's states at each event, int32 (states, 256).
      decays: b1 and b2 of each of Adam's states, float32 (states, 2); 0 for none.
    """

    slots: Params
    latest: jax.Array
    starts: jax.Array
    decays: jax.Array


def start_restarts(
    optimizer: optax.GradientTransformation,
    inner: optax.OptState,
    masks: Masks,
    params: Params,
) -> RestartState:
    """The state in which nothing has come back.

    Args:
      optimizer: optimizer whose state it is; it is asked for steps of two numbers a
        leaf, from which Adam's decays are read.
      inner: state of the optimizer.
      masks: boolean masks like the parameters.
      params: parameters, or optax's stand-in for them.

    Raises:
      ValueError: optax cannot tell which parts of the state belong to the parameters.
    """
    nodes = _adam_nodes(inner)
    latest = placement.counter(params)
    starts = jnp.zeros((len(nodes), _SLOTS), jnp.int32)
    if tree.is_placeholder(params):
        decays = jnp.zeros((len(nodes), 2), jnp.float32)
        return RestartState(params, latest, starts, decays)
    slots = zeros_of(masks, params, jnp.uint8)
    try:
        _moments(optimizer, inner, slots)
    except Exception as error:  # whatever an optimizer's `init` says of a stand-in
        raise ValueError(
            "a weight that grows needs fresh moments, but optax.tree.map_params cannot "
            "tell which parts of this optimizer's state belong to the parameters "
            f"({error}); leave optax.flatten and the like out"
        ) from error
    decays = jnp.asarray(_decays(optimizer, params, len(nodes)))
    # On the devices of the parameters, or the second step would compile anew.
    return RestartState(slots, latest, latest + starts, latest + decays)


def restart(
    optimizer: optax.GradientTransformation,
    state: RestartState,
    inner: optax.OptState,
    due: Any,
    masks: Masks,
    new_masks: Masks,
    params: Params,
) -> tuple[RestartState, optax.OptState]:
    """The states in which what an event returns is new.

    Args:
      optimizer: optimizer whose state `inner` is.
      state: state of the restarts.
      inner: state of the optimizer.
      due: whether this step has an event, boolean scalar.
      masks: boolean masks before the event.
      new_masks: boolean masks after it.
      params: the parameters.

    Returns:
      Both states; the optimizer's is that of `init` where a weight comes back. What
      trackers hold is of the whole run, and stays.
    """
    counts = [node.count for node in _adam_nodes(inner)]
    latest = jnp.where(due, state.latest % (_SLOTS - 1) + 1, state.latest)
    here = due & (jnp.arange(_SLOTS) == latest)  # (256,)
    starts = state.starts
    if counts:
        starts = jnp.where(here[None], jnp.stack(counts)[:, None], starts)

    def slot(new: jax.Array, mask: jax.Array, before: jax.Array) -> jax.Array:
        # A number is used again after 255 events, by when its weights are old ones.
        reused = due & (before == latest)
        # Of what is pruned too, so that its removal, -w, is not multiplied.
        kept = jnp.where(new & ~reused, before, 0)
        return jnp.where(new & ~mask, latest.astype(jnp.uint8), kept)

    slots = map_masked(slot, new_masks, masks, state.slots)
    returned = map_masked(lambda new, mask: new & ~mask, new_masks, masks)
    # Of the parameters as the optimizer sees them: zero where a weight comes back.
    fresh = optimizer.init(select_kept(new_masks, params))
    inner = jax.tree.map(
        lambda chosen, new, old: (
            old
            if chosen is False
            else jnp.where(jnp.broadcast_to(chosen, old.shape), new, old)
        ),
        _moments(optimizer, inner, returned),
        fresh,
        inner,
    )
    return RestartState(slots, latest, starts, state.decays), inner


def corrected(
    updates: optax.Updates, state: RestartState, inner: optax.OptState
) -> optax.Updates:
    """The updates, those of weights that came back by Adam's correction for their age.

    Args:
      updates: updates of the optimizer, like the parameters.
      state: state of the restarts.
      inner: state of the optimizer after the step.
    """
    factors = dict[str, Float32[Array, "256"]]()
    for number, node in enumerate(_adam_nodes(inner)):
        table = _corrections(node.count, state.starts[number], state.decays[number])
        named = tree.named_leaves(node.mu)
        # The first of Adam's states that holds a leaf, as under `optax.partition`.
        trained = [name for name, leaf in named.items() if not tree.is_excluded(leaf)]
        factors = dict.fromkeys(trained, table) | factors
    named_slots = tree.named_leaves(state.slots)
    named = tree.named_leaves(updates)
    leaves = [
        update
        if name not in factors or tree.is_excluded(named_slots[name])
        else _scaled(update, factors[name], named_slots[name])
        for name, update in named.items()
    ]
    structure = jax.tree.structure(updates, is_leaf=tree.is_leaf)
    return jax.tree.unflatten(structure, leaves)


def _scaled(update: jax.Array, table: jax.Array, slots: jax.Array) -> jax.Array:
    """The update times what the table has at each slot."""
    sharding = jax.typeof(slots).sharding
    # On a mesh of Explicit axes an array of indices does not say how its result lies.
    explicit = sharding if sharding.mesh.explicit_axes else None
    factor = table.at[slots].get(mode="promise_in_bounds", out_sharding=explicit)
    return (update * factor).astype(update.dtype)


def _corrections(
    count: jax.Array, starts: jax.Array, decays: jax.Array
) -> Float32[Array, "256"]:
    """What the update of a weight of each slot is multiplied by; 1 of slot 0."""
    # Adam's count has the step already; a step that was left out has an update of zero.
    ages = jnp.maximum(count - starts, 1)  # (256,)
    (first, second), (first_all, second_all) = (
        # 1 - b^n, where b^n is near 1 too; 1 for a decay of 0.
        [-jnp.expm1(steps * jnp.log(decay)) for decay in decays]
        for steps in (ages.astype(jnp.float32), jnp.maximum(count, 1).astype("f4"))
    )
    return first_all / first * jnp.sqrt(second / second_all)


def _adam_nodes(state: optax.OptState) -> list[Any]:
    """Adam's states, in the order of the tree; AMSGrad's are such."""
    nodes = jax.tree.leaves(state, is_leaf=_is_adams)
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
        own_shape = jnp.shape(value)[-chosen.ndim :] if chosen.ndim else ()
        fits = tree.is_floating(value) and own_shape == chosen.shape
        return chosen if fits else False

    marks = optax.tree.map_params(
        optimizer,
        mark,
        state,
        chosen,
        transform_non_params=lambda _: False,
        is_leaf=tree.is_excluded,
    )
    return jax.tree.map(
        lambda node: jax.tree.map(lambda _: False, node) if _is_tracker(node) else node,
        marks,
        is_leaf=_is_tracker,
    )


def _is_tracker(node: Any) -> bool:
    return hasattr(node, "importance_fields")


def _decays(
    optimizer: optax.GradientTransformation, params: Params, states: int
) -> np.ndarray:
    """b1 and b2 of each of Adam's states (states, 2), read from its steps.

    A step on a gradient gives the moments values; the next, without a gradient, leaves
    b1 and b2 of them. Zero, which corrects nothing, where that shows no average: of
    what does not step, and of Yogi's sum.
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
                    _, state = optimizer.update(gradient, state, zeros)
                    after = [_largest(node) for node in _adam_nodes(state)]
                    if after != before:
                        break
                moved.append(np.array(after))  # (states, 2)
            maxima = [is_linear(node.nu) for node in _adam_nodes(state)]
    except Exception:  # whatever an optimizer says of leaves that are not the model's
        return decays
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.nan_to_num(moved[1] / moved[0])
    averages = ((ratios > 0) & (ratios < 1)).all(1)  # (states,)
    decays[averages] = ratios[averages]
    decays[maxima, 1] = 0  # Adamax corrects its first moment alone
    return decays


def _largest(node: Any) -> tuple[float, float]:
    """The largest numbers of both moments."""
    first, second = (
        max((float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(part)), default=0.0)
        for part in (node.mu, node.nu)
    )
    return first, second
