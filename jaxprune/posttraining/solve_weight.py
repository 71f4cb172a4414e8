"""One weight of the model, pruned matrix by matrix, and what it costs its output."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.arrays import placement
from jaxprune.graph.linear_ops import Input, Product
from jaxprune.posttraining.calibration import Moments
from jaxprune.posttraining.methods import Matrix, Method
from jaxprune.posttraining.plan import Plan
from jaxprune.typing import Pattern

# Samples that a weight's error is measured on.
_SEEN = 256


def solve(
    plan: Plan, product: Product, weight: jax.Array, moments: Moments
) -> tuple[jax.Array, dict[str, Any]]:
    """Prunes one weight, expert by expert where there are several.

    Args:
      plan: what is done.
      product: which weight.
      weight: (batch, in, out), as stored.
      moments: of its input.

    Returns:
      The pruned weight in its own dtype, and its row of the report.

    Raises:
      ValueError: the Hessian could not be factorised.
    """
    counts = plan.removed[product.name]
    program = functools.partial(_solved, method=plan.method, pattern=plan.pattern)
    found = [
        placement.automatic(program, weight, moments, np.int32(i), np.uint32(count))
        for i, count in enumerate(counts)
    ]
    after = found[0][0] if len(found) == 1 else jnp.concatenate([f[0] for f in found])
    damping = [float(f[2]) for f in found]
    if not np.isfinite(damping).all():
        raise ValueError(
            f"the Hessian of '{product.name}' must be positive definite, but could not "
            "be factorised with any damping; give more or other calibration batches, "
            "run the model in float32, or use method='wanda'"
        )
    removed = sum(int(f[1]) for f in found)
    return after, {
        "name": product.name,
        "shape": list(product.shape),
        "removed": sum(counts),
        "zeros": removed,
        "size": product.size,
        "damping": max(damping),
    }


@functools.partial(jax.jit, static_argnames=("method", "pattern"))
def _solved(
    weight: jax.Array,
    moments: Moments,
    i: jax.Array,
    removed: jax.Array,
    *,
    method: Method,
    pattern: Pattern,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Matrix i of a weight: pruned (1, in, out), its zeros, the damping used."""
    wide = weight[i].astype(np.float32)
    hessian = None if moments.hessian is None else moments.hessian[i]
    square = moments.mean_square[i]
    found = method.prune(Matrix(wide, square, hessian, removed, pattern))
    after = found.weight.astype(weight.dtype)
    zeros = jnp.sum(after == 0, dtype=np.uint32)
    return after[None], zeros, found.damping


def error(
    source: Input, value: jax.Array, before: jax.Array, after: jax.Array
) -> float:
    """The relative squared error of a weight's output: |X (W - V)|^2 / |X W|^2.

    Args:
      source: how the input is read.
      value: the value it is read from, of one batch; its first 256 samples are taken.
      before: W, (batch, in, out).
      after: V.

    Returns:
      At least 0; 0 where the output is zero anyway.
    """
    found = placement.automatic(
        functools.partial(_error, source=source), value, before, after
    )
    return float(found)


@functools.partial(jax.jit, static_argnames="source")
def _error(
    value: jax.Array, before: jax.Array, after: jax.Array, *, source: Input
) -> jax.Array:
    x = source.read(value)[:, :_SEEN].astype(np.float32)
    wide = before.astype(np.float32)
    lost = jnp.einsum("bsi,bio->bso", x, wide - after.astype(np.float32))
    whole = jnp.einsum("bsi,bio->bso", x, wide)
    total = jnp.sum(jnp.square(whole))
    return jnp.sum(jnp.square(lost)) / jnp.where(total > 0, total, 1)
