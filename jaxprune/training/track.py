"""Watching a training run: optax transformations that average weights and gradients.

`track_importance` stands last in the chain and sees the step that is really taken;
`track_gradients` stands first and sees the raw gradient. Both pass the updates through
untouched and keep their averages in the optimizer state, placed like the parameters,
where `get_importance` finds them.

    the paper's (arXiv 2502.17071)   ours
    w_i, the weights of snapshot i   `params + updates`, after an update
    c(i), growing in i               `weighting`; sqrt(i) is `weightings.power(0.5)`
    S_n = sum_i c(i)                 inside the weighting's gain, c(n) / S_n
    A_n = sum_i c(i) w_i / S_n       `TrackImportanceState.weight`, by the recurrence
                                     A_n = A_{n-1} + (c(n) / S_n) (w_n - A_{n-1})
    one snapshot an epoch            `every` updates from `start` on
"""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxprune.arrays import low_bit, placement, tree
from jaxprune.arrays.low_bit import Storage
from jaxprune.arrays.messages import check_steps, refuse_fractions
from jaxprune.training import weightings
from jaxprune.training.masked import require_params
from jaxprune.training.running_average import Average, AverageLeaves, Memory, Statistic
from jaxprune.typing import Params, Weighting


class TrackImportanceState(NamedTuple):
    """State of `track_importance`.

    Attributes:
      step: number of updates so far, int32 scalar.
      weight: weighted average of w, like the parameters, or None.
      magnitude: weighted average of |w|, like the parameters, or None.
      exponents: units of the codes for the storage "int8": field to a scalar for each
        tracked leaf, in order; empty for other storages.

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
      step: number of updates so far, int32 scalar.
      square: weighted average of g^2, like the parameters, or None.
      taylor: weighted average of |w g|, like the parameters, or None.
      exponents: units of the codes for the storage "int8": field to a scalar for each
        tracked leaf, in order; empty for other storages.

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
    (tests/training/test_running_average.py). "int8" follows thousands of tiny
    steps in one direction some 5 % too fast. With `memory="pinned_host"` on one device,
    commit the parameters with `jax.device_put` and make the state by
    `jax.jit(tx.init)`, or the second step compiles again.

    Args:
      weighting: weight of each snapshot; the authors' sqrt(i) by default.
      every: number of updates between snapshots, at least 1.
      start: number of updates before the first snapshot, at least 0.
      average: names of the averages, of "weight" (w, the paper) and "magnitude" (|w|).
      storage: dtype that an average is held in: 4, 2 or 1 bytes a weight.
      memory: "device", or "pinned_host", which keeps the averages in host memory and
        streams them through the device, one leaf after the other, when a snapshot is
        due; give `every` too.
      seed: rng seed of the stochastic rounding to "bfloat16" and "int8".

    Returns:
      A transformation that returns the updates unchanged. Its `update` needs
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
    averages = _averages("track_importance", average, storage, memory, seed)
    snapshots = _Snapshots("track_importance", averages, weighting, every, start)

    def init(params: Params) -> TrackImportanceState:
        state = TrackImportanceState(placement.counter(params), None, None, {})
        return snapshots.start(state, params, from_values=True)

    def update(
        updates: optax.Updates,
        state: TrackImportanceState,
        params: Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, TrackImportanceState]:
        del extra_args
        params = require_params(params, "track_importance")
        # The very sum that the caller makes next; compiled together they are one.
        weights = optax.apply_updates(params, updates)
        return updates, snapshots.update(state, weights)

    return optax.GradientTransformationExtraArgs(init, update)


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
    `scores.preconditioned_magnitude` sees a quarter and `scores.obd` all. The
    square of a gradient under 1e-19 is zero in float32.

    Args:
      weighting: weight of each snapshot; all alike by default.
      every: number of updates between snapshots, at least 1.
      start: number of updates before the first snapshot, at least 0.
      average: names of the averages, of "square" (g^2) and "taylor" (|w g|, with the
        weights at which the gradient was taken).
      storage: dtype that an average is held in: 4, 2 or 1 bytes a weight.
      memory: "device" or "pinned_host"; see `track_importance`.
      seed: rng seed of the stochastic rounding to "bfloat16" and "int8".

    Returns:
      A transformation that returns the updates unchanged. "taylor" needs `params`.

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
    averages = _averages("track_gradients", average, storage, memory, seed)
    snapshots = _Snapshots("track_gradients", averages, weighting, every, start)

    def init(params: Params) -> TrackGradientsState:
        state = TrackGradientsState(placement.counter(params), None, None, {})
        return snapshots.start(state, params, from_values=False)

    def update(
        updates: optax.Updates,
        state: TrackGradientsState,
        params: Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, TrackGradientsState]:
        del extra_args
        if "taylor" not in averages:
            return updates, snapshots.update(state, updates)
        params = require_params(params, "track_gradients")
        return updates, snapshots.update(state, updates, params)

    return optax.GradientTransformationExtraArgs(init, update)


@dataclasses.dataclass(frozen=True)
class _Snapshots:
    """When the averages of a state take a snapshot, and what it counts."""

    name: str
    averages: Mapping[str, Average]
    weighting: Weighting
    every: int
    first: int

    def __post_init__(self) -> None:
        """Refuses what is out of range."""
        check_steps(self.name, every=self.every, start=self.first)
        if not callable(self.weighting):
            raise TypeError(
                f"{self.name} needs a weighting such as jp.weightings.power(0.5), got "
                f"{self.weighting!r}"
            )
        if not (self.every >= 1 and self.first >= 0):
            raise ValueError(
                f"tracking needs every >= 1 and start >= 0, got every={self.every}, "
                f"start={self.first}"
            )

    def start(self, state: Any, params: Params, *, from_values: bool) -> Any:
        """The state with its averages before the first snapshot."""
        leaves = {
            field: average.start(params, from_values=from_values)
            for field, average in self.averages.items()
        }
        state = _with_averages(state, leaves)
        if tree.is_placeholder(params):  # a number stands for those of all leaves
            coded = [f for f, a in self.averages.items() if a.storage == "int8"]
            state = state._replace(exponents=dict.fromkeys(coded, state.step))
        return state

    def update(self, state: Any, *trees: Params) -> Any:
        """The state one step later, with a snapshot of the trees if one is due."""
        since = state.step - self.first
        n = jnp.maximum(since // self.every + 1, 1)  # number of this snapshot
        gain = self.weighting(n)  # c(n) / S_n
        state = state._replace(step=optax.safe_increment(state.step))

        def take(state: Any) -> Any:
            leaves = {}
            for field, average in self.averages.items():
                exponents = state.exponents.get(field, ())
                before = AverageLeaves(getattr(state, field), exponents)
                leaves[field] = average.update(before, gain, n, *trees)
            return _with_averages(state, leaves)

        if self.every == 1 and self.first == 0:
            return take(state)
        due = (since >= 0) & (since % self.every == 0)
        # On the other steps a branch is taken that touches no average.
        return jax.lax.cond(due, take, lambda state: state, state)


def _with_averages(state: Any, averages: Mapping[str, AverageLeaves]) -> Any:
    """The state with these averages in its fields."""
    exponents = {field: a.exponents for field, a in averages.items() if a.exponents}
    leaves = {field: a.leaves for field, a in averages.items()}
    return state._replace(**leaves, exponents=exponents)


def _averages(
    name: str,
    average: Collection[str],
    storage: Storage,
    memory: Memory,
    seed: int,
) -> dict[str, Average]:
    """The averages by name, as they are taken and held."""
    statistics = _STATISTICS[name]
    if not (
        isinstance(average, Collection)
        and all(isinstance(name, str) for name in average)
    ):
        raise TypeError(
            f"{name}(average=...) takes some of {sorted(statistics)}, got {average!r}"
        )
    names = frozenset([average] if isinstance(average, str) else average)
    known = sorted(statistics)
    if not (names and names <= set(known)):
        raise ValueError(f"{name}(average=...) takes some of {known}, got {average!r}")
    if memory not in ("device", "pinned_host"):
        raise ValueError(f"memory must be 'device' or 'pinned_host', got {memory!r}")
    low_bit.checked_storage(storage)
    refuse_fractions(name, seed=seed)
    # Each average has a stream of random numbers of its own, whichever are asked for.
    streams = {field: int(seed) * 4096 + 1024 * i for i, field in enumerate(statistics)}
    return {
        field: Average(statistic, storage, memory, streams[field])
        for field, statistic in statistics.items()
        if field in names
    }


_STATISTICS = {
    "track_importance": {
        "weight": Statistic(jnp.positive, signed=True, skips_nonfinite=False),
        "magnitude": Statistic(jnp.abs, signed=False, skips_nonfinite=False),
    },
    "track_gradients": {
        "square": Statistic(
            lambda gradient, *_: jnp.square(gradient),
            signed=False,
            skips_nonfinite=True,
        ),
        "taylor": Statistic(
            lambda gradient, weight: jnp.abs(weight * gradient),
            signed=False,
            skips_nonfinite=True,
        ),
    },
}
