"""Whole units of inputs out of a kernel, the rest updated to make up for them.

A unit is a neuron (one row of the kernel that it goes out by) or a head (as many rows
as it has features). With H = X^T X, damped, and W (in, out), removing the rows P of a
unit and updating the others at best costs tr W_P^T ((H^-1)_PP)^-1 W_P of the squared
error of the outputs. The cheapest go, a few at a time; then W and H^-1 are those of
what is left.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Integer

from jaxprune.posttraining.solvers import layer_problem

# Units are removed so that there are about this many choices in all.
ROUNDS = 256


class Removal(NamedTuple):
    """A kernel without some of its units.

    Attributes:
      weight: kernel (in, out), in the weight's dtype; rows of removed units are zero.
      kept: mask (units,), True where kept.
      damping: damping that was used, infinity where none helped; see `Solution`.
    """

    weight: Float[Array, "in out"]
    kept: Bool[Array, " units"]
    damping: Float[Array, ""]


class Reader(NamedTuple):
    """A kernel that reads units.

    Attributes:
      weight: kernel (in, out), floating.
      hessian: matrix (in, in), X^T X of its inputs; times one factor for all readers.
      units: rows of each unit, (units, rows of one); no row is in two.
    """

    weight: Float[Array, "in out"]
    hessian: Float[Array, "in in"]
    units: Int[np.ndarray, "units rows"]


class State(NamedTuple):
    """What is left: W and H^-1 with removed rows zero."""

    weight: Float[Array, "in out"]
    inverse: Float[Array, "in in"]


def remove(
    weight: Float[Array, "in out"],
    hessian: Float[Array, "in in"],
    units: Int[np.ndarray, "units rows"],
    lost: Any,
    *,
    damping: Any = 0.01,
    at_once: int | None = None,
) -> Removal:
    """Removes the units of inputs that cost its outputs least, and updates the rest.

    Greedy: in each round every unit's cost, given what is gone already, is computed and
    the cheapest go, of equals the first. At the end the kept rows are solved for once
    more from the original ones, W_S = (H_SS)^-1 H_S: W, since rounding adds up over
    the rounds.

    Args:
      weight: kernel (in, out), floating.
      hessian: matrix (in, in), proportional to X^T X of the inputs.
      units: rows of each unit, (units, rows); no row is in two. Rows in no unit stay,
        and are updated as well.
      lost: number of units that go, an integer, traced or not.
      damping: share of the Hessian's mean diagonal added to its diagonal. Where the
        factorisation fails it is raised tenfold until it does not.
      at_once: number of units that are removed in one round; the cost of each ignores
        that the others go too. By default 1 for up to 256 units, and for more the
        smallest number with which 256 rounds are enough.

    Returns:
      The kernel with zeros in the rows that are gone, which units are kept, and the
      damping used, infinity where nothing helped: look at it.

    Raises:
      ValueError: a shape or number does not fit, or a value is not finite.
      TypeError: a dtype does not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> import numpy as np
      >>> from jaxprune.posttraining.solvers import units
      >>> weight = jnp.array([[1.0], [2.0]])
      >>> hessian = jnp.array([[1.0, 0.5], [0.5, 1.0]])
      >>> found = units.remove(weight, hessian, np.array([[0], [1]]), 1, damping=0.0)
      >>> found.kept.tolist(), found.weight.tolist()
      ([False, True], [[0.0], [2.5]])

    Reference:
      Kurtic, Frantar, Alistarh, "ZipLM: Inference-Aware Structured Pruning of Language
      Models", 2023, arXiv 2302.04089, section 3.1. Ours removes several small units at
      once, and solves for the kept rows anew at the end.
    """
    reader = Reader(weight, hessian, units)
    return remove_from_all([reader], lost, damping=damping, at_once=at_once)[0]


def remove_from_all(
    readers: Sequence[Reader],
    lost: Any,
    *,
    damping: Any = 0.01,
    at_once: int | None = None,
) -> list[Removal]:
    """Removes the units that cost the outputs of all their readers least.

    A unit's cost is the sum of what it costs each reader, so that kernels which share
    an input give what they would give side by side as one. Once the units are chosen
    the readers have nothing to do with each other: each is solved for its own inputs.

    Args:
      readers: kernels that read the same units.
      lost: number of units that go; see `remove`, as the two below.
      damping: share of each Hessian's mean diagonal that is added to its diagonal.
      at_once: number of units that are removed in one round.

    Returns:
      What became of each reader; all keep the same units.

    Raises:
      ValueError: a shape or number does not fit, or a value is not finite.
      TypeError: a dtype does not fit.
    """
    rows = [np.asarray(reader.units) for reader in readers]
    for reader, units in zip(readers, rows, strict=True):
        layer_problem.checked(reader.weight, reader.hessian, damping)
        check_units(units, len(reader.weight), lost)
    if at_once is None:
        at_once = -(-len(rows[0]) // ROUNDS)
    if at_once < 1:
        raise ValueError(f"at_once must be at least 1 unit, got {at_once}")
    at_once = min(at_once, len(rows[0]))
    pairs = zip(readers, rows, strict=True)
    parts = tuple(reader._replace(units=units) for reader, units in pairs)
    return _remove(parts, lost, damping, at_once=at_once)


def check_units(units: np.ndarray, inputs: int, lost: Any) -> None:
    """Refuses units that are no rows of so many inputs, or more to remove than go."""
    whole = np.issubdtype(units.dtype, np.integer) and units.ndim == 2 and units.size
    if not whole or units.min() < 0 or units.max() >= inputs:
        raise ValueError(
            f"units must be integers (units, rows) from 0 to {inputs - 1}, the rows of "
            f"each unit, got {units.dtype} of shape {units.shape}"
        )
    if len(np.unique(units)) != units.size:
        raise ValueError("units must have no row in common, but some have")
    if not isinstance(lost, jax.core.Tracer) and not 0 <= int(lost) < len(units):
        raise ValueError(
            f"a number of units from 0 to {len(units) - 1} can be removed, got {lost}"
        )


@functools.partial(jax.jit, static_argnames="at_once")
@layer_problem.precise
def _remove(
    readers: tuple[Reader, ...], lost: Any, damping: Any, *, at_once: int
) -> list[Removal]:
    damped = [layer_problem.damped(reader.hessian, damping) for reader in readers]
    wide = [reader.weight.astype(jnp.float32) for reader in readers]
    rows = [jnp.asarray(reader.units) for reader in readers]  # (units, rows) each
    units = len(rows[0])
    remaining = units - jnp.asarray(lost)
    weigh = _scales(readers)

    def unfinished(state: tuple[list[State], jax.Array]) -> jax.Array:
        return jnp.sum(state[1]) > remaining

    def step(state: tuple[list[State], jax.Array]) -> tuple[list[State], jax.Array]:
        states, kept = state
        costs = [unit_costs(s, r, kept) for s, r in zip(states, rows, strict=True)]
        cheapest = jnp.argsort(total_costs(costs, weigh, kept), stable=True)[:at_once]
        going = jnp.arange(at_once) < jnp.sum(kept) - remaining
        pairs = zip(states, rows, strict=True)
        return (
            [without_units(state, r, cheapest, going) for state, r in pairs],
            kept.at[cheapest].set(~going & kept[cheapest]),
        )

    start = [State(w, inverse_of(d)) for w, d in zip(wide, damped, strict=True)]
    # Only the choice is taken from the sweep: its updates carry rounding errors.
    everything = jnp.ones(units, bool)
    _, kept = jax.lax.while_loop(unfinished, step, (start, everything))
    removals = []
    for reader, weight, problem in zip(readers, wide, damped, strict=True):
        stays = jnp.ones(len(weight), bool).at[reader.units].set(kept[:, None])  # (in,)
        solved = solve_rows(weight, problem.matrix, stays).astype(reader.weight.dtype)
        removals.append(Removal(solved, kept, problem.damping))
    return removals


def inverse_of(damped: layer_problem.Damped) -> Float[Array, "in in"]:
    """The inverse of a damped Hessian, by its factor."""
    identity = jnp.eye(len(damped.matrix), dtype=jnp.float32)
    return jax.scipy.linalg.cho_solve((damped.factor, True), identity)


def _scales(readers: Sequence[Reader]) -> list[jax.Array]:
    """What the costs of each reader are multiplied by; each is solved at a scale."""
    means = jnp.stack([jnp.mean(jnp.diagonal(reader.hessian)) for reader in readers])
    return [*(means / jnp.where(means.max() > 0, means.max(), 1))]


def total_costs(
    costs: Sequence[jax.Array], scales: Sequence[jax.Array], kept: jax.Array
) -> Float[Array, " units"]:
    """What removing each unit costs all, infinity for those that are gone."""
    total = costs[0]
    if len(costs) > 1:
        scaled = [s * cost for s, cost in zip(scales, costs, strict=True)]
        total = jnp.stack(scaled).sum(0)
    # Where no damping helped they are NaN, which would be chosen after the infinite.
    total = jnp.where(jnp.isnan(total), jnp.finfo(total.dtype).max, total)
    return jnp.where(kept, total, jnp.inf)


def unit_costs(
    state: State, units: Integer[Array, "units rows"], kept: Bool[Array, " units"]
) -> Float[Array, " units"]:
    """What removing each unit costs a reader, anything for those that are gone."""
    weight = state.weight[units]  # (units, rows, out)
    if units.shape[1] == 1:
        block = jnp.diagonal(state.inverse)[units]  # (units, 1)
        return jnp.sum(jnp.square(weight[:, 0]), 1) / block[:, 0]
    # (units, rows, rows)
    block = state.inverse[units[:, :, None], units[:, None, :]]
    identity = jnp.eye(units.shape[1], dtype=block.dtype)
    block = jnp.where(kept[:, None, None], block, identity)
    factor = jnp.linalg.cholesky(block, symmetrize_input=False)
    half = jax.lax.linalg.triangular_solve(factor, weight, left_side=True, lower=True)
    return jnp.sum(jnp.square(half), (1, 2))


def without_units(
    state: State,
    units: Integer[Array, "units rows"],
    chosen: Integer[Array, " chosen"],
    going: Bool[Array, " chosen"],
) -> State:
    """The state once those of the chosen units that are going are gone."""
    rows = jnp.ravel(units[chosen])  # (chosen x rows,)
    gone = jnp.repeat(going, units.shape[1])  # (chosen x rows,)
    # Where a unit is not going, the identity stands for its block, and nothing moves.
    both = gone[:, None] & gone[None, :]
    block = state.inverse[rows[:, None], rows[None, :]]
    block = jnp.where(both, block, jnp.eye(len(rows), dtype=block.dtype))
    columns = jnp.where(gone, state.inverse[:, rows], 0)  # (in, chosen x rows)
    weight = jnp.where(gone[:, None], state.weight[rows], 0)  # (chosen x rows, out)
    factor = jax.scipy.linalg.cho_factor(block, lower=True)
    # (chosen x rows, out + in)
    move = jax.scipy.linalg.cho_solve(factor, jnp.concatenate([weight, columns.T], 1))
    outputs = weight.shape[1]
    new = state.weight - columns @ move[:, :outputs]
    inverse = state.inverse - columns @ move[:, outputs:]
    # Exactly zero, whatever rounding left there.
    stays = jnp.ones(len(inverse), bool).at[rows].set(~gone)
    return State(
        jnp.where(stays[:, None], new, 0),
        jnp.where(stays[:, None] & stays[None, :], inverse, 0),
    )


def solve_rows(
    weight: Float[Array, "in out"],
    hessian: Float[Array, "in in"],
    kept: Bool[Array, " in"],
) -> Float[Array, "in out"]:
    """The rows S that are kept, at best: (H_SS)^-1 H_S: W; zero elsewhere.

    Args:
      weight: kernel (in, out) float32.
      hessian: matrix (in, in), positive definite.
      kept: mask (in,), True where a row is kept.

    Returns:
      (in, out) float32.
    """
    both = kept[:, None] & kept[None, :]
    inside = jnp.where(both, hessian, jnp.eye(len(hessian), dtype=hessian.dtype))
    # H_S: W = H_SS W_S + H_SP W_P: only what is gone has to be made up for.
    gone = jnp.where(kept[:, None], 0, weight)
    target = jnp.where(kept[:, None], hessian @ gone, 0)
    factor = jax.scipy.linalg.cho_factor(inside, lower=True)
    moved = weight + jax.scipy.linalg.cho_solve(factor, target)
    return jnp.where(kept[:, None], moved, 0)
