"""Masks that are chosen again inside an update.

A step without an event must cost next to nothing. So the branch of an event returns
masks alone, and reads the parameters and moments that come into the update. If it read
the results of the step, every step would have to write them out for it.
`straight_through` pays this price, so that its masks are not one step old.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool
from optax import MaskedNode

from jaxprune.arrays import placement, tree
from jaxprune.arrays.axes import Axes
from jaxprune.arrays.messages import listed
from jaxprune.arrays.topk import thresholds
from jaxprune.leaves import check_rule
from jaxprune.masking import packing, selection
from jaxprune.masking.patterns import NM, PerOutput, Unstructured
from jaxprune.training import event_table
from jaxprune.training.event_table import Rules, Table
from jaxprune.training.masked import unpacked
from jaxprune.typing import (
    Criterion,
    Importance,
    Masks,
    Params,
    Pattern,
    Prunable,
    Scores,
)


@dataclasses.dataclass(frozen=True)
class MaskEvents:
    """How masks are chosen, and when.

    Attributes:
      rules: how much is kept at which step.
      criterion: what ranks the weights.
      prunable: which leaves may be pruned.
      packed: whether masks are held at one bit a weight.
      revive: whether what is pruned is ranked with the rest; else it stays pruned.
      name: of the transformation, for errors.
    """

    rules: Rules
    criterion: Criterion
    prunable: Prunable
    packed: bool = False
    revive: bool = False
    name: str = "gradual"

    def start(self, params: Params, inner: Any) -> Masks:
        """Masks that keep everything, after all checks of these parameters."""
        if isinstance(params, optax.LookaheadParams):
            raise ValueError(
                f"{self.name} chooses masks of leaves, but the parameters of "
                "optax.lookahead are pairs; choose masks before, and take "
                "jp.keep_masks(optax.lookahead(...), masks)"
            )
        scores = tree.named_leaves(self._abstract_scores(params, inner))
        own = [
            MaskedNode() if tree.is_excluded(scores[name]) else _all_kept(leaf)
            for name, leaf in tree.named_leaves(params).items()
        ]
        structure = jax.tree.structure(params, is_leaf=tree.is_leaf)
        masks = jax.tree.unflatten(structure, own)
        each = [event.pattern for event in self.rules.events]
        selection.check_heads(
            tree.named_leaves(masks), self.rules.axes, self.rules.allocation, each
        )
        self._tables(masks)
        return self.held(masks)

    def refuse_blind_start(self, params: Params) -> None:
        """Refuses to rank by statistics of gradients that nobody has seen yet."""
        first = self.rules.events[0]
        if first.step or first.sparsity == 0:
            return
        weights_alone = Importance(weight=params, magnitude=params)
        try:
            jax.eval_shape(self.scores, params, weights_alone)
        except (AttributeError, IndexError, KeyError, TypeError):
            return  # a user's criterion that reads the optimizer's state itself
        except ValueError as error:
            if "track" not in str(error):
                raise
            raise ValueError(
                f"{self.name} needs a gradient before this criterion can rank, but the "
                "first event is at step 0; begin at step 1 or later, or take "
                "criterion=jp.scores.magnitude"
            ) from error

    def held(self, masks: Masks) -> Masks:
        """The masks as the state holds them."""
        return packing.pack(masks) if self.packed else masks

    def read(self, held: Masks, params: Params) -> Masks:
        """The masks that a state holds, as booleans."""
        return unpacked(held, params) if self.packed else held

    def only(self, params: Params) -> Params:
        """The parameters without the leaves that may not be pruned."""
        named, chosen = tree.named_leaves(params), self._chosen_names(params)
        leaves = [named[n] if n in chosen else MaskedNode() for n in named]
        structure = jax.tree.structure(params, is_leaf=tree.is_leaf)
        return jax.tree.unflatten(structure, leaves)

    def _chosen_names(self, params: Params) -> set[str]:
        """The names of the leaves that may be pruned."""
        named = tree.named_leaves(params)
        if not any(map(tree.is_excluded, named.values())):  # else names are missing
            check_rule(self.prunable, list(named))
        chosen = {
            name
            for name, leaf in named.items()
            if not tree.is_excluded(leaf) and self.prunable(name, leaf)
        }
        if not chosen:
            raise ValueError(
                f"some leaf must be prunable, but none of {listed(named)} is; give "
                "prunable=lambda name, leaf: ... that is True for the leaves to prune"
            )
        return chosen

    def scores(self, params: Params, importance: Any) -> Scores:
        """The criterion's scores of the leaves that may be pruned."""
        named, chosen = tree.named_leaves(params), self._chosen_names(params)
        criterion: Callable[..., Scores] = self.criterion
        bound = getattr(criterion, "keywords", {})  # of a partial; its own rule counts
        if "prunable" in inspect.signature(criterion).parameters.keys() - bound.keys():
            rule = lambda name, leaf: name in chosen  # noqa: E731
            criterion = functools.partial(criterion, prunable=rule)
        aligned = tree.align(params, criterion(params, importance), "scores")
        scored = [
            n for n, x in zip(named, aligned, strict=True) if not tree.is_excluded(x)
        ]
        if chosen.isdisjoint(scored):
            raise ValueError(
                f"the criterion must score a leaf that may be pruned, but of "
                f"{listed(sorted(chosen))} it scores none; give it no prunable rule of "
                "its own, or the same one"
            )
        leaves = [
            score if name in chosen else MaskedNode()
            for name, score in zip(named, aligned, strict=True)
        ]
        if wrong := [
            name
            for name, score in zip(named, leaves, strict=True)
            if not (tree.is_excluded(score) or tree.is_floating(score))
        ]:
            raise TypeError(
                "the criterion's scores must be floating, but those of "
                f"{listed(wrong)} are not; cast them with astype(jnp.float32)"
            )
        structure = jax.tree.structure(params, is_leaf=tree.is_leaf)
        return jax.tree.unflatten(structure, leaves)

    def hit(self, step: jax.Array) -> Bool[Array, " events"]:
        """The event that the step is, one-hot; none is True where nothing is due."""
        return step == self.rules.steps

    def latest(self, step: jax.Array) -> Bool[Array, " events"]:
        """The last event so far, one-hot; none is True before the first."""
        steps = self.rules.steps
        after = np.append(steps[1:], np.iinfo(np.int32).max)
        return (step >= steps) & (step < after)

    def changed(
        self,
        due: Any,
        hit: Bool[Array, " events"],
        step: jax.Array,
        held: Masks,
        ranked: Callable[[], tuple[Params, Any]],
        seen: Any,
    ) -> Masks:
        """The masks after this step's event, if one is due.

        `ranked` gives the parameters and the importance that are ranked, `seen` is like
        the parameters: the gradient for a growth that reads it.
        """

        def choose(held: Masks) -> Masks:
            params, importance = jax.lax.stop_gradient(ranked())
            scores, old = self.scores(params, importance), self.read(held, params)
            new = self.held(self._chosen(hit, step, old, scores, seen))
            return jax.tree.unflatten(jax.tree.structure(held), jax.tree.leaves(new))

        seen = jax.lax.stop_gradient(seen)
        if not isinstance(due, jax.core.Tracer):
            # Outside of jit a branch would be compiled anew at every step.
            return choose(held) if due else held
        return jax.lax.cond(due, choose, lambda held: held, held)

    def _chosen(
        self, hit: jax.Array, step: jax.Array, masks: Masks, scores: Scores, seen: Any
    ) -> Masks:
        """The masks of the event that is hit."""
        named = tree.named_leaves(masks)
        names = [name for name, mask in named.items() if not tree.is_excluded(mask)]
        ranked, like = (
            [own[name] for name in names]
            for own in (tree.named_leaves(scores), tree.named_leaves(seen))
        )
        own = [named[name] for name in names]

        def by(table: Table) -> Callable[[], list[jax.Array]]:
            return lambda: self._cut(table, hit, step, own, ranked, like)

        branch = jnp.sum(jnp.where(hit, self.rules.pattern_of, np.int32(0)))
        bits = jax.lax.switch(branch, [by(table) for table in self._tables(masks)])
        return jax.tree.unflatten(jax.tree.structure(masks), bits)

    def _cut(
        self,
        table: Table,
        hit: jax.Array,
        step: jax.Array,
        masks: Sequence[jax.Array],
        scores: Sequence[jax.Array],
        like: Sequence[jax.Array],
    ) -> list[jax.Array]:
        """The masks that keep the highest scores, and what is grown."""
        pattern, kept = table.pattern, event_table.at(hit, table.kept)
        if not self.revive:  # the pruned rank under all that is kept
            each = zip(masks, scores, table.axes, strict=True)
            scores = [_pruned_last(pattern, *own) for own in each]
        units = [pattern.units(*pair) for pair in zip(scores, table.axes, strict=True)]
        grow = self.rules.grow
        if grow is None:
            bits = _highest(units, kept, together=table.together)
        else:
            more = event_table.at(hit, table.grown)
            bits = _highest(units, kept.minus(more), together=table.together)
            rest = [
                jnp.where(own, -jnp.inf, pattern.units(grow.scores(g, step, n), axes))
                for n, (own, g, axes) in enumerate(
                    zip(bits, like, table.axes, strict=True)
                )
            ]
            added = _highest(rest, more, together=table.together)
            bits = [a | b for a, b in zip(bits, added, strict=True)]
        bits = [
            placement.placed(pattern.expand(own, leaf.shape, axes), leaf)
            for own, leaf, axes in zip(bits, like, table.axes, strict=True)
        ]
        if grow is None and not self.revive and pattern.sparsity is None:
            return _none_back(table, masks, bits, kept)
        return bits

    def _tables(self, masks: Masks) -> list[Table]:
        named = tree.named_leaves(masks)
        return self.rules.tables(
            {k: mask.shape for k, mask in named.items() if not tree.is_excluded(mask)}
        )

    def _abstract_scores(self, params: Params, inner: Any) -> Scores:
        """The scores' shapes; a criterion that lacks a statistic says so here."""
        try:
            return jax.eval_shape(self.scores, params, inner)
        except ValueError as error:
            if "track" not in str(error):
                raise
            raise ValueError(
                f"{error}; it must be inside the optimizer that is wrapped: "
                f"jp.{self.name}(optax.chain(optimizer, tracker), ...)"
            ) from error


