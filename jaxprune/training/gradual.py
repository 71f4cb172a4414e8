"""Pruning while it trains: an optimizer whose masks tighten on a schedule.

It is `keep_masks` with masks that it chooses itself. At a step with an event the masks
come first, from the parameters and the moments that come in; then the step is taken
under them. There is no hook before or after the step that a loop could forget, and the
parameters have exact zeros after every step.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import optax

from jaxprune import leaves, scores
from jaxprune.arrays import placement
from jaxprune.arrays.axes import Axes
from jaxprune.masking.counts import Allocation
from jaxprune.masking.patterns import Block, Channel
from jaxprune.scores.names import parse_criterion
from jaxprune.training import schedules
from jaxprune.training.event_table import Event, EventTable
from jaxprune.training.grow import Grow, parse_growth
from jaxprune.training.mask_events import MaskEvents
from jaxprune.training.masked import masked_step, require_params, wrapped_optimizer
from jaxprune.training.restarts import restarted_step, start_ages
from jaxprune.typing import Criterion, Masks, Params, Pattern, PrunableLike


class GradualState(NamedTuple):
    """State of `gradual`.

    Attributes:
      step: number of updates so far, int32 scalar.
      masks: boolean masks like the parameters; packed where that was asked for.
      inner: state of the wrapped optimizer.
      ages: 1 and the number of steps since each weight came back, uint16, 0 for none;
        () where nothing grows or the optimizer does not count steps as Adam does.
    """

    step: jax.Array
    masks: Masks
    inner: optax.OptState
    ages: Params | tuple[()] = ()


def gradual(
    optimizer: optax.GradientTransformation,
    schedule: schedules.Events,
    *,
    criterion: Criterion | str = scores.preconditioned_magnitude,
    allocation: Allocation = "global",
    pattern: Pattern | str = "unstructured",
    axes: Axes | Mapping[str, Axes] | None = None,
    prunable: PrunableLike = leaves.prunable,
    grow: Grow | str | None = None,
    decays: tuple[float, float] = (0.9, 0.999),
    packed: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Prunes while it trains; a pruned weight stays so, unless `grow` returns it.

    But where a group of a later n:m, or one of the outputs that a pattern treats alike,
    has fewer weights left than it is to keep, pruned ones return; and where an
    allocation such as "erk" divides the sparsity anew at each event, its rounding may
    give a leaf a weight back. `init` keeps all weights, zeros too: to go on from a
    pruned model, `masks.replace(tx.init(params), masks)`; until the schedule is above
    their sparsity, these masks stay.

    An event at step t is part of the update that t updates came before: masks are
    chosen from the parameters and statistics as they come in, and the step is taken
    under the new masks. A loop that calls `masks.make` and `masks.replace` before that
    update does the same.

    Args:
      optimizer: optax optimizer, with its clipping. What the criterion reads must be
        inside it: Adam's second moment, or a tracker that is chained to it.
      schedule: value of `jp.schedules`, or {step: sparsity}. Where an n:m pattern
        stands for a sparsity, as in {500: "4:8", 900: "2:4"}, it holds from there on.
      criterion: function of `jp.scores` that ranks the weights, or its name; or one of
        your own, (params, importance) -> scores, that takes the optimizer's state as
        importance.
      allocation: rule by which each sparsity is shared out between leaves: "global",
        "layer", "erk" or one of `jp.allocation`.
      pattern: which weights are pruned together; see `masks.make`.
      axes: input and output axes of the leaves; see `masks.make`.
      prunable: which leaves may be pruned, a function of leaf name and leaf.
      grow: rule of what comes back at each event, `jp.grow.gradient()` ("rigl") or
        `jp.grow.random()` ("set"), by which the number kept is still the schedule's.
        The first event grows nothing, nor does any while a model that came pruned
        has fewer weights than the schedule keeps. What a `keep_masks` inside holds at
        zero would be drawn too: leave it out by `prunable`. A weight that comes back
        begins at zero, with the moments that the optimizer's `init` gives, and Adam's
        bias correction counts its steps from there, for which the state holds two bytes
        more a weight.
      decays: b1 and b2 of the optimizer, by which that correction is made; give them
        where they are not optax's defaults. (b1, 0) for Adamax, which corrects its
        first moment alone, and (0, 0) for Yogi. Not read without `grow`.
      packed: whether the state holds masks at one bit a weight rather than eight. Of
        the checkpoints, orbax takes these; `flax.serialization` does not.

    Returns:
      A transformation after whose every step the pruned weights are +0, if nothing
      behind it changes the updates: a learning rate or clipping goes inside.
      `masks.get` finds the masks in the state. Steps are those that this transformation
      sees: `MultiSteps(gradual(...), k)` counts real steps.

    Raises:
      ValueError: schedule, pattern, allocation and growth do not agree, or the sparsity
        falls and nothing grows; at `init`: no leaf is prunable, or the criterion's
        statistic is not in the optimizer; at `update`: no parameters.
      TypeError: an argument has the wrong type.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import jaxprune as jp
      >>> params = {"w": jnp.array([[1.0, 2.0], [3.0, 4.0]])}
      >>> tx = jp.gradual(optax.adamw(0.1), jp.schedules.once(1, 0.5))
      >>> state = tx.init(params)
      >>> for _ in range(2):
      ...     updates, state = tx.update({"w": jnp.ones((2, 2))}, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> jp.sparsity(params).total, jp.masks.get(state)["w"].tolist()
      (0.5, [[False, False], [True, True]])

    Reference:
      Zhu, Gupta, "To prune, or not to prune: exploring the efficacy of pruning for
      model compression", 2017, arXiv 1710.01878; theirs ranks magnitudes and lets
      pruned weights come back.
    """
    grow = parse_growth(grow)
    table = EventTable(schedule, allocation, pattern, axes, grow)
    _check_events(table.events, grow)
    masking = MaskEvents("gradual", table, parse_criterion(criterion), prunable, packed)
    optimizer = wrapped_optimizer(optimizer, "gradual", "schedule")

    def init(params: Params) -> GradualState:
        inner = optimizer.init(params)
        masking.refuse_blind_start(params)
        state_masks = masking.start(params, inner)
        ages: Params | tuple[()] = ()
        if grow is not None:
            masks = masking.read(state_masks, params)
            ages = start_ages(optimizer, inner, masks, params)
        return GradualState(placement.counter(params), state_masks, inner, ages)

    def update(
        updates: optax.Updates,
        state: GradualState,
        params: Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, GradualState]:
        params = require_params(params, "gradual")
        step, _, inner, ages = state
        # RigL ranks pruned weights by this step's gradient, before it is masked.
        gradients = updates if grow is not None and grow.reads_gradient else params
        state_masks = masking.choose(
            masking.due(step), step, state.masks, lambda: (params, inner), gradients
        )
        masks = masking.read(state_masks, params)
        if grow is None:
            updates, inner = masked_step(
                optimizer, masks, updates, inner, params, extra_args
            )
        else:
            before = masking.read(state.masks, params)
            updates, inner, ages = restarted_step(
                optimizer,
                before,
                masks,
                updates,
                inner,
                ages,
                params,
                extra_args,
                decays,
            )
        step = optax.safe_increment(step)
        return updates, GradualState(step, state_masks, inner, ages)

    return optax.GradientTransformationExtraArgs(init, update)


def _check_events(events: Sequence[Event], grow: Grow | None) -> None:
    """Refuses events that masks which stay pruned cannot follow one after the other."""
    distinct = dict.fromkeys(event.pattern for event in events)
    fixed = [pattern for pattern in distinct if pattern.sparsity is not None]
    pooled = [pattern for pattern in distinct if isinstance(pattern, Block | Channel)]
    if fixed and pooled:
        raise ValueError(
            f"{fixed[0]} and {pooled[0]} prune other weights together, so a schedule "
            "cannot have both; take pattern='unstructured' beside n:m"
        )
    for before, after in itertools.pairwise(events):
        if grow is None and not after.share >= before.share:
            raise ValueError(
                "gradual keeps pruned weights pruned, but the schedule falls from "
                f"{before.share:g} at step {before.step} to {after.share:g} at step "
                f"{after.step}; give grow=jp.grow.gradient(), or take "
                "jp.straight_through"
            )
