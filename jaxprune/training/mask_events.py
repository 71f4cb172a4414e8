"""Masks that are chosen again inside an update.

A step without an event must cost next to nothing. So the branch of an event returns
masks alone, and reads the parameters and moments that come into the update. If it read
the results of the step, every step would have to write them out for it.
`straight_through` pays this price, so that its masks are not one step old.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool
from optax import MaskedNode

from jaxprune.arrays import placement, tree
from jaxprune.arrays.messages import check_steps, listed
from jaxprune.masking import packing, selection
from jaxprune.scores.from_training import prunable_names
from jaxprune.training.event_table import EventTable, PatternCounts
from jaxprune.training.kept_units import masks_at
from jaxprune.training.masked import check_packed, unpack_masks
from jaxprune.typing import Criterion, Importance, Masks, Params, PrunableLike, Scores

# The step of a freeze that does not come: steps are counted in int32.
_NEVER = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class MaskEvents:
    """How masks are chosen, and when.

    Attributes:
      name: name of the transformation, for errors.
      table: what each event of the schedule keeps.
      criterion: function that ranks the weights.
      prunable: which leaves may be pruned.
      packed: whether masks are held at one bit a weight.
      every: number of steps between two choices at the same sparsity, at which pruned
        weights are ranked with all others; None for choices at events alone, at which
        what is pruned stays pruned.
      freeze: step from which masks are fixed, None for never.
    """

    name: str
    table: EventTable
    criterion: Criterion
    prunable: PrunableLike
    packed: bool = False
    every: int | None = None
    freeze: int | None = None

    def __post_init__(self) -> None:
        """Refuses numbers of steps that do not agree with the schedule."""
        every = 1 if self.every is None else self.every
        check_steps(self.name, every=every, freeze=self.freeze_step)
        check_packed(self.packed, self.name)
        last = int(self.table.steps[-1])
        if not (every >= 1 and self.freeze_step >= last):
            raise ValueError(
                f"{self.name} needs every >= 1 and a freeze at or after the schedule's "
                f"last event at step {last}, got every={every}, freeze={self.freeze}"
            )

    @property
    def revive(self) -> bool:
        """Whether a pruned weight is ranked by its score."""
        return self.every is not None

    @property
    def freeze_step(self) -> int:
        """The step from which masks are fixed, or one that does not come."""
        return _NEVER if self.freeze is None else self.freeze

    def start(self, params: Params, importance: Any) -> Masks:
        """Masks that keep everything, after all checks of these parameters."""
        if tree.is_placeholder(params):
            return params
        if isinstance(params, optax.LookaheadParams):
            raise ValueError(
                f"{self.name} chooses masks of leaves, but the parameters of "
                "optax.lookahead are pairs; choose masks before, and take "
                "jp.keep_masks(optax.lookahead(...), optax.LookaheadParams(masks, "
                "masks))"
            )
        scores = tree.named_leaves(self._abstract_scores(params, importance))
        all_kept = [
            MaskedNode() if tree.is_excluded(scores[name]) else _all_kept(leaf)
            for name, leaf in tree.named_leaves(params).items()
        ]
        structure = jax.tree.structure(params, is_leaf=tree.is_leaf)
        masks = jax.tree.unflatten(structure, all_kept)
        selection.check_heads(
            tree.named_leaves(masks),
            self.table.axes,
            self.table.allocation,
            [event.pattern for event in self.table.events],
        )
        self._pattern_counts(masks)
        return self._as_stored(masks)

    def refuse_blind_start(self, params: Params) -> None:
        """Refuses to rank by statistics of gradients before there is a gradient."""
        first = self.table.events[0]
        if first.step or first.sparsity == 0 or tree.is_placeholder(params):
            return
        weights_alone = Importance(weight=params, magnitude=params)
        try:
            jax.eval_shape(self.scores, params, weights_alone)
        except (AttributeError, IndexError, KeyError, TypeError):
            return  # a user's criterion that reads the optimizer's state itself
        except ValueError as error:
            if not self._ranks_all_statistics(params):
                raise
            raise ValueError(
                f"{self.name} needs a gradient before this criterion can rank, but the "
                "first event is at step 0; begin at step 1 or later, or take "
                "criterion=jp.scores.magnitude"
            ) from error

    def read(self, state_masks: Masks, params: Params) -> Masks:
        """The masks that a state holds, as booleans."""
        return unpack_masks(state_masks, params) if self.packed else state_masks

    def _as_stored(self, masks: Masks) -> Masks:
        return packing.pack(masks) if self.packed else masks

    def due(self, step: jax.Array) -> Bool[Array, ""]:
        """Whether masks are chosen at a step."""
        at_event = jnp.any(step == self.table.steps)
        if self.every is None:
            return at_event
        first = int(self.table.steps[0])
        periodic = (step - first) % self.every == 0
        active = (step >= first) & (step <= self.freeze_step)
        return (at_event | periodic) & active

    def choose(
        self,
        due: Any,
        step: jax.Array,
        state_masks: Masks,
        ranked: Callable[[], tuple[Params, Any]],
        gradients: Params,
    ) -> Masks:
        """The masks after this step, chosen anew where that is due.

        Args:
          due: whether masks are chosen, boolean scalar.
          step: number of updates before this one, int32 scalar.
          state_masks: masks as the state holds them, packed or boolean.
          ranked: function that gives the parameters and the importance to rank; it is
            called where masks are chosen, so that no other step computes them.
          gradients: gradients like the parameters; any tree like them where no growth
            reads them.
        """

        def choose(state_masks: Masks) -> Masks:
            params, importance = jax.lax.stop_gradient(ranked())
            scores = self.scores(params, importance)
            masks = self.read(state_masks, params)
            new_masks = self._as_stored(self._chosen(step, masks, scores, gradients))
            # NNX hands states on without their classes: the leaves go into its own.
            structure = jax.tree.structure(state_masks)
            return jax.tree.unflatten(structure, jax.tree.leaves(new_masks))

        gradients = jax.lax.stop_gradient(gradients)
        if not isinstance(due, jax.core.Tracer):
            # Outside of jit a branch would be compiled anew at every step.
            return choose(state_masks) if due else state_masks
        return jax.lax.cond(due, choose, lambda masks: masks, state_masks)

    def _chosen(
        self, step: jax.Array, masks: Masks, scores: Scores, gradients: Params
    ) -> Masks:
        """The masks of the last event up to this step."""
        named = tree.named_leaves(masks)
        names = [name for name, mask in named.items() if not tree.is_excluded(mask)]

        def leaves(like: Any) -> list[jax.Array]:
            named = tree.named_leaves(like)
            return [named[name] for name in names]

        event = self._latest(step)
        choose = functools.partial(
            masks_at,
            event,
            step,
            masks=leaves(masks),
            scores=leaves(scores),
            gradients=leaves(gradients),
            grow=self.table.grow,
            revive=self.revive,
        )
        # A branch a pattern, not an event: one program serves a schedule of any length.
        number = jnp.sum(jnp.where(event, self.table.pattern_numbers, np.int32(0)))
        branches = [
            functools.partial(choose, counts=counts)
            for counts in self._pattern_counts(masks)
        ]
        new_masks = jax.lax.switch(number, branches)
        return jax.tree.unflatten(jax.tree.structure(masks), new_masks)

    def _latest(self, step: jax.Array) -> Bool[Array, " events"]:
        """The last event so far, one-hot; none is True before the first."""
        begun = step >= self.table.steps
        return begun & ~jnp.append(begun[1:], False)

    def _pattern_counts(self, masks: Masks) -> list[PatternCounts]:
        named = tree.named_leaves(masks)
        return self.table.pattern_counts(
            {k: mask.shape for k, mask in named.items() if not tree.is_excluded(mask)}
        )

    def scores(self, params: Params, importance: Any) -> Scores:
        """The criterion's scores of the leaves that may be pruned."""
        prunable = prunable_names(self.prunable, tree.named_leaves(params))
        scores = _call_criterion(self.criterion, params, importance, prunable)
        aligned = tree.align(params, scores, "scores")
        named = dict(zip(tree.named_leaves(params), aligned, strict=True))
        scored = {name: x for name, x in named.items() if not tree.is_excluded(x)}
        scored = {name: x for name, x in scored.items() if name in prunable}
        integers = [name for name, x in scored.items() if not tree.is_floating(x)]
        if not scored:
            raise ValueError(
                "the criterion must score a leaf that may be pruned, but of "
                f"{listed(sorted(prunable))} it scores none; give it no prunable rule "
                "of its own, or the same one"
            )
        if integers:
            raise TypeError(
                "the criterion's scores must be floating, but those of "
                f"{listed(integers)} are not; cast them with astype(jnp.float32)"
            )
        structure = jax.tree.structure(params, is_leaf=tree.is_leaf)
        leaves = [scored.get(name, MaskedNode()) for name in named]
        return jax.tree.unflatten(structure, leaves)

    def _abstract_scores(self, params: Params, importance: Any) -> Scores:
        """The scores' shapes; a criterion that lacks a statistic says so here."""
        try:
            return jax.eval_shape(self.scores, params, importance)
        except ValueError as error:
            if not self._ranks_all_statistics(params):
                raise
            raise ValueError(
                f"{error}; it must be inside the optimizer that is wrapped: "
                f"jp.{self.name}(optax.chain(optimizer, tracker), ...)"
            ) from error

    def _ranks_all_statistics(self, params: Params) -> bool:
        """Whether the criterion lacks nothing but a statistic that may be tracked."""
        try:
            jax.eval_shape(self.scores, params, Importance(*[params] * 4))
        except Exception:  # a user's criterion may raise anything
            return False
        return True


def _call_criterion(
    criterion: Callable[..., Scores],
    params: Params,
    importance: Any,
    prunable: set[str],
) -> Scores:
    """The criterion's scores, of the prunable leaves alone where it takes a rule."""
    bound: Mapping[str, Any] = getattr(criterion, "keywords", {})  # of a partial
    # A rule that the user has bound to the criterion counts.
    if "prunable" in inspect.signature(criterion).parameters.keys() - bound.keys():
        criterion = functools.partial(
            criterion, prunable=lambda name, leaf: name in prunable
        )
    return criterion(params, importance)


def _all_kept(leaf: Any) -> jax.Array:
    # From zeros of the leaf: a mask of ones would lie on one device on Auto meshes.
    return jnp.logical_not(placement.zeros_like(leaf, bool))