def _highest(
    units: Sequence[jax.Array], kept: event_table.Count, *, together: bool
) -> list[jax.Array]:
    """Which units are kept, by one ranking of all leaves or by one of each."""
    if together:
        cuts = thresholds.cut_together(units, kept)
    else:
        cuts = thresholds.cut_each(units, kept.low)
    return [thresholds.above_cut(*pair) for pair in zip(units, cuts, strict=True)]


def _none_back(
    table: Table,
    masks: Sequence[jax.Array],
    bits: Sequence[jax.Array],
    kept: event_table.Count,
) -> list[jax.Array]:
    """The weights that are kept, without any that was pruned before.

    An event would keep such a weight only where fewer are left than its sparsity says:
    in a run that goes on from a model that was pruned further, or in other units.
    """
    if table.together:
        return [own & left for own, left in zip(bits, masks, strict=True)]
    after = []
    for i, (own, left, axes) in enumerate(zip(bits, masks, table.axes, strict=True)):
        units = _left(table.pattern, left, axes)
        # By rounding, an allocation such as ERK may keep one unit more than before.
        most = jnp.sum(units, dtype=np.uint32) + np.uint32(1)
        gone = ~_spread(table.pattern, units, left, axes)
        after.append(own & (left | (gone & (kept.low[i] <= most))))
    return after


