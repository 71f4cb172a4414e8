"""SparseGPT: prune a kernel input by input, and let the later inputs make up for it.

Optimal brain surgery in one fixed order. With H = R R^T, R upper triangular, U = R^-1
is the upper Cholesky factor of H^-1 = U^T U that the paper sweeps with. Only its
diagonal blocks are ever needed: what the inputs S of earlier blocks have lost, D_S =
W_S - V_S, moves the next block B by R_BB^-T R_SB^T D_S. So H is factorised once, never
inverted, and no update is written twice. Kernels are (in, out): the paper's W is ours
transposed.

| paper and its program | here |
|---|---|
| H, damped | `layer_problem.damped`; its factor R is `factor` |
| Hinv, upper Cholesky factor of H^-1 | U; its diagonal blocks are `inverse` |
| Hinv1 = Hinv[i1:i2, i1:i2] | `inverse` of a block |
| B, Bs: columns of a block, of a mask | `block`, for both |
| W1, a block as updated by now | `start` |
| Q1, what is kept of a block | `kept` |
| w, d, q: a column, its pivot, what is kept | `weight[j]`, `inverse[j, j]`, `kept` |
| Err1 = (w - q) / d | `errors` |
| Losses, tmp = w^2 / d^2 | `scores`, squared |
| W[:, i2:] -= Err1 Hinv[i1:i2, i2:] | `_history`, when the later block's turn comes |
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxprune.masking import patterns
from jaxprune.posttraining.solvers import layer_problem
from jaxprune.posttraining.solvers.block_mask import block_mask
from jaxprune.posttraining.solvers.layer_problem import Solution
from jaxprune.posttraining.solvers.quantization import Quantization
from jaxprune.typing import Pattern

# Inputs that are swept one by one before the rest of their block is updated at once.
_SWEPT = 16


def solve(
    weight: Float[Array, "in out"],
    hessian: Float[Array, "in in"],
    kept: Any,
    *,
    pattern: Pattern = patterns.Unstructured(),
    damping: Any = 0.01,
    block: int = 128,
    quantization: Quantization | None = None,
) -> Solution:
    """Prunes a kernel and updates what is kept, so that its outputs change little.

    In each block of inputs the mask keeps the highest w^2 / [U_jj]^2, with w as updated
    by then: over the block and all outputs (`Unstructured`), in each output
    (`PerOutput`), in each group when its turn comes (`NM`), by tiles when theirs comes
    (`Block`, the mean of a tile). Each block loses its share of what is not kept,
    rounded so that the sum is exact; ties keep the first. Then, input by input, a
    removed w_j is made up for by w_i -= U_ji w_j / U_jj in all later inputs i. With
    `quantization` a kept w_j becomes its nearest level, and later inputs make up for
    the difference as well.

    Args:
      weight: kernel (in, out), floating, at most 65535 inputs.
      hessian: matrix (in, in), proportional to X^T X of the inputs.
      kept: number of units of the pattern that are kept, an integer, traced or not;
        `NM` does not look at it.
      pattern: pattern of the mask, `Unstructured`, `PerOutput`, `NM` or `Block`.
      damping: share of the Hessian's mean diagonal added to its diagonal. Where the
        factorisation fails it is raised tenfold until it does not.
      block: number of inputs whose mask is chosen at once; raised to whole groups or
        tiles. With `quantization` it is that one's group.
      quantization: levels on which the kept weights shall lie, or None. The scale of
        a group is chosen by its weights when its turn comes.

    Returns:
      The pruned weight, its mask and the damping used, infinity where nothing helped:
      look at it. Under `jax.lax.map` or `jax.vmap`, those of a stack of matrices.

    Raises:
      ValueError: a shape, number or pattern does not fit, or a value is not finite.
      TypeError: a dtype does not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxprune.posttraining.solvers import sparsegpt
      >>> weight = jnp.array([[1.0], [2.0]])
      >>> hessian = jnp.array([[1.0, 0.5], [0.5, 1.0]])
      >>> sparsegpt.solve(weight, hessian, 1, damping=0.0).weight.tolist()
      [[0.0], [2.5]]

    Reference:
      Frantar and Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned
      in One-Shot", 2023, arXiv 2301.00774, Algorithm 1. Ours differs: counts are exact
      and no inverse is formed; the results are the same up to rounding.
    """
    layer_problem.checked(weight, hessian, damping, kept, pattern)
    if block < 1:
        raise ValueError(f"block must be at least 1 input, got {block}; 128 is usual")
    if quantization is not None:
        block = quantization.block(pattern)
    return _solve(
        weight,
        hessian,
        kept,
        damping,
        pattern=pattern,
        block=block,
        quantization=quantization,
    )


def update(
    weight: Float[Array, "in out"],
    hessian: Float[Array, "in in"],
    mask: Bool[Array, "in out"],
    *,
    damping: Any = 0.01,
    block: int = 128,
    quantization: Quantization | None = None,
) -> Solution:
    """The same sweep for a mask that is given.

    Args:
      weight: kernel (in, out), floating.
      hessian: matrix (in, in), proportional to X^T X of the inputs.
      mask: mask (in, out), boolean, True where kept.
      damping: share of the Hessian's mean diagonal added to its diagonal; see `solve`.
      block: number of inputs that are swept before later ones are updated; only speed
        depends on it. With `quantization` it is that one's group.
      quantization: levels of the kept weights, or None; see `solve`.

    Returns:
      As `solve`, with the given mask.

    Raises:
      ValueError: a shape or number does not fit, or a value is not finite.
      TypeError: a dtype does not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxprune.posttraining.solvers import sparsegpt
      >>> weight, hessian = jnp.array([[1.0], [2.0]]), jnp.array([[1, 0.5], [0.5, 1]])
      >>> mask = jnp.array([[False], [True]])
      >>> sparsegpt.update(weight, hessian, mask, damping=0.0).weight.tolist()
      [[0.0], [2.5]]
    """
    layer_problem.checked(weight, hessian, damping)
    layer_problem.checked_mask(mask, weight)
    if quantization is not None:
        block = quantization.group
    return _update(
        weight, hessian, mask, damping, block=block, quantization=quantization
    )


class _Plan(NamedTuple):
    """How the inputs are cut: blocks, in them sweeps; where masks are chosen."""

    block: int
    swept: int
    early: bool
    quantization: Quantization | None = None


class _Problem(NamedTuple):
    """The blocks (blocks, inputs of a block, ...) of a padded problem.

    Attributes:
      weight: kernel (blocks, block, out), zero where an input is padding.
      factor: R by columns of blocks, (blocks, in, block): R[:, B].
      inverse: U_BB, the inverses of R's diagonal blocks, (blocks, block, block).
      damping: damping that was used, scalar.
    """

    weight: Float[Array, "blocks block out"]
    factor: Float[Array, "blocks in block"]
    inverse: Float[Array, "blocks block block"]
    damping: Float[Array, ""]


@functools.partial(jax.jit, static_argnames=("pattern", "block", "quantization"))
@layer_problem.precise
def _solve(
    weight: Float[Array, "in out"],
    hessian: Float[Array, "in in"],
    kept: Any,
    damping: Any,
    *,
    pattern: Pattern,
    block: int,
    quantization: Quantization | None,
) -> Solution:
    inputs = len(weight)
    if not weight.size:
        empty = jnp.zeros(weight.shape, bool)
        return Solution(weight, empty, jnp.asarray(damping, jnp.float32))
    plan = _plan(pattern, block, inputs, quantization)
    # Traced, so that one program serves every sparsity.
    pruned = layer_problem.unit_count(weight.shape, pattern) - jnp.asarray(kept)
    choose = functools.partial(
        block_mask, pruned=pruned, pattern=pattern, inputs=inputs
    )
    return _swept(weight, hessian, damping, plan, choose)


@functools.partial(jax.jit, static_argnames=("block", "quantization"))
@layer_problem.precise
def _update(
    weight: Float[Array, "in out"],
    hessian: Float[Array, "in in"],
    mask: Bool[Array, "in out"],
    damping: Any,
    *,
    block: int,
    quantization: Quantization | None,
) -> Solution:
    if not weight.size:
        return Solution(weight, mask, jnp.asarray(damping, jnp.float32))
    plan = _plan(patterns.Unstructured(), block, len(weight), quantization)
    padded = _padded(mask, plan.block)

    def choose(scores: jax.Array, first: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(padded, first, scores.shape[0])

    return _swept(weight, hessian, damping, plan, choose)


def _plan(
    pattern: Pattern, block: int, inputs: int, quantization: Quantization | None
) -> _Plan:
    """Blocks of whole groups or tiles, swept so many inputs at a time."""
    block = min(block, inputs)
    unit = pattern.m if isinstance(pattern, patterns.NM) else 1
    if isinstance(pattern, patterns.Block):
        unit = pattern.rows
    if unit >= _SWEPT and quantization is None:  # a row of tiles is a block of its own
        return _Plan(unit, _divisor(unit), early=True)
    if unit > 1 or isinstance(pattern, patterns.Block):
        return _Plan(
            -(-block // unit) * unit, unit, early=False, quantization=quantization
        )
    swept = min(_SWEPT, block)
    return _Plan(
        -(-block // swept) * swept, swept, early=True, quantization=quantization
    )


def _divisor(size: int) -> int:
    return next(part for part in range(_SWEPT, 0, -1) if size % part == 0)


def _swept(
    weight: jax.Array, hessian: jax.Array, damping: Any, plan: _Plan, choose: Any
) -> Solution:
    """All blocks, one after the other."""
    problem = _problem(weight, hessian, damping, plan.block)
    count, block, outputs = problem.weight.shape

    def one(lost: jax.Array, step: Any) -> Any:
        index, weight, factor, inverse = step
        moved = _history(factor, lost, index)  # (block, out)
        start = weight + inverse.T @ moved  # the block's weights as updated by now
        kept, mask = _one_block(start, inverse, index * block, plan, choose)
        lost = jax.lax.dynamic_update_slice_in_dim(
            lost, weight - kept, index * block, axis=0
        )
        return lost, (kept, mask)

    lost = jnp.zeros((problem.factor.shape[1], outputs), jnp.float32)  # (in, out)
    steps = (jnp.arange(count), problem.weight, problem.factor, problem.inverse)
    _, (kept, mask) = jax.lax.scan(one, lost, steps)
    kept, mask = (x.reshape(-1, outputs)[: len(weight)] for x in (kept, mask))
    return Solution(kept.astype(weight.dtype), mask, problem.damping)


def _problem(
    weight: jax.Array, hessian: jax.Array, damping: Any, block: int
) -> _Problem:
    """The problem in blocks, padded by inputs that have nothing to do with the rest."""
    ready = layer_problem.damped(hessian, damping, reverse=True)
    padded, factor = _padded(weight.astype(jnp.float32), block), jnp.flip(ready.factor)
    size = len(padded)
    factor = jnp.pad(factor, (0, size - len(factor)))
    padding = jnp.arange(size) >= len(weight)
    factor = factor + jnp.diag(padding.astype(jnp.float32))
    # (in, in) to (blocks, in, block)
    columns = factor.reshape(size, size // block, block).swapaxes(0, 1)
    eye = jnp.eye(block, dtype=jnp.float32)

    def inverted(column: jax.Array, index: jax.Array) -> jax.Array:
        diagonal = jax.lax.dynamic_slice_in_dim(column, index * block, block)
        return jax.lax.linalg.triangular_solve(diagonal, eye, left_side=True)

    inverse = jax.vmap(inverted)(columns, jnp.arange(size // block))
    return _Problem(
        padded.reshape(-1, block, padded.shape[1]), columns, inverse, ready.damping
    )


def _history(factor: jax.Array, lost: jax.Array, index: jax.Array) -> jax.Array:
    """R_SB^T D_S over the inputs S of earlier blocks, (block, out)."""
    block, outputs = factor.shape[1], lost.shape[1]

    def add(earlier: jax.Array, moved: jax.Array) -> jax.Array:
        rows = jax.lax.dynamic_slice_in_dim(factor, earlier * block, block)
        gone = jax.lax.dynamic_slice_in_dim(lost, earlier * block, block)
        return moved + rows.T @ gone

    start = jnp.zeros((block, outputs), jnp.float32)
    return jax.lax.fori_loop(0, index, add, start)


def _one_block(
    start: jax.Array, inverse: jax.Array, first: jax.Array, plan: _Plan, choose: Any
) -> tuple[jax.Array, jax.Array]:
    """What is left of one block and its mask, (block, out) each.

    The block is swept a few inputs at a time: those are updated by the errors of all
    inputs before them in one matmul, then one by one. An input by itself would read the
    whole block.
    """
    pivots = jnp.diagonal(inverse)  # (block,)
    if plan.early:  # the mask of the whole block, by the weights it begins with
        early = choose(jnp.abs(start) / pivots[:, None], first)
    rounded = None
    if plan.quantization is not None:
        whole = jnp.where(early, start, 0) if plan.early else start
        rounded = functools.partial(
            plan.quantization.on, scale=plan.quantization.scale(whole)
        )

    def sweep(errors: jax.Array, at: jax.Array) -> Any:
        take = functools.partial(
            jax.lax.dynamic_slice_in_dim, start_index=at, slice_size=plan.swept
        )
        columns = take(inverse, axis=1)  # (block, swept)
        rows = take(start) - columns.T @ errors  # (swept, out)
        if plan.early:
            mask = take(early)
        else:  # groups and tiles are chosen when their turn comes, by updated weights
            mask = choose(jnp.abs(rows) / take(pivots)[:, None], first + at)
        rows, error = _inputs(rows, take(columns), mask, rounded)
        errors = jax.lax.dynamic_update_slice_in_dim(errors, error, at, axis=0)
        return errors, (jnp.where(mask, rows, 0), mask)

    places = jnp.arange(0, plan.block, plan.swept)
    _, swept = jax.lax.scan(sweep, jnp.zeros_like(start), places)
    # From (sweeps, swept, out) to (block, out).
    kept, mask = (x.reshape(start.shape) for x in swept)
    return kept, mask


def _inputs(
    weight: jax.Array,
    inverse: jax.Array,
    mask: jax.Array,
    rounded: Callable[[jax.Array], jax.Array] | None,
) -> tuple[jax.Array, jax.Array]:
    """Input by input: what is left of these, and the error each one hands on."""

    def one(j: jax.Array, state: tuple[jax.Array, jax.Array]) -> Any:
        weight, errors = state
        if rounded is None:
            error = jnp.where(mask[j], 0, weight[j] / inverse[j, j])[None]
            weight = weight - inverse[j][:, None] * error
        else:
            kept = jnp.where(mask[j], rounded(weight[j]), 0)
            error = ((weight[j] - kept) / inverse[j, j])[None]
            weight = (weight - inverse[j][:, None] * error).at[j].set(kept)
        return weight, jax.lax.dynamic_update_slice_in_dim(errors, error, j, axis=0)

    return jax.lax.fori_loop(0, len(weight), one, (weight, jnp.zeros_like(weight)))


def _padded(matrix: jax.Array, block: int) -> jax.Array:
    """The matrix with so many more rows that blocks divide it, zero or False."""
    return jnp.pad(matrix, ((0, -len(matrix) % block), (0, 0)))
