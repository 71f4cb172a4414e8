"""Pruning by ADMM while it trains: dense weights that are pulled towards sparse ones.

f(x) is minimised over x = z with z sparse. Each gradient gets the pull
lambda (x - z + u); every so many steps the sparse copy z is the projection of
v = x + u, and the scaled dual u takes what z left out: u = v - z. So z lives where the
masks keep and u where they prune, and one tree v holds both.

    ELSA's      ours
    x           `params`, dense until `freeze`
    z           `state.split` where `state.masks` keep, else 0
    u           `state.split` where `state.masks` prune, else 0
    lambda      `penalty`
    E[g^2]      `state.gradients.square`; there Adam's second moment
    the projection of v, every so many steps: `MaskEvents.choose` and `every`
"""

import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxprune import leaves, scores
from jaxprune.arrays import placement
from jaxprune.arrays.axes import Axes
from jaxprune.arrays.rules import Rule, check, is_between
from jaxprune.masking.counts import Allocation
from jaxprune.scores.names import parse_criterion
from jaxprune.training import schedules, weightings
from jaxprune.training.event_table import EventTable
from jaxprune.training.mask_events import MaskEvents
from jaxprune.training.masked import (
    freeze_masks,
    map_masked,
    masked_step,
    require_params,
    wrapped_optimizer,
    zeros_of,
)
from jaxprune.training.track import TrackGradientsState, track_gradients
from jaxprune.typing import Criterion, Masks, Params, Pattern, PrunableLike

# How much of the average E[g^2] of the loss's own gradients each step keeps.
_DECAY = 0.95


class AdmmState(NamedTuple):
    """State of `admm`.

    Attributes:
      step: number of updates so far, int32 scalar.
      masks: boolean masks like the parameters, True where the sparse copy is not zero.
      split: v in float32, whose kept part is the sparse copy z and whose pruned part is
        the scaled dual u; not read before the first event, zero after `freeze`.
      gradients: average of the loss's own squared gradients.
      inner: state of the wrapped optimizer.
    """

    step: jax.Array
    masks: Masks
    split: Params
    gradients: TrackGradientsState
    inner: optax.OptState


def admm(
    optimizer: optax.GradientTransformation,
    schedule: schedules.Events,
    *,
    freeze: int,
    every: int = 32,
    penalty: float | optax.Schedule = 0.01,
    criterion: Criterion | str = scores.obd,
    allocation: Allocation = "layer",
    pattern: Pattern | str = "unstructured",
    axes: Axes | Mapping[str, Axes] | None = None,
    prunable: PrunableLike = leaves.prunable,
) -> optax.GradientTransformationExtraArgs:
    """Trains dense weights towards sparse ones, and leaves them exactly sparse.

    From the schedule's first event on each gradient gets lambda (x - z + u). At every
    event and every so many steps v = x + u is projected: z keeps the highest of
    E[g^2]^p v^2, u = v - z. At `freeze` the weights themselves are projected; from then
    on pruned weights are +0 after every step, as under `keep_masks`. E[g^2] is the
    exponential average of decay 0.95 of the loss's own gradients; the pull is left out
    of it, though it enters Adam's second moment.

    Args:
      optimizer: optax optimizer; it sees the pull as part of the gradient. To clip the
        gradient and not the pull, clip in front: `chain(clip, admm(...))`.
      schedule: value of `jp.schedules`, or {step: sparsity or n:m pattern}; of the
        sparse copy. One event, as of `jp.schedules.once(begin, 0.8)`, is usual.
      freeze: step at which the weights are projected, after the first event and not
        before the last.
      every: number of steps between two projections at the same sparsity.
      penalty: lambda, over 0, or a schedule of it over the steps since the first event.
      criterion: function that ranks v, of v and E[g^2]: `scores.obd` is p = 1 (ELSA),
        `scores.preconditioned_magnitude` p = 1/2 and `scores.magnitude` p = 0.
      allocation: rule by which each sparsity is shared out; see `gradual`.
      pattern: which weights are pruned together; see `gradual`.
      axes: input and output axes of the leaves; see `gradual`.
      prunable: which leaves may be pruned; see `gradual`.

    Returns:
      A transformation whose state holds a mask and two float32 values for each weight
      that may be pruned: E[g^2], and one value that holds z or u.

    Raises:
      ValueError: an argument is out of range; at `init`: no leaf is prunable, or the
        criterion reads more than E[g^2]; at `update`: no parameters.
      TypeError: an argument is of another kind.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import jaxprune as jp
      >>> params = {"w": jnp.array([[1.0, 2.0], [3.0, 4.0]])}
      >>> once = jp.schedules.once(0, 0.5)
      >>> tx = jp.contrib.admm(optax.adam(0.1), once, freeze=2, every=1)
      >>> state = tx.init(params)
      >>> for _ in range(3):
      ...     updates, state = tx.update({"w": jnp.ones((2, 2))}, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> jp.sparsity(params).total
      0.5

    Reference:
      Lee, Jang, Lee, Alistarh, Lee, "The Unseen Frontier: Pushing the Limits of LLM
      Sparsity with Surrogate-Free ADMM" (ELSA), 2025. Theirs weighs by Adam's second
      moment, and z begins as the projection by magnitude.
    """
    table = EventTable(schedule, allocation, pattern, axes)
    masking = MaskEvents(
        "admm", table, parse_criterion(criterion), prunable, every=every, freeze=freeze
    )
    first = int(table.steps[0])
    check(_RULES, freeze=freeze, first=first, penalty=penalty)
    tracker = track_gradients(weightings.exponential(_DECAY))
    optimizer = wrapped_optimizer(optimizer, "admm", "schedule")

    def init(params: Params) -> AdmmState:
        inner = optimizer.init(params)
        # Abstract: the criterion's own rule may leave out more than `prunable` does,
        # and of such leaves nothing is averaged.
        masks = masking.start(params, jax.eval_shape(tracker.init, params))
        gradients = tracker.init(_of_masked(masks, params))
        split = zeros_of(masks, params, jnp.float32)
        return AdmmState(placement.counter(params), masks, split, gradients, inner)

    def update(
        updates: optax.Updates,
        state: AdmmState,
        params: Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, AdmmState]:
        params = require_params(params, "admm")
        step, old_masks, split, gradients, inner = state
        frozen, loss_gradients = step >= freeze, _of_masked(old_masks, updates)
        _, gradients = tracker.update(loss_gradients, gradients, params)

        def projected() -> Params:
            add_dual = functools.partial(_add_dual, frozen)
            return map_masked(add_dual, old_masks, split, params)  # v = x + u

        due = masking.due(step) | (step == freeze)
        masks = masking.choose(
            due, step, old_masks, lambda: (projected(), gradients), loss_gradients
        )
        split = jax.tree.map(
            lambda new, old: jnp.where(due, new, old), projected(), split
        )
        active = (step >= first) & ~frozen
        pull = functools.partial(_pull, _factor(penalty, step - first, active))
        updates = map_masked(pull, masks, updates, split, params, unmasked=updates)
        updates, inner = masked_step(
            optimizer, freeze_masks(masks, frozen), updates, inner, params, extra_args
        )
        # From the freeze on the masks alone hold: a later dual would never be read.
        split = jax.tree.map(lambda v: jnp.where(frozen, jnp.float32(0), v), split)
        step = optax.safe_increment(step)
        return updates, AdmmState(step, masks, split, gradients, inner)

    return optax.GradientTransformationExtraArgs(init, update)


