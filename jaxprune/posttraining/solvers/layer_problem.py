"""The problem that a post-training solver solves: keep a layer's outputs.

For a kernel W (in, out) and inputs X (rows, in) with H = X^T X the error of a pruned V
is ||X W - X V||^2 = tr (W - V)^T H (W - V). H may be scaled by anything positive: all
solvers here first scale it to a mean diagonal of 1.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxprune.arrays.axes import Axes
from jaxprune.masking import patterns
from jaxprune.typing import Pattern

F = TypeVar("F", bound=Callable[..., Any])

# More damping than the mean of the diagonal itself says that the Hessian is no Hessian.
MOST_DAMPING = 1.0
_LEAST_DAMPING = 1e-4
# The mean square of an input that no sample reached, as a share of the mean of all.
_UNREACHED = 1e-12


class Solution(NamedTuple):
    """One matrix, pruned.

    Attributes:
      weight: kernel (in, out), in the weight's dtype, zero where pruned.
      mask: mask (in, out), True where kept; a kept weight may be zero by itself.
      damping: damping that was really used, float32, 0 where a method has none;
        infinity where no damping up to `MOST_DAMPING` made the Hessian positive
        definite, and then the weight is not to be used.
    """

    weight: Float[Array, "in out"]
    mask: Bool[Array, "in out"]
    damping: Float[Array, ""]


class Damped(NamedTuple):
    """A Hessian of mean diagonal 1, damped until it could be factorised.

    Attributes:
      matrix: Hessian (in, in), damping included.
      factor: lower Cholesky factor (in, in) of `matrix`, or, with `reverse`, of
        `matrix` with its inputs in reverse order.
      damping: amount that was added to the diagonal; infinity where nothing helped.
    """

    matrix: Float[Array, "in in"]
    factor: Float[Array, "in in"]
    damping: Float[Array, ""]


def precise(function: F) -> F:
    """The function with matmuls of full float32, not accelerators' default."""

    @functools.wraps(function)
    def wrapped(*args: Any, **options: Any) -> Any:
        with jax.default_matmul_precision("highest"):
            return function(*args, **options)

    return cast(F, wrapped)


def normalised(
    hessian: Float[Array, "in in"],
) -> tuple[Float[Array, "in in"], Float[Array, "in in"]]:
    """The Hessian scaled to a mean diagonal of 1, and what damping is a multiple of."""
    # An input that is zero in all samples gets a row and a column of exact zeros, but
    # for a tiny diagonal that is not damped. Removing a weight of such an input then
    # costs almost nothing, so these weights are removed first, the smaller before the
    # larger ones, and those that are kept do not change.
    hessian = hessian.astype(jnp.float32)
    diagonal = jnp.diagonal(hessian)
    mean, nonzero = jnp.mean(diagonal), diagonal != 0
    both = nonzero[:, None] & nonzero[None, :]  # (in, in)
    scaled = hessian / jnp.where(mean > 0, mean, 1)
    least = _UNREACHED * jnp.eye(len(hessian), dtype=jnp.float32)
    return jnp.where(both, scaled, least), jnp.diag(nonzero.astype(jnp.float32))


