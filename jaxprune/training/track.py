"""Watching a training run: optax transformations that average weights and gradients.

`track_importance` stands last in the chain and sees the step that is really taken;
`track_gradients` stands first and sees the raw gradient. Both pass the updates through
untouched and keep their averages in the optimizer state, placed like the parameters,
where `get_importance` finds them.
"""

from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxprune.arrays import low_bit, placement, tree
from jaxprune.arrays.low_bit import Storage
from jaxprune.arrays.messages import check_steps, refuse_fractions
from jaxprune.training import weightings
from jaxprune.training.running_average import Average, Held, Memory, Watched
from jaxprune.typing import Params, Weighting


class TrackImportanceState(NamedTuple):
    """State of `track_importance`.

    Attributes:
      step: updates seen, int32 scalar.
      weight: average of w, like the parameters, or None.
      magnitude: average of |w|, like the parameters, or None.
      exponents: for the storage "int8" the units of the codes: field to a scalar for
        each tracked leaf, in order; empty else.

    With "int8" the fields hold codes; `get_importance` gives numbers.
    """

    step: jax.Array
    weight: Params | None
    magnitude: Params | None
    exponents: dict[str, tuple[jax.Array, ...]]

    @property
    def importance_fields(self) -> tuple[str, ...]:
        """The fields of an `Importance` that are held here."""
        return ("weight", "magnitude")


class TrackGradientsState(NamedTuple):
    """State of `track_gradients`.

    Attributes:
      step: updates seen, int32 scalar.
      square: average of g^2, like the parameters, or None.
      taylor: average of |w g|, like the parameters, or None.
      exponents: for the storage "int8" the units of the codes: field to a scalar for
        each tracked leaf, in order; empty else.

    With "int8" the fields hold codes; `get_importance` gives numbers.
    """

    step: jax.Array
    square: Params | None
    taylor: Params | None
    exponents: dict[str, tuple[jax.Array, ...]]

    @property
    def importance_fields(self) -> tuple[str, ...]:
        """The fields of an `Importance` that are held here."""
        return ("square", "taylor")


