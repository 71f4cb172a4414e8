"""Pruning while it trains: an optimizer whose masks tighten on a schedule.

It is `keep_masks` with masks that it chooses itself. At a step with an event the masks
come first, from the parameters and the moments that come in; then the step is taken
under them. There is no hook before or after the step that a loop could forget, and the
parameters have exact zeros after every step.
"""

import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxprune import leaves, scores
from jaxprune.arrays import placement, tree
from jaxprune.arrays.axes import Axes
from jaxprune.masking.counts import Allocation
from jaxprune.masking.patterns import Block, Channel
from jaxprune.training import schedules
from jaxprune.training.event_table import Rules
from jaxprune.training.grow import Grow
from jaxprune.training.mask_events import MaskEvents
from jaxprune.training.masked import needed, select, wrapped
from jaxprune.typing import Criterion, Masks, Params, Pattern, Prunable


class GradualState(NamedTuple):
    """State of `gradual`.

    Attributes:
      step: updates seen, int32 scalar.
      masks: the masks, like the parameters, boolean; packed where that was asked for.
      inner: the wrapped optimizer's state.
    """

    step: jax.Array
    masks: Masks
    inner: optax.OptState


def gradual(
    optimizer: optax.GradientTransformation,
    schedule: schedules.Events,
    *,
    criterion: Criterion = scores.trajectory,
    allocation: Allocation = "global",
    pattern: Pattern | str = "unstructured",
    axes: Axes | Mapping[str, Axes] | None = None,
    prunable: Prunable = leaves.prunable,
    grow: Grow | None = None,
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
      optimizer: any optax optimizer, with its clipping. What the criterion reads must
        be inside it: Adam's second moment, or a tracker that is chained to it.
      schedule: one of `jp.schedules`, or {step: sparsity}. Where an n:m pattern stands
        for a sparsity, as in {500: "4:8", 900: "2:4"}, it holds from that step on.
      criterion: which weights matter; any of `jp.scores`, or a function
        (params, importance) -> scores that takes the optimizer's state as importance.
      allocation: how each sparsity is shared out: "global", "layer", "erk" or a rule.
      pattern: which weights are pruned together, as for `masks.make`.
      axes: which axes are input and output, as for `masks.make`.
      prunable: which leaves may be pruned.
      grow: what comes back at each event, `jp.grow.gradient()` (RigL) or
        `jp.grow.random()` (SET), by which the number kept is still the schedule's. The
        first event grows nothing.
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
      TypeError: an argument is of another kind.

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
    rules = Rules(schedule, allocation, pattern, axes, grow)
    _refuse_mixed(rules)
    if grow is None:
        _refuse_falling(rules)
    masking = MaskEvents(rules, criterion, prunable, packed)
    grow_reads = grow is not None and grow.reads_gradient
    optimizer = wrapped(optimizer, "gradual", "schedule")

    def init(params: Params) -> GradualState:
        inner = optimizer.init(params)
        if tree.is_placeholder(params):
            return GradualState(placement.counter(params), params, inner)
        masking.refuse_blind_start(params)
        return GradualState(
            placement.counter(params), masking.start(params, inner), inner
        )

    def update(
        updates: optax.Updates,
        state: GradualState,
        params: Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, GradualState]:
        params = needed(params, "gradual")
        step, held, inner = state
        # RigL ranks pruned weights by this step's gradient, before it is masked.
        hit, seen = masking.hit(step), updates if grow_reads else params
        held = masking.changed(
            jnp.any(hit), hit, step, held, lambda: (params, state.inner), seen
        )
        kept = masking.read(held, params)
        # The optimizer sees masked gradients and parameters, as under `keep_masks`: its
        # moments and weight decay then leave pruned weights alone.
        updates, inner = optimizer.update(
            select(kept, updates), inner, select(kept, params), **extra_args
        )
        after = GradualState(optax.safe_increment(step), held, inner)
        return select(kept, updates, params), after

    return optax.GradientTransformationExtraArgs(init, update)


def _refuse_mixed(rules: Rules) -> None:
    """Refuses n:m together with blocks or channels, of which n:m would prune parts."""
    kinds = dict.fromkeys(event.pattern for event in rules.events)
    fixed = [own for own in kinds if own.sparsity is not None]
    pooled = [own for own in kinds if isinstance(own, Block | Channel)]
    if fixed and pooled:
        raise ValueError(
            f"{fixed[0]} and {pooled[0]} prune other weights together, so a schedule "
            "cannot have both; take pattern='unstructured' beside n:m"
        )


def _refuse_falling(rules: Rules) -> None:
    """Refuses a sparsity under an earlier one: what would return, nothing says."""
    for before, event in itertools.pairwise(rules.events):
        if event.share < before.share:
            raise ValueError(
                "gradual keeps pruned weights pruned, but the schedule falls from "
                f"{before.share:g} at step {before.step} to {event.share:g} at step "
                f"{event.step}; give grow=jp.grow.gradient(), or take "
                "jp.straight_through"
            )
