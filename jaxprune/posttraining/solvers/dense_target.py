"""A matrix that makes up for what the matrices before it lost.

A solver keeps a layer's outputs X W for the inputs X that the pruned model has. The
dense model has D W there. The matrix whose outputs for X are nearest to those is

    argmin_U |D W - X U|^2 + damping |U - W|^2
        = W + (X^T X + damping)^-1 X^T (D - X) W,

and a solver that is given U in the place of W makes up for earlier layers as it goes.
Calibration has few samples and X little of some directions, so that all of it is not
always best: `share` takes a part of the way.

References:
  Li et al., "GPTAQ: Efficient Finetuning-Free Quantization for Asymmetric Calibration",
  ICML 2025, arXiv 2504.02692.
  Arai, Ichikawa, "Quantization Error Propagation: Revisiting Layer-Wise Post-Training
  Quantization", NeurIPS 2025, arXiv 2504.09629; their alpha is `share`.
  Both are about quantization.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxprune.posttraining.solvers import layer_problem

# The factor on the solver's damping. The drift D - X is known less well than X: along
# inputs that vary little the drift is mostly noise, and a matrix that is fitted to this
# noise is worse on other texts.
_DAMPING_FACTOR = 10
# Inputs that are solved for together.
_BLOCK = 512


@functools.partial(jax.jit, static_argnames=("share", "damping"))
@layer_problem.precise
def corrected(
    weight: Float[Array, "in out"],
    hessian: Float[Array, "in in"],
    drift: Float[Array, "in in"],
    *,
    share: float,
    damping: float,
) -> Float[Array, "in out"]:
    """The matrix for the inputs X whose outputs are those of the dense model for D.

    Args:
      weight: kernel W (in, out), floating.
      hessian: matrix X^T X / samples, (in, in).
      drift: matrix X^T (D - X) / samples, (in, in).
      share: share of the way from W to go, in [0, 1].
      damping: damping of the solver, a share of the Hessian's mean diagonal. Ten times
        as much is used here, and more where the Hessian cannot be factorised so.

    Returns:
      Of the weight's dtype; the weight itself where nothing drifted, and where no
      damping helped.
    """
    damped = layer_problem.damped(hessian, _DAMPING_FACTOR * damping)
    # By itself: as a part of what uses it XLA may add it up in another order on a mesh.
    mean = jax.lax.optimization_barrier(jnp.mean(jnp.diagonal(hessian)))
    scale = share / jnp.where(mean > 0, mean, 1)
    # X^T (D - X) W / samples, (in, out), and from it the step from W.
    toward = (drift.astype(jnp.float32) * scale) @ weight.astype(jnp.float32)
    step = _solved(damped.factor, toward)
    step = jnp.where(jnp.isfinite(damped.damping), step, jnp.zeros_like(step))
    return (weight + step).astype(weight.dtype)


def _solved(
    factor: Float[Array, "in in"], right: Float[Array, "in out"]
) -> Float[Array, "in out"]:
    """The solution of L L^T x = right, block by block and mostly by products.

    LAPACK divides many right sides among its threads: how many there are would show in
    the last bits.
    """
    blocks = [slice(at, at + _BLOCK) for at in range(0, len(factor), _BLOCK)]
    # Inverses of L's diagonal blocks, (block, block) each.
    halves = [_inverted(factor[block, block]) for block in blocks]
    solution = right
    # L y = right, from the first block down; then L^T x = y, from the last one up.
    for block, half in zip(blocks, halves, strict=True):
        residual = (
            solution[block] - factor[block, : block.start] @ solution[: block.start]
        )
        solution = solution.at[block].set(half @ residual)
    for block, half in reversed([*zip(blocks, halves, strict=True)]):
        residual = (
            solution[block] - factor[block.stop :, block].T @ solution[block.stop :]
        )
        solution = solution.at[block].set(half.T @ residual)
    return solution


def _inverted(factor: Float[Array, "n n"]) -> Float[Array, "n n"]:
    eye = jnp.eye(len(factor), dtype=factor.dtype)
    return jax.lax.linalg.triangular_solve(factor, eye, left_side=True, lower=True)
