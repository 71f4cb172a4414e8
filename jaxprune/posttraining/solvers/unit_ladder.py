"""Whole units out of a kernel down to several sizes, chosen in one sweep.

The choice of `units.remove` is greedy, so what a smaller size keeps is among what a
larger one keeps: one sweep to the smallest gives the order, and the rows of each size
are solved for on their own.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Integer

from jaxprune.posttraining.solvers import layer_problem
from jaxprune.posttraining.solvers import units as units_solver
from jaxprune.posttraining.solvers.units import State


class Ladder(NamedTuple):
    """A kernel at several numbers of kept units.

    Attributes:
      weights: kernels (sizes, in, out) float32; rows of removed units are zero.
      kept: masks (sizes, units), True where kept.
      errors: relative squared errors of the outputs, (sizes,).
      damping: damping that was used, infinity where none helped; see `Solution`.
    """

    weights: Float[Array, "sizes in out"]
    kept: Bool[Array, "sizes units"]
    errors: Float[Array, " sizes"]
    damping: Float[Array, ""]


def remove_to_sizes(
    weight: Float[Array, "in out"],
    hessian: Float[Array, "in in"],
    units: Int[np.ndarray, "units rows"],
    sizes: Sequence[int],
    *,
    damping: Any = 0.01,
) -> Ladder:
    """Removes units until so many are left, for several numbers in one sweep.

    The choice is greedy, so the units of a size are among those of every larger one,
    and each size has the kept units and the kernel that `remove` gives.

    Args:
      weight: kernel (in, out), floating.
      hessian: matrix (in, in), proportional to X^T X of the inputs.
      units: rows of each unit, (units, rows); no row is in two.
      sizes: numbers of units that stay, from 1 to all of them; there may be none.
      damping: share of the Hessian's mean diagonal added to its diagonal.

    Returns:
      The kernel at each size, with the errors of its outputs.

    Raises:
      ValueError: a shape or number does not fit, or a value is not finite.
      TypeError: a dtype does not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> import numpy as np
      >>> from jaxprune.posttraining.solvers.unit_ladder import remove_to_sizes
      >>> weight, rows = jnp.array([[1.0], [2.0], [9.0]]), np.arange(3)[:, None]
      >>> ladder = remove_to_sizes(weight, jnp.eye(3), rows, [2, 1])
      >>> ladder.kept.tolist()
      [[False, True, True], [False, False, True]]
    """
    layer_problem.checked(weight, hessian, damping)
    units = np.asarray(units)
    for size in sizes:
        units_solver.check_units(units, len(weight), len(units) - size)
    at_once = -(-len(units) // units_solver.ROUNDS)
    numbers = jnp.asarray(sizes, jnp.int32)  # of none it would be an array of floats
    return _ladder(weight, hessian, units, numbers, damping, at_once=at_once)


@functools.partial(jax.jit, static_argnames="at_once")
@layer_problem.precise
def _ladder(
    weight: Float[Array, "in out"],
    hessian: Float[Array, "in in"],
    units: Integer[Array, "units rows"],
    sizes: Int[Array, " sizes"],
    damping: Any,
    *,
    at_once: int,
) -> Ladder:
    damped = layer_problem.damped(hessian, damping)
    wide = weight.astype(jnp.float32)
    total = len(units)

    def unfinished(progress: tuple[State, Array, Array]) -> jax.Array:
        return jnp.sum(progress[1]) > jnp.min(sizes, initial=total)

    def step(
        progress: tuple[State, Array, Array],
    ) -> tuple[State, Array, Array]:
        state, kept, places = progress
        costs = units_solver.unit_costs(state, units, kept)
        costs = units_solver.total_costs([costs], [], kept)  # (units,)
        cheapest = jnp.argsort(costs, stable=True)[:at_once]
        remaining, order = jnp.sum(kept), jnp.arange(at_once)
        going = order < remaining
        # Of the units of a round the cheapest goes first, as in a shorter last round.
        new = jnp.where(going, total - remaining + order, places[cheapest])
        state = units_solver.without_units(state, units, cheapest, going)
        kept = kept.at[cheapest].set(~going & kept[cheapest])
        return state, kept, places.at[cheapest].set(new)

    start = State(wide, units_solver.inverse_of(damped))
    # (units,): how many went before each; those that no size loses go last.
    begun = start, jnp.ones(total, bool), jnp.full(total, total)
    places = jax.lax.while_loop(unfinished, step, begun)[2]

    def at_size(size: Array) -> tuple[Array, Array, Array]:
        kept = places >= total - size  # (units,)
        rows = jnp.ones(len(weight), bool).at[units].set(kept[:, None])  # (in,)
        solved = jnp.where(
            size == total, wide, units_solver.solve_rows(wide, damped.matrix, rows)
        )  # (in, out)
        lost = jnp.sum((wide - solved) * (hessian @ (wide - solved)))
        output = jnp.sum(wide * (hessian @ wide))
        return solved, kept, lost / jnp.where(output > 0, output, 1)

    # One after the other, since each holds matrices as large as the Hessian.
    weights, kept, errors = jax.lax.map(at_size, sizes)
    return Ladder(weights, kept, errors, damped.damping)
