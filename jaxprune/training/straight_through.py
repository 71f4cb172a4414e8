"""Straight-through training: what is pruned goes on learning until the masks freeze.

The parameters that the user holds are the pruned ones, exactly sparse after every step.
The rest of each dense weight is parked in the state, where the parameters are zero and
nowhere else: dense = params + parked. The gradient at the pruned parameters is the
straight-through gradient of the dense weights. So there is no hook, and a checkpoint,
an evaluation or an export of the parameters needs nothing more.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxprune import leaves, scores
from jaxprune.arrays import placement, tree
from jaxprune.arrays.axes import Axes
from jaxprune.arrays.messages import check_steps
from jaxprune.masking.counts import Allocation
from jaxprune.training import schedules
from jaxprune.training.event_table import Rules
from jaxprune.training.mask_events import MaskEvents
from jaxprune.training.masked import needed, on_masked, select, where, wrapped
from jaxprune.typing import Criterion, Masks, Params, Pattern, Prunable


class StraightThroughState(NamedTuple):
    """State of `straight_through`.

    Attributes:
      step: updates seen, int32 scalar.
      masks: the masks, like the parameters, boolean; packed where that was asked for.
      parked: the dense weights where the masks prune, zero where they keep; all zero
        once the masks are frozen.
      inner: the wrapped optimizer's state.
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
    criterion: Criterion = scores.trajectory,
    allocation: Allocation = "global",
    pattern: Pattern | str = "unstructured",
    axes: Axes | Mapping[str, Axes] | None = None,
    prunable: Prunable = leaves.prunable,
    packed: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Trains dense weights by the gradients of pruned ones, until `freeze`.

    From the schedule's first event on, masks are chosen anew at every event and every
    so many steps, from the dense weights that the step leads to; what was pruned may
    come back. A step at which masks change costs a ranking of all weights.

    Args:
      optimizer: any optax optimizer, with its clipping; it sees dense weights and the
        gradient of all of them. What the criterion reads must be inside it.
      schedule: one of `jp.schedules`, or {step: sparsity or n:m pattern}.
      freeze: the step from which masks are fixed and what they prune is gone for good,
        not before the last event; None for never.
      every: steps between two choices of masks at the same sparsity. What is pruned
        drifts unseen in between, so more than one step costs quality.
      criterion: which weights matter, as for `gradual`.
      allocation: how each sparsity is shared out, as for `gradual`.
      pattern: which weights are pruned together, as for `gradual`.
      axes: which axes are input and output, as for `gradual`.
      prunable: which leaves may be pruned.
      packed: whether masks take one bit a weight, as for `gradual`.

    Returns:
      A transformation after whose every step the pruned weights are +0, if nothing
      behind it changes the updates: a learning rate or clipping goes inside. Its state
      holds a mask and one more value for each weight that may be pruned.

    Raises:
      ValueError: the arguments do not agree; at `init`: no leaf is prunable, or the
        criterion's statistic is not in the optimizer; at `update`: no parameters.
      TypeError: an argument is of another kind.

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
    rules = Rules(schedule, allocation, pattern, axes)
    masking = MaskEvents(
        rules, criterion, prunable, packed, revive=True, name="straight_through"
    )
    first, last = int(rules.steps[0]), int(rules.steps[-1])
    end = 2**31 - 1 if freeze is None else freeze
    check_steps("straight_through", every=every, freeze=end)
    if every < 1 or end < last:
        raise ValueError(
            "straight_through needs every >= 1 and a freeze at or after the schedule's "
            f"last event at step {last}, got every={every}, freeze={freeze}"
        )
    optimizer = wrapped(optimizer, "straight_through", "schedule")

    def init(params: Params) -> StraightThroughState:
        inner = optimizer.init(params)
        if tree.is_placeholder(params):
            return StraightThroughState(
                placement.counter(params), params, params, inner
            )
        masks = masking.start(params, inner)
        parked = on_masked(
            lambda mask, leaf: placement.zeros_like(leaf, leaf.dtype),
            masking.read(masks, params),
            params,
        )
        return StraightThroughState(placement.counter(params), masks, parked, inner)

    def update(
        updates: optax.Updates,
        state: StraightThroughState,
        params: Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, StraightThroughState]:
        params = needed(params, "straight_through")
        step, held, parked, inner = state
        again = jnp.any(masking.hit(step)) | ((step - first) % every == 0)
        due = again & (step >= first) & (step <= end)
        frozen, kept = step > end, masking.read(held, params)
        trained = on_masked(lambda mask: mask | ~frozen, kept)
        before = _dense(parked, params)
        updates, inner = optimizer.update(
            select(trained, updates), inner, before, **extra_args
        )
        dense = optax.apply_updates(before, updates)
        # Masks chosen from the weights before the step would lag one step behind the
        # weights that the user sees, and training would end at a higher loss.
        held = masking.changed(
            due, masking.latest(step), step, held, lambda: (dense, inner), params
        )
        over, kept = step >= end, masking.read(held, params)
        left = on_masked(
            lambda mask, leaf: jnp.where(mask | over, jnp.zeros_like(leaf), leaf),
            kept,
            dense,
        )
        new = StraightThroughState(optax.safe_increment(step), held, left, inner)
        return on_masked(_seen, kept, dense, params, rest=updates), new

    return optax.GradientTransformationExtraArgs(init, update)


def _dense(parked: Params, params: Params) -> Params:
    """The dense weights; at each place one of the two is zero."""
    return on_masked(lambda own, leaf: leaf + own, parked, params, rest=params)


def _seen(mask: jax.Array, dense: jax.Array, leaf: jax.Array) -> jax.Array:
    """What the user's weight moves by: to the dense weight, or to zero."""
    # Not the step itself: it and what was parked would have to be kept beside `dense`,
    # two more copies of the parameters.
    return where(mask, dense - leaf, -leaf)
