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
  Both are about rounding.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxprune.posttraining.solvers import layer_problem


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
      weight: W, floating.
      hessian: X^T X / samples.
      drift: X^T (D - X) / samples.
      share: how much of the way from W to go, in [0, 1].
      damping: as a share of the Hessian's mean diagonal; more is used where it cannot
        be factorised so.

    Returns:
      Of the weight's dtype; the weight itself where nothing drifted, and where no
      damping helped.
    """
    found = layer_problem.damped(hessian, damping)
    mean = jnp.mean(jnp.diagonal(hessian))
    # Products alone, and the share in the first factor. Solving by the Cholesky factor
    # is divided among threads, and a product that is added may be rounded once or twice:
    # on a mesh either would give other last bits.
    scaled = drift.astype(jnp.float32) * (share / jnp.where(mean > 0, mean, 1))
    toward = scaled @ weight.astype(jnp.float32)
    step = layer_problem.inverse(found.matrix) @ toward  # (in, out)
    step = jnp.where(jnp.isfinite(found.damping), step, jnp.zeros_like(step))
    return (weight + step).astype(weight.dtype)
