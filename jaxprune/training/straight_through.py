"""Straight-through training: what is pruned goes on learning until the masks freeze.

The parameters that the user holds are the pruned ones, exactly sparse after every step.
The rest of each dense weight is parked in the state, where the parameters are zero and
nowhere else: dense = params + parked. The gradient at the pruned parameters is the
straight-through gradient of the dense weights. So there is no hook, and a checkpoint,
an evaluation or an export of the parameters needs nothing more.

    the literature's             ours
    theta, the dense weights     `params + state.parked`
    m, the mask                  `state.masks`
    m * theta, the forward pass  `params`
    dL / d(m * theta), in the    `updates` that come in; they train theta, as if the
      place of dL / d theta        derivative of the masking were 1
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxprune import leaves, scores
from jaxprune.arrays import placement
from jaxprune.arrays.axes import Axes
from jaxprune.masking.counts import Allocation
from jaxprune.scores.names import parse_criterion
from jaxprune.training import schedules
from jaxprune.training.event_table import EventTable
from jaxprune.training.mask_events import MaskEvents
from jaxprune.training.masked import (
    freeze_masks,
    map_masked,
    require_params,
    select,
    select_kept,
    wrapped_optimizer,
    zeros_of,
)
from jaxprune.typing import Criterion, Masks, Params, Pattern, PrunableLike


class StraightThroughState(NamedTuple):
    """State of `straight_through`.

    Attributes:
      step: number of updates so far, int32 scalar.
      masks: boolean masks like the parameters; packed where that was asked for.
      parked: dense weights where the masks prune, zero where they keep; all zero once
        the masks are frozen.
      inner: state of the wrapped optimizer.
    """

    step: jax.Array
    masks: Masks
    parked: Params
    inner: optax.OptState


def straight_through(
    optimizer: optax.GradientTransformation,
    schedule: schedules.Events,
    *,
    freeze: int | None,
    every: int = 1,
    criterion: Criterion | str = scores.preconditioned_magnitude,
    allocation: Allocation = "global",
    pattern: Pattern | str = "unstructured",
    axes: Axes | Mapping[str, Axes] | None = None,
    prunable: PrunableLike = leaves.prunable,
    packed: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Trains dense weights by the gradients of pruned ones, until `freeze`.

    From the schedule's first event on, masks are chosen anew at every event and every
    so many steps, from the dense weights that the step leads to; what was pruned may
    come back. A step at which masks change costs a ranking of all weights.

    Args:
      optimizer: optax optimizer, with its clipping; it sees dense weights and the
        gradient of all of them. What the criterion reads must be inside it.
      schedule: value of `jp.schedules`, or {step: sparsity or n:m pattern}.
      freeze: step from which masks are fixed and what they prune is gone for good, not
        before the last event; None for never.
      every: number of steps between two choices of masks at the same sparsity. What is
        pruned drifts unseen in between, so more than one step costs quality.
      criterion: function that ranks the weights; see `gradual`.
      allocation: rule by which each sparsity is shared out; see `gradual`.
      pattern: which weights are pruned together; see `gradual`.
      axes: input and output axes of the leaves; see `gradual`.
      prunable: which leaves may be pruned; see `gradual`.
      packed: whether masks take one bit a weight; see `gradual`.

    Returns:
      A transformation after whose every step the pruned weights are +0, if nothing
      behind it changes the updates: a learning rate or clipping goes inside. Its state
      holds a mask and one more value for each weight that may be pruned.

    Raises:
      ValueError: the arguments do not agree; at `init`: no leaf is prunable, or the
        criterion's statistic is not in the optimizer; at `update`: no parameters.
      TypeError: an argument has the wrong type.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import jaxprune as jp
      >>> params = {"w": jnp.array([[1.0, 2.0], [3.0, 4.0]])}
      >>> tx = jp.straight_through(optax.adam(0.1), jp.schedules.once(1, 0.5), freeze=9)
      >>> state = tx.init(params)
      >>> for _ in range(2):
      ...     updates, state = tx.update({"w": jnp.ones((2, 2))}, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> jp.sparsity(params).total, int(jnp.sum(state.parked["w"] != 0))
      (0.5, 2)

    Reference:
      Bengio, Leonard, Courville, "Estimating or Propagating Gradients Through
      Stochastic Neurons for Conditional Computation", 2013, arXiv 1308.3432.
    """
    table = EventTable(schedule, allocation, pattern, axes)
    masking = MaskEvents(
        "straight_through",
        table,
        parse_criterion(criterion),
        prunable,
        packed,
        every,
        freeze,
    )
    optimizer = wrapped_optimizer(optimizer, "straight_through", "schedule")

    def init(params: Params) -> StraightThroughState:
        inner = optimizer.init(params)
        state_masks = masking.start(params, inner)
        parked = zeros_of(masking.read(state_masks, params), params)
        return StraightThroughState(
            placement.counter(params), state_masks, parked, inner
        )

    def update(
        updates: optax.Updates,
        state: StraightThroughState,
        params: Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, StraightThroughState]:
        params = require_params(params, "straight_through")
        step, state_masks, parked, inner = state
        trained = freeze_masks(
            masking.read(state_masks, params), frozen=step > masking.freeze_step
        )
        before = map_masked(_unpark, parked, params, unmasked=params)
        updates, inner = optimizer.update(
            select_kept(trained, updates), inner, before, **extra_args
        )
        dense = optax.apply_updates(before, updates)
        # Masks chosen from the weights before the step would lag one step behind the
        # weights that the user sees, and training would end at a higher loss.
        state_masks = masking.choose(
            masking.due(step), step, state_masks, lambda: (dense, inner), params
        )
        masks = masking.read(state_masks, params)
        parked = _park(masks, dense, frozen=step >= masking.freeze_step)
        updates = map_masked(_update, masks, dense, params, unmasked=updates)
        step = optax.safe_increment(step)
        return updates, StraightThroughState(step, state_masks, parked, inner)

    return optax.GradientTransformationExtraArgs(init, update)


def _unpark(parked: jax.Array, weight: jax.Array) -> jax.Array:
    """The dense weights; at each place one of the two is zero."""
    return weight + parked


def _park(masks: Masks, dense: Params, frozen: jax.Array) -> Params:
    """The dense weights where the masks prune, until the masks are frozen."""
    return map_masked(
        lambda mask, leaf: jnp.where(mask | frozen, jnp.zeros_like(leaf), leaf),
        masks,
        dense,
    )


def _update(mask: jax.Array, dense: jax.Array, weight: jax.Array) -> jax.Array:
    """What the user's weight moves by: to the dense weight, or to zero."""
    # Not the step itself: it and what was parked would have to be kept beside `dense`,
    # two more copies of the parameters.
    return select(mask, dense - weight, -weight)
