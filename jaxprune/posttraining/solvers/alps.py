"""ALPS: choose the support of a kernel by ADMM, then solve for the weights on it.

The layer problem min tr (W - V)^T H (W - V) over all V with the pattern, in units in
which H has a unit diagonal. A copy D of V obeys the pattern, V does not, and a growing
penalty rho ||V - D||^2 draws the two together until the support of D settles. Then
conjugate gradients find the best weights on that support, for all outputs at once.

| paper (algorithms 1 and 2) | here |
|---|---|
| X^T X, after scaling by E | `problem.matrix` (`_Problem`), unit diagonal |
| W-hat, the dense weights | `problem.weight` |
| W, the iterate | `free` |
| D, the copy with the pattern | `copy` |
| V / rho, the scaled dual | `dual` |
| S = supp(D) | `support` |
| rho, raised in step t | `penalty`, from `_FIRST` by `_GROWTH` |
| (H + rho I)^-1 | `inverse` / `penalty` |
| R, P of the conjugate gradients | `residual`, `direction` |
| alpha, beta | `step`, `turn` |
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxprune.masking import matrix_mask, patterns
from jaxprune.posttraining.solvers import layer_problem
from jaxprune.posttraining.solvers.layer_problem import Solution
from jaxprune.typing import Pattern

# Penalties, each for a few iterations: there is one inverse for each.
_FIRST, _GROWTH, _PENALTIES, _EACH = 0.2, 2.3, 4, 5
# How far each iteration goes, as a multiple of the plain one's step.
_RELAXATION = 1.6
# What is inverted as a whole. LAPACK's threads wait for each other while other programs
# run, the longer the larger the matrix; XLA's products do not.
_INVERTED = 256
# Steps of conjugate gradients after that; the copy is all but there.
_STEPS = 5


def solve(
    weight: Float[Array, "in out"],
    hessian: Float[Array, "in in"],
    kept: Any,
    *,
    pattern: Pattern = patterns.Unstructured(),
    damping: Any = 0.01,
    steps: int = _STEPS,
) -> Solution:
    """Prunes a kernel to the pattern with little error, and updates what is kept.

    Args:
      weight: kernel (in, out), floating.
      hessian: matrix (in, in), proportional to X^T X of the inputs.
      kept: number of units of the pattern that are kept, an integer, traced or not;
        `NM` does not look at it.
      pattern: pattern of the mask, `Unstructured`, `PerOutput`, `NM` or `Block`.
      damping: share of the Hessian's mean diagonal added to its diagonal. Where the
        factorisation fails it is raised tenfold until it does not.
      steps: number of steps of conjugate gradients on the chosen support.

    Returns:
      The pruned weight, its mask and the damping used, infinity where nothing helped:
      look at it. Under `jax.lax.map` or `jax.vmap`, those of a stack of matrices.

    Raises:
      ValueError: a shape, number or pattern does not fit, or a value is not finite.
      TypeError: a dtype does not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxprune.posttraining.solvers import alps
      >>> weight = jnp.array([[1.0], [2.0]])
      >>> hessian = jnp.array([[1.0, 0.5], [0.5, 1.0]])
      >>> print(alps.solve(weight, hessian, 1, damping=0.0).weight.round(3).tolist())
      [[0.0], [2.5]]

    Reference:
      Meng et al., "ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for
      Large Language Models", 2024, arXiv 2406.07831, Algorithms 1 and 2. Ours differs:
      1. the penalties are fixed, 0.2 to 2.4 in four steps, so that a solve costs the
         same whatever the data;
      2. there is an inverse for each penalty, not one eigendecomposition for all, which
         would take longer than all the rest;
      3. iterations are over-relaxed (Boyd et al., "Distributed Optimization and
         Statistical Learning via the Alternating Direction Method of Multipliers",
         2011, section 3.4.3), so that fewer do.
    """
    layer_problem.checked(weight, hessian, damping, kept, pattern)
    _check_steps(steps)
    return _solve(weight, hessian, kept, damping, pattern=pattern, steps=steps)


def refine(
    weight: Float[Array, "in out"],
    hessian: Float[Array, "in in"],
    mask: Bool[Array, "in out"],
    *,
    damping: Any = 0.01,
    steps: int = 20,
) -> jax.Array:
    """The weights on a given support that keep the outputs best.

    Args:
      weight: kernel (in, out), floating, whose outputs are to be kept.
      hessian: matrix (in, in), proportional to X^T X of the inputs.
      mask: mask (in, out), boolean, True where kept.
      damping: share of the Hessian's mean diagonal added to its diagonal.
      steps: number of steps of conjugate gradients. With as many steps as an output
        keeps inputs, its weights are exact up to rounding.

    Returns:
      The weights, exactly zero outside of the mask.

    Raises:
      ValueError: a shape or number does not fit, or a value is not finite.
      TypeError: a dtype does not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxprune.posttraining.solvers import alps
      >>> weight, hessian = jnp.array([[1.0], [2.0]]), jnp.array([[1, 0.5], [0.5, 1]])
      >>> mask = jnp.array([[False], [True]])
      >>> alps.refine(weight, hessian, mask, damping=0.0).tolist()
      [[0.0], [2.5]]
    """
    layer_problem.checked(weight, hessian, damping)
    layer_problem.checked_mask(mask, weight)
    _check_steps(steps)
    return _refine(weight, hessian, mask, damping, steps=steps)


def _check_steps(steps: int) -> None:
    if steps < 0:
        raise ValueError(
            f"steps must be at least 0, got {steps}; leave it out for the usual number"
        )


class _Problem(NamedTuple):
    """The problem with a unit diagonal."""

    weight: Float[Array, "in out"]  # what is to be approximated
    matrix: Float[Array, "in in"]  # the Hessian
    scale: Float[Array, "in 1"]  # what the weight was multiplied by
    reached: Bool[Array, "in 1"]  # whether some sample reached the input


@functools.partial(jax.jit, static_argnames=("pattern", "steps"))
@layer_problem.precise
def _solve(
    weight: Float[Array, "in out"],
    hessian: Float[Array, "in in"],
    kept: Any,
    damping: Any,
    *,
    pattern: Pattern,
    steps: int,
) -> Solution:
    ready = layer_problem.damped(hessian, damping)
    problem = _scaled(weight, ready.matrix, hessian)
    project = functools.partial(matrix_mask.mask, kept=kept, pattern=pattern)
    start, support = _support(problem, project)
    best = _conjugate(problem, start, support, steps)
    return Solution(_back(best, problem, weight.dtype), support, ready.damping)


@functools.partial(jax.jit, static_argnames="steps")
@layer_problem.precise
def _refine(
    weight: Float[Array, "in out"],
    hessian: Float[Array, "in in"],
    mask: Bool[Array, "in out"],
    damping: Any,
    *,
    steps: int,
) -> jax.Array:
    matrix, unit = layer_problem.normalised(hessian)
    problem = _scaled(weight, matrix + unit * damping, hessian)
    start = jnp.where(mask, problem.weight, 0)
    return _back(_conjugate(problem, start, mask, steps), problem, weight.dtype)


def _scaled(weight: jax.Array, matrix: jax.Array, hessian: jax.Array) -> _Problem:
    scale = jnp.sqrt(jnp.diagonal(matrix))[:, None]
    scaled = weight.astype(jnp.float32) * scale
    reached = jnp.diagonal(hessian)[:, None] != 0
    return _Problem(scaled, matrix / (scale * scale.T), scale, reached)


def _back(best: jax.Array, problem: _Problem, dtype: Any) -> jax.Array:
    return (best / problem.scale).astype(dtype)


def _support(problem: _Problem, project: Any) -> tuple[jax.Array, jax.Array]:
    """The copy that the alternating directions settle on, and its support."""
    eye = jnp.eye(len(problem.matrix), dtype=jnp.float32)

    def projected(target: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        support = project(jnp.square(target))  # (in, out), bool
        copy = jnp.where(support, target, 0)
        return copy, target - copy, support

    def iterate(_: Any, state: Any, inverse: jax.Array) -> Any:
        copy, dual, _ = state  # (in, out) each
        away = problem.weight - copy + dual  # (in, out)
        # The best V for this D: without the pattern, drawn to it by the penalty.
        free = problem.weight - inverse @ away
        free = copy + _RELAXATION * (free - copy)
        # By itself, where no sample reached an input: all weights there are as good.
        return projected(jnp.where(problem.reached, free + dual, problem.weight))

    def one(state: Any, penalty: jax.Array) -> Any:
        # rho (H + rho I)^-1, (in, in), for all iterations of this penalty.
        inverse = penalty * _inverse(problem.matrix + penalty * eye)
        body = functools.partial(iterate, inverse=inverse)
        copy, dual, support = jax.lax.fori_loop(0, _EACH, body, state)
        # The dual is held as a share of the penalty, which grows.
        return (copy, dual / _GROWTH, support), None

    penalties = _FIRST * _GROWTH ** jnp.arange(_PENALTIES, dtype=jnp.float32)
    # The first iteration, from a copy that is the weight, needs no inverse.
    start = projected(problem.weight)
    copy, _, support = jax.lax.scan(one, start, penalties)[0]
    return copy, support


def _inverse(matrix: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """The inverse of a positive definite matrix, by halves and mostly by products."""
    size = len(matrix)
    if size <= _INVERTED:
        factor = jax.lax.linalg.cholesky(matrix, symmetrize_input=False)
        eye = jnp.eye(size, dtype=jnp.float32)
        half = jax.lax.linalg.triangular_solve(factor, eye, left_side=True, lower=True)
        return half.T @ half
    middle = size // 2
    # [[A, B], [B^T, C]] by the Schur complement C - B^T A^-1 B.
    corner = matrix[:middle, middle:]
    first = _inverse(matrix[:middle, :middle])
    across = first @ corner  # (middle, rest)
    rest = _inverse(matrix[middle:, middle:] - corner.T @ across)
    moved = across @ rest
    return jnp.block([[first + moved @ across.T, -moved], [-moved.T, rest]])


def _conjugate(
    problem: _Problem, start: jax.Array, support: jax.Array, steps: int
) -> jax.Array:
    """Conjugate gradients on the support, each output by itself, (in, out).

    The diagonal is 1: that is the preconditioner.
    """

    def one(_: Any, state: Any) -> Any:
        best, residual, direction, size = state  # (in, out) three times, (1, out)
        image = jnp.where(support, problem.matrix @ direction, 0)  # (in, out)
        curve = jnp.sum(direction * image, 0, keepdims=True)
        # Of an output that is solved already both are zero, and it stays.
        step = jnp.where(curve > 0, size / jnp.where(curve > 0, curve, 1), 0)
        best, residual = best + step * direction, residual - step * image
        squares = jnp.sum(residual * residual, 0, keepdims=True)
        turn = jnp.where(size > 0, squares / jnp.where(size > 0, size, 1), 0)
        return best, residual, residual + turn * direction, squares

    residual = jnp.where(support, problem.matrix @ (problem.weight - start), 0)
    size = jnp.sum(residual * residual, 0, keepdims=True)
    return jax.lax.fori_loop(0, steps, one, (start, residual, residual, size))[0]