def _left(pattern: Pattern, mask: jax.Array, axes: Axes) -> jax.Array:
    """The units in which a weight is left."""
    if _is_single(pattern):
        return mask
    return pattern.units(mask.astype(jnp.float32), axes) > 0


def _spread(
    pattern: Pattern, left: jax.Array, mask: jax.Array, axes: Axes
) -> jax.Array:
    """All weights of the units that `_left` gives."""
    if _is_single(pattern):
        return left
    return placement.placed(pattern.expand(left, mask.shape, axes), mask)


def _is_single(pattern: Pattern) -> bool:
    """Whether the units are single weights; of some patterns they are ranks."""
    return isinstance(pattern, Unstructured | NM | PerOutput)


def _pruned_last(
    pattern: Pattern, mask: jax.Array, score: jax.Array, axes: Axes
) -> jax.Array:
    """The scores, so that units without a weight rank under all others."""
    # In a unit that has weights left, those that are pruned add nothing to its score.
    some = _spread(pattern, _left(pattern, mask, axes), mask, axes)
    return jnp.where(mask, _over_pruned(score), jnp.where(some, 0.0, -jnp.inf))


def _over_pruned(score: jax.Array) -> jax.Array:
    """The score, or the least finite number for what ranks no higher than pruned."""
    # NaN ranks under minus infinity, so a pruned weight would take a kept one's place.
    least = jnp.asarray(jnp.finfo(score.dtype).min, score.dtype)
    return jnp.where(jnp.isnan(score), least, jnp.maximum(score, least))


def _all_kept(leaf: Any) -> jax.Array:
    return jnp.logical_not(placement.zeros_like(leaf, bool))