def damped(
    hessian: Float[Array, "in in"], damping: Any, *, reverse: bool = False
) -> Damped:
    """The Hessian damped by a share of its mean diagonal, and its Cholesky factor."""
    # Where the factorisation fails the damping is raised tenfold, up to `MOST_DAMPING`.
    # With `reverse` the factor is that of the inputs in reverse order.
    scaled, unit = normalised(hessian)

    def factor(amount: jax.Array) -> jax.Array:
        matrix = scaled + unit * amount
        ordered = jnp.flip(matrix) if reverse else matrix
        return jax.lax.linalg.cholesky(ordered, symmetrize_input=False)

    def failed(state: tuple[jax.Array, jax.Array]) -> jax.Array:
        amount, factored = state
        return ~jnp.all(jnp.isfinite(factored)) & (amount < MOST_DAMPING)

    def retried(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        more = jnp.maximum(10 * state[0], jnp.float32(_LEAST_DAMPING))
        more = jnp.minimum(more, jnp.float32(MOST_DAMPING))
        return more, factor(more)

    start = jnp.asarray(damping, jnp.float32)
    amount, factored = jax.lax.while_loop(failed, retried, (start, factor(start)))
    # What could not be factorised is not finite: LAPACK's failure is XLA's NaN.
    good = jnp.all(jnp.isfinite(factored))
    matrix = scaled + unit * amount
    return Damped(matrix, factored, jnp.where(good, amount, jnp.inf))


def checked(
    weight: jax.Array,
    hessian: jax.Array,
    damping: Any,
    kept: Any = 0,
    pattern: Pattern = patterns.Unstructured(),
) -> None:
    """Raises for whatever a solver cannot take, as far as it can be seen."""
    for name, array in (("weight", weight), ("hessian", hessian)):
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(f"the {name} must be floating, got {array.dtype}")
        if array.ndim != 2:
            raise ValueError(
                f"the {name} must be one matrix, got shape {array.shape}; bring a leaf "
                "to (in, out) with jp.Axes, and take stacked ones by jax.lax.map"
            )
    if hessian.shape != (weight.shape[0],) * 2:
        raise ValueError(
            f"a weight (in, out) of shape {weight.shape} needs a Hessian of shape "
            f"{(weight.shape[0],) * 2}, got {hessian.shape}; a kernel stored (out, in) "
            "is to be transposed"
        )
    if not isinstance(pattern, _SOLVED):
        raise ValueError(
            f"solvers take Unstructured, PerOutput, NM and Block, got {pattern}; use "
            "jp.masks.make for it, since nothing is left to repair in a removed output"
        )
    if problem := pattern.problem(weight.shape, Axes()):
        raise ValueError(f"{problem}; leave the leaf out or choose another pattern")
    _check_values(weight, hessian, damping)
    _check_count(weight, kept, pattern)


def checked_mask(mask: jax.Array, weight: jax.Array) -> None:
    """Raises for a mask that is not one of the weight, both (in, out)."""
    if mask.dtype != bool:
        raise TypeError(f"the mask must be boolean, True for kept, got {mask.dtype}")
    if mask.shape != weight.shape:
        raise ValueError(
            f"the mask must have the weight's shape {weight.shape}, got {mask.shape}; "
            "a mask stored (out, in) is to be transposed"
        )


_SOLVED = (patterns.Unstructured, patterns.PerOutput, patterns.NM, patterns.Block)


def check_damping(damping: Any) -> None:
    """Refuses a damping out of range, if it has a value."""
    if _known(damping) and not 0 <= float(damping) <= MOST_DAMPING:
        raise ValueError(
            f"damping must be from 0 to {MOST_DAMPING}, a share of the mean diagonal, "
            f"got {damping}; 0.01 is usual"
        )


def _check_values(weight: jax.Array, hessian: jax.Array, damping: Any) -> None:
    check_damping(damping)
    if _known(weight) and not jnp.all(jnp.isfinite(weight)):
        raise ValueError(
            "the weight must be finite, but it holds NaN or infinity; repair the "
            "checkpoint, or leave the leaf out"
        )
    if _known(hessian) and not jnp.all(jnp.isfinite(hessian)):
        raise ValueError(
            "the hessian must be finite, but it holds NaN or infinity; run the model "
            "in float32, or leave the calibration sequence out that overflows"
        )


def unit_count(shape: Sequence[int], pattern: Pattern) -> int:
    """The number of tiles in a matrix, those at the edge included, or of weights."""
    rows, columns = 1, 1
    if isinstance(pattern, patterns.Block):
        rows, columns = pattern.rows, pattern.columns
    return math.ceil(shape[0] / rows) * math.ceil(shape[1] / columns)


def _check_count(weight: jax.Array, kept: Any, pattern: Pattern) -> None:
    dtype = jnp.asarray(kept).dtype
    if not jnp.issubdtype(dtype, jnp.integer):
        raise TypeError(
            f"kept must be an integer, the number of units, got {dtype}; give "
            "weight.size - round(sparsity * weight.size)"
        )
    if pattern.sparsity is None and _known(kept):
        most = unit_count(weight.shape, pattern)
        if not 0 <= int(kept) <= most:
            raise ValueError(
                f"kept must be from 0 to {most}, the units of {pattern} in a "
                f"weight of shape {weight.shape}, got {int(kept)}; give a count and no "
                "share"
            )


def _known(value: Any) -> bool:
    return not isinstance(value, jax.core.Tracer)