def track_importance(
    weighting: Weighting = weightings.power(0.5),
    *,
    every: int = 1,
    start: int = 0,
    average: Collection[str] = ("weight",),
    storage: Storage = "float32",
    memory: Memory = "device",
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Averages the weights over training, later steps more; put it last in the chain.

    Snapshot i is the weights after an update, A_n = sum_i c(i) w_i / sum_i c(i). Before
    the first snapshot the average is the initial weight. A step that a wrapper such as
    `optax.apply_if_finite` skips does not enter.

    In float32 the average follows the exact one to 1e-6 of the largest weight over
    thousands of snapshots, but a drift of less than about n 2^-25 of the weight is
    rounded away at snapshot n: over a million steps take `every=100`, which is cheaper
    too. In "bfloat16" and "int8" each rounding is unbiased, so no drift is lost. While
    a weight drifts, the errors of many roundings cancel: on a GPT the averages were off
    by 0.5 % and 3 %, and the pruned model had the loss of float32. While a weight jumps
    by a fifth from snapshot to snapshot, the errors add up, to 1.6 % and 5 %
    (docs/methods.md). "int8" follows thousands of tiny steps in one direction some 5 %
    too fast. With
    `memory="pinned_host"` on one device, commit the parameters with `jax.device_put`
    and make the state by `jax.jit(tx.init)`, or the second step compiles again.

    Args:
      weighting: what each snapshot counts; the authors' sqrt(i) by default.
      every: updates between snapshots, at least 1.
      start: updates before the first snapshot, at least 0.
      average: what to average, of "weight" (w, the paper) and "magnitude" (|w|).
      storage: what an average is held in: 4, 2 or 1 bytes a weight.
      memory: "pinned_host" keeps the averages in host memory and streams them through
        the device, one leaf after the other, when a snapshot is due; give `every` too.
      seed: of the rounding of "bfloat16" and "int8".

    Returns:
      A transformation that returns the updates it is given. Its `update` needs
      `params`. Leaves that are not floating are not tracked.

    Raises:
      ValueError: an argument is out of range.
      TypeError: `every`, `start` or `seed` is no integer, or `weighting` no weighting.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import jaxprune as jp
      >>> params = {"w": jnp.ones((2, 2))}
      >>> tx = optax.chain(optax.adamw(3e-4), jp.track_importance())
      >>> state = tx.init(params)
      >>> updates, state = tx.update({"w": jnp.ones((2, 2))}, state, params)
      >>> jp.get_importance(state).weight["w"].shape
      (2, 2)

    Reference:
      Islam, Belhaouari, Bermak, "Systematic Weight Evaluation for Pruning Large
      Language Models", 2025, arXiv 2502.17071; theirs takes a snapshot an epoch.
    """
    watched = _watched("track_importance", average, _OF_WEIGHTS, storage, memory, seed)

    def seen(updates: optax.Updates, params: Params | None) -> tuple[Params, ...]:
        # The very sum that the caller makes next; compiled together they are one.
        return (optax.apply_updates(params, updates),)

    due = _schedule("track_importance", weighting, every, start)
    return _tracker("track_importance", TrackImportanceState, seen, watched, due)


def track_gradients(
    weighting: Weighting = weightings.uniform(),
    *,
    every: int = 1,
    start: int = 0,
    average: Collection[str] = ("square",),
    storage: Storage = "float32",
    memory: Memory = "device",
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Averages squared gradients over training; put it first in the chain.

    Only for optimizers without a second moment of their own, or where the average over
    the whole run is worth its memory. Anything in front of it (clipping) is seen by it.

    Where a gradient is not finite, the average of that weight keeps its value. Squares
    jump from step to step, so rounding errors do not cancel as they do for weights:
    after 2000 steps of noise they are 3 % in "bfloat16" and 11 % in "int8", of which
    `scores.trajectory` sees a quarter and `scores.obd` all. The
    square of a gradient under 1e-19 is zero in float32.

    Args:
      weighting: what each snapshot counts; all alike by default.
      every: updates between snapshots, at least 1.
      start: updates before the first snapshot, at least 0.
      average: what to average, of "square" (g^2) and "taylor" (|w g|, with the weights
        at which the gradient was taken).
      storage: what an average is held in: 4, 2 or 1 bytes a weight.
      memory: "device" or "pinned_host", as for `track_importance`.
      seed: of the rounding of "bfloat16" and "int8".

    Returns:
      A transformation that returns the updates it is given. "taylor" needs `params`.

    Raises:
      ValueError: an argument is out of range.
      TypeError: `every`, `start` or `seed` is no integer, or `weighting` no weighting.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import jaxprune as jp
      >>> params = {"w": jnp.ones((1, 2))}
      >>> tx = optax.chain(jp.track_gradients(), optax.sgd(0.1))
      >>> _, state = tx.update({"w": jnp.array([[2.0, 3.0]])}, tx.init(params), params)
      >>> jp.get_importance(state).square["w"].tolist()
      [[4.0, 9.0]]
    """
    watched = _watched("track_gradients", average, _OF_GRADIENTS, storage, memory, seed)

    def seen(gradients: Params, params: Params | None) -> tuple[Params, ...]:
        return (gradients, params) if "taylor" in watched else (gradients,)

    due = _schedule("track_gradients", weighting, every, start)
    return _tracker("track_gradients", TrackGradientsState, seen, watched, due)


def _tracker(
    what: str,
    kind: type[TrackImportanceState] | type[TrackGradientsState],
    seen: Callable[..., tuple[Params, ...]],
    watched: dict[str, Average],
    due: Callable[..., Any],
) -> optax.GradientTransformationExtraArgs:
    """A transformation that averages what it sees and changes no update."""

    def init(params: Params) -> Any:
        of_weights = kind is TrackImportanceState
        first = {k: a.start(params, from_values=of_weights) for k, a in watched.items()}
        state = _with(kind(placement.counter(params), None, None, {}), first)
        if tree.is_placeholder(params):  # a number stands for those of all leaves
            coded = (k for k, a in watched.items() if a.storage == "int8")
            state = state._replace(exponents=dict.fromkeys(coded, state.step))
        return state

    def update(
        updates: optax.Updates,
        state: Any,
        params: Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, Any]:
        del extra_args
        if params is None and watched.keys() != {"square"}:
            raise ValueError(
                f"{what} needs the parameters; call tx.update(g, state, params)"
            )
        return updates, due(state, watched, *seen(updates, params))

    return optax.GradientTransformationExtraArgs(init, update)


def _schedule(
    what: str, weighting: Weighting, every: int, start: int
) -> Callable[..., Any]:
    """Counts the step and takes a snapshot when one is due.

    On the other steps a branch is taken that touches no average.
    """
    check_steps(what, every=every, start=start)
    if not callable(weighting):
        raise TypeError(
            f"{what} needs a weighting such as jp.weightings.power(0.5), got "
            f"{weighting!r}"
        )
    if every < 1 or start < 0:
        raise ValueError(
            f"tracking needs every >= 1 and start >= 0, got every={every}, "
            f"start={start}"
        )

    def due(state: Any, watched: dict[str, Average], *trees: Params) -> Any:
        since = state.step - start
        n = jnp.maximum(since // every + 1, 1)
        gain = weighting(n)
        after = state._replace(step=optax.safe_increment(state.step))

        def take(old: Any) -> Any:
            new = {
                field: how.update(
                    Held(getattr(old, field), old.exponents.get(field, ())),
                    gain,
                    n,
                    *trees,
                )
                for field, how in watched.items()
            }
            return _with(old, new)

        if every == 1 and start == 0:
            return take(after)
        now = (since >= 0) & (since % every == 0)
        return jax.lax.cond(now, take, lambda old: old, after)

    return due


def _with(state: Any, held: dict[str, Held]) -> Any:
    """The state with these averages."""
    exponents = {field: own.exponents for field, own in held.items() if own.exponents}
    leaves = {field: own.leaves for field, own in held.items()}
    return state._replace(**leaves, exponents=exponents)


def _watched(
    what: str,
    average: Collection[str],
    known: dict[str, tuple[Watched, bool, bool]],
    storage: Storage,
    memory: Memory,
    seed: int,
) -> dict[str, Average]:
    """How each of the averages asked for is taken and held."""
    wanted = frozenset([average] if isinstance(average, str) else average)
    if not wanted or not wanted <= known.keys():
        raise ValueError(
            f"{what}(average=...) takes some of {sorted(known)}, got {average!r}"
        )
    if memory not in ("device", "pinned_host"):
        raise ValueError(f"memory must be 'device' or 'pinned_host', got {memory!r}")
    low_bit.checked_storage(storage)
    refuse_fractions(what, seed=seed)
    return {
        field: Average(
            *known[field], storage, memory, stream=int(seed) * 4096 + 1024 * i
        )
        for i, field in enumerate(known)
        if field in wanted
    }


def _taylor(gradient: jax.Array, weight: jax.Array) -> jax.Array:
    return jnp.abs(weight * gradient)


# What is averaged, whether it has a sign, and whether it skips what is not finite.
_OF_WEIGHTS: dict[str, tuple[Watched, bool, bool]] = {
    "weight": (jnp.positive, True, False),
    "magnitude": (jnp.abs, False, False),
}
_OF_GRADIENTS: dict[str, tuple[Watched, bool, bool]] = {
    "square": (lambda gradient, *_: jnp.square(gradient), False, True),
    "taylor": (_taylor, False, True),
}
