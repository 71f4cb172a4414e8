"""Pruning by ADMM while it trains: dense weights that are pulled towards sparse ones.

f(x) is minimised over x = z with z sparse. Each gradient gets the pull
lambda (x - z + u); every so many steps the sparse copy z is the projection of
v = x + u, and the scaled dual u takes what z left out: u = v - z. So z lives where the
masks keep and u where they prune, and one tree v holds both.
"""

import math
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
from jaxprune.training import weightings
from jaxprune.training.event_table import Rules
from jaxprune.training.mask_events import MaskEvents
from jaxprune.training.masked import needed, on_masked, select, wrapped
from jaxprune.training.track import TrackGradientsState, track_gradients
from jaxprune.typing import Criterion, Masks, Params, Pattern, Prunable


class AdmmState(NamedTuple):
    """State of `admm`.

    Attributes:
      step: updates seen, int32 scalar.
      masks: where the sparse copy is not zero, like the parameters, boolean.
      split: v, whose kept part is the sparse copy z and whose pruned part is the scaled
        dual u; not read before `begin`, zero after `end`.
      gradients: the average of the loss's own squared gradients.
      inner: the wrapped optimizer's state.
    """

    step: jax.Array
    masks: Masks
    split: Params
    gradients: TrackGradientsState
    inner: optax.OptState


def admm(
    optimizer: optax.GradientTransformation,
    sparsity: float | None = None,
    *,
    end: int,
    begin: int = 0,
    interval: int = 32,
    penalty: float | optax.Schedule = 0.01,
    decay: float = 0.95,
    criterion: Criterion = scores.obd,
    allocation: Allocation = "layer",
    pattern: Pattern | str = "unstructured",
    axes: Axes | Mapping[str, Axes] | None = None,
    prunable: Prunable = leaves.prunable,
    packed: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Trains dense weights towards sparse ones, and leaves them exactly sparse.

    From `begin` on each gradient gets lambda (x - z + u), and every `interval` steps
    v = x + u is projected: z keeps the highest of E[g^2]^p v^2, u = v - z. At `end` the
    weights themselves are projected; from then on pruned weights are +0 after every
    step, as under `keep_masks`.

    Args:
      optimizer: any optax optimizer; it sees the pull as part of the gradient. To clip
        the gradient and not the pull, clip in front: `chain(clip, admm(...))`.
      sparsity: the share that is pruned; None where the pattern fixes it.
      end: the step at which the weights are projected, after `begin`.
      begin: the step of the first projection.
      interval: steps between two projections, at least 1.
      penalty: lambda, over 0, or a schedule of it over the steps since `begin`.
      decay: of the exponential average E[g^2] of the loss's own gradients, in (0, 1).
        The pull is left out of this average, though it enters Adam's second moment.
      criterion: what z keeps, of v and E[g^2]: `scores.obd` is p = 1 (ELSA),
        `scores.trajectory` p = 1/2 and `scores.magnitude` p = 0.
      allocation: how the sparsity is shared out, as for `gradual`.
      pattern: which weights are pruned together, as for `gradual`.
      axes: which axes are input and output, as for `gradual`.
      prunable: which leaves may be pruned.
      packed: whether masks take one bit a weight, as for `gradual`.

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
      >>> tx = jp.contrib.admm(optax.adam(0.1), 0.5, end=2, interval=1)
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
    _check(begin, end, interval, penalty, decay)
    wanted = pattern if sparsity is None else sparsity
    rules = Rules({begin: wanted}, allocation, pattern, axes)
    masking = MaskEvents(rules, criterion, prunable, packed, revive=True, name="admm")
    tracker = track_gradients(weightings.exponential(decay))
    optimizer = wrapped(optimizer, "admm", "sparsity")

    def init(params: Params) -> AdmmState:
        inner = optimizer.init(params)
        if tree.is_placeholder(params):
            return AdmmState(
                placement.counter(params), params, params, tracker.init(params), inner
            )
        own = masking.only(params)
        masks = masking.start(own, tracker.init(own))
        # The criterion's own rule may leave out more than `prunable` does.
        own = on_masked(lambda mask, leaf: leaf, masking.read(masks, params), params)
        gradients = tracker.init(own)
        split = on_masked(
            lambda mask, leaf: placement.zeros_like(leaf, jnp.float32),
            masking.read(masks, params),
            params,
        )
        return AdmmState(placement.counter(params), masks, split, gradients, inner)

    def update(
        updates: optax.Updates,
        state: AdmmState,
        params: Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, AdmmState]:
        params = needed(params, "admm")
        step, held, split, gradients, inner = state
        since, over = step - begin, step >= end
        due = ((since >= 0) & (since % interval == 0) & ~over) | (step == end)
        before = masking.read(held, params)
        own = on_masked(lambda mask, g: g, before, updates)
        _, gradients = tracker.update(own, gradients, params)

        def projected(mask: Any, v: jax.Array, x: jax.Array) -> jax.Array:
            dual = jnp.where(mask | over, jnp.float32(0), v)
            return x.astype(jnp.float32) + dual

        def ranked() -> tuple[Params, Any]:
            return on_masked(projected, before, split, params), gradients

        def kept_split(mask: Any, v: jax.Array, x: jax.Array) -> jax.Array:
            return jnp.where(due, projected(mask, v, x), v)

        every = jnp.ones(1, bool)  # the only row of the table
        held = masking.changed(due, every, step, held, ranked, own)
        kept = masking.read(held, params)
        split = on_masked(kept_split, before, split, params)
        pull = jnp.asarray(penalty(since) if callable(penalty) else penalty)
        pull = jnp.where((since >= 0) & ~over, pull.astype(jnp.float32), 0)

        def pulled(mask: Any, g: jax.Array, v: jax.Array, x: jax.Array) -> jax.Array:
            apart = x.astype(jnp.float32) - jnp.where(mask, v, -v)  # x - z + u
            wide = g.dtype if g.dtype.itemsize >= 4 else jnp.float32
            return (g.astype(wide) + (pull * apart).astype(wide)).astype(g.dtype)

        updates = on_masked(pulled, kept, updates, split, params, rest=updates)
        trained = on_masked(lambda mask: mask | ~over, kept)
        updates, inner = optimizer.update(
            select(trained, updates), inner, select(trained, params), **extra_args
        )
        split = on_masked(lambda _, v: jnp.where(over, jnp.float32(0), v), kept, split)
        after = AdmmState(optax.safe_increment(step), held, split, gradients, inner)
        return select(trained, updates, params), after

    return optax.GradientTransformationExtraArgs(init, update)


def _check(
    begin: int, end: int, interval: int, penalty: float | optax.Schedule, decay: float
) -> None:
    """Refuses what is out of range."""
    check_steps("admm", begin=begin, end=end, interval=interval)
    if not 0 <= begin < end or interval < 1:
        raise ValueError(
            "admm needs 0 <= begin < end and interval >= 1, got "
            f"begin={begin}, end={end}, interval={interval}"
        )
    traced = isinstance(penalty, jax.core.Tracer)  # by `optax.inject_hyperparams`
    if not (callable(penalty) or traced or 0 < penalty < math.inf):
        raise ValueError(
            f"admm needs a finite penalty over 0, got {penalty}; 0.01 is usual"
        )
    if not 0 < decay < 1:
        raise ValueError(f"admm needs a decay in (0, 1), got {decay}; 0.95 is usual")
