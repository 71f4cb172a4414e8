"""One weight of the model, pruned expert by expert, and what that costs its output."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxprune.arrays import placement
from jaxprune.graph.linear_ops import Input, LinearOp
from jaxprune.posttraining.input_statistics import InputStatistics
from jaxprune.posttraining.methods import Magnitude, Matrix, Method
from jaxprune.posttraining.plan import Plan
from jaxprune.typing import Pattern

# Samples that a weight's error is measured on.
_SAMPLES = 256
# An expert that was given fewer tokens is pruned by magnitude: so few say too little of
# its inputs.
_FEW = 16


def solve(
    plan: Plan,
    op: LinearOp,
    weight: Float[Array, "batch in out"],
    statistics: InputStatistics,
) -> tuple[Float[Array, "batch in out"], dict[str, Any]]:
    """Prunes one weight: the new one in its own dtype, and its row of the report."""
    counts = plan.kept[op.name]
    unreached = _unreached(plan.method, statistics)
    found = []
    for i, count in enumerate(counts):
        # What no sample says enough of, an expert that few tokens were sent to say.
        method = Magnitude() if i in unreached else plan.method
        program = functools.partial(_solved, method=method, pattern=plan.pattern)
        found.append(
            placement.automatic(
                program, weight, statistics, np.int32(i), np.uint32(count)
            )
        )
    after = found[0][0] if len(found) == 1 else jnp.concatenate([f[0] for f in found])
    damping = [float(f[2]) for f in found]
    if not np.isfinite(damping).all():
        raise ValueError(
            f"the Hessian of '{op.name}' must be positive definite, but could not "
            "be factorised with any damping; give more or other calibration batches, "
            "run the model in float32, or use the method wanda"
        )
    return after, {
        "name": op.name,
        "shape": list(op.shape),
        "removed": plan.removed[op.name],
        "zeros": sum(int(f[1]) for f in found),
        "size": op.size,
        "damping": max(damping),
        "by_magnitude": unreached,
        **_samples(plan.method, statistics),
    }


def _samples(method: Method, statistics: InputStatistics) -> dict[str, list[int]]:
    """How many samples each of several matrices saw, as a part of a row."""
    if method.needs == "nothing" or len(statistics.reached) == 1:
        return {}
    return {"samples": [int(n) for n in np.asarray(statistics.reached)]}


def _unreached(method: Method, statistics: InputStatistics) -> list[int]:
    """The matrices whose input was zero in all samples, or in all but a few of them."""
    if method.needs == "nothing":
        return []
    found = np.asarray(placement.automatic(_too_few, statistics))  # (batch,)
    return [int(i) for i in np.flatnonzero(found)]


@jax.jit
def _too_few(statistics: InputStatistics) -> Bool[Array, " batch"]:
    reached = statistics.reached
    # Where no sample is zero nothing chose among the matrices: all there is counts.
    few = (reached < _FEW) & (reached < statistics.samples)
    several = reached.shape[0] > 1
    return jnp.all(statistics.mean_square == 0, axis=1) | (few & several)


@functools.partial(jax.jit, static_argnames=("method", "pattern"))
def _solved(
    weight: Float[Array, "batch in out"],
    statistics: InputStatistics,
    i: jax.Array,
    kept: jax.Array,
    *,
    method: Method,
    pattern: Pattern,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Matrix i of a weight: pruned (1, in, out), its zeros, the damping used."""
    wide = weight[i].astype(np.float32)  # (in, out)
    hessian = None if statistics.hessian is None else statistics.hessian[i]
    square = statistics.mean_square[i]  # (in,)
    found = method.prune(Matrix(wide, square, hessian, kept, pattern))
    after = found.weight.astype(weight.dtype)
    zeros = jnp.sum(after == 0, dtype=np.uint32)
    return after[None], zeros, found.damping


def error(
    source: Input,
    value: jax.Array,
    before: Float[Array, "batch in out"],
    after: Float[Array, "batch in out"],
) -> float:
    """The relative squared error of a weight's output: |X (W - V)|^2 / |X W|^2."""
    # X is read from `value`, of one batch, of which the first 256 samples are taken; of
    # experts, whose rows lie one behind the other, as many all over it. 0 where the
    # output is zero anyway.
    found = placement.automatic(
        functools.partial(_error, source=source), value, before, after
    )
    return float(found)


@functools.partial(jax.jit, static_argnames="source")
def _error(
    value: jax.Array, before: jax.Array, after: jax.Array, *, source: Input
) -> jax.Array:
    x = source.read(value)
    apart = max(1, x.shape[1] // _SAMPLES) if x.shape[0] > 1 else 1
    x = x[:, ::apart][:, :_SAMPLES].astype(np.float32)  # (batch, samples, in)
    wide = before.astype(np.float32)
    lost = jnp.einsum("bsi,bio->bso", x, wide - after.astype(np.float32))
    whole = jnp.einsum("bsi,bio->bso", x, wide)  # (batch, samples, out)
    total = jnp.sum(jnp.square(whole))
    return jnp.sum(jnp.square(lost)) / jnp.where(total > 0, total, 1)