def _of_masked(masks: Masks, values: Any) -> Any:
    """The values of the leaves that have a mask."""
    return map_masked(lambda mask, value: value, masks, values)


def _factor(
    penalty: float | optax.Schedule, since: jax.Array, active: jax.Array
) -> jax.Array:
    """lambda, float32 scalar; zero before the first event and from the freeze on."""
    factor = jnp.asarray(penalty(since) if callable(penalty) else penalty)
    return jnp.where(active, factor.astype(jnp.float32), 0)


def _add_dual(
    frozen: jax.Array, mask: jax.Array, v: jax.Array, x: jax.Array
) -> jax.Array:
    """x + u, float32; without u once it is frozen."""
    dual = jnp.where(mask | frozen, jnp.float32(0), v)
    return x.astype(jnp.float32) + dual


def _pull(
    factor: jax.Array, mask: jax.Array, g: jax.Array, v: jax.Array, x: jax.Array
) -> jax.Array:
    """g + lambda (x - z + u), in the gradient's dtype, as which moments are held."""
    distance = x.astype(jnp.float32) - jnp.where(mask, v, -v)  # x - z + u
    # Added in float32 and rounded once; bfloat16 then has no pull under 1/512 of g.
    dtype = g.dtype if g.dtype.itemsize >= 4 else jnp.float32
    return (g.astype(dtype) + (factor * distance).astype(dtype)).astype(g.dtype)


_RULES = [
    Rule(
        lambda v: v.freeze is not None,
        "admm needs a freeze, at which the weights are projected, got None",
        "give the step, or take jp.straight_through(..., freeze=None)",
        error=TypeError,
    ),
    Rule(
        # Without a step between the two, nothing would be pulled.
        lambda v: v.first < v.freeze,
        "admm needs a freeze after the schedule's first event at step {first}, got "
        "freeze={freeze}",
    ),
    Rule(
        # `optax.inject_hyperparams` gives a traced penalty.
        lambda v: (
            callable(v.penalty)
            or isinstance(v.penalty, jax.core.Tracer)
            or (is_between(v.penalty, 0, math.inf) and 0 < v.penalty < math.inf)
        ),
        "admm needs a finite penalty over 0, got {penalty}",
        "0.01 is usual",
    ),
]
