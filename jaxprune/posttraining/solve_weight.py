"""One weight of the model, pruned expert by expert, and what that costs its output.

With a mesh, matrices of one shape are pruned at the same time, each whole on one device
and by the program that a single device would run. A matrix split over devices would be
summed in another order by the solvers, and a mask may depend on the last bit.
"""

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxprune.arrays import grouped_rows, placement
from jaxprune.arrays.per_device import PerDevice, in_groups
from jaxprune.graph.linear_ops import LinearOp
from jaxprune.graph.operands import Input
from jaxprune.posttraining import methods
from jaxprune.posttraining.input_statistics import InputStatistics
from jaxprune.posttraining.methods import Magnitude, Matrix, Method, pruned
from jaxprune.posttraining.plan import Plan
from jaxprune.posttraining.solvers.dense_target import corrected
from jaxprune.posttraining.solvers.rounding import Rounding
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
    found = []
    unreached = _unreached(plan.method, statistics)
    for i, count in enumerate(plan.kept[op.name]):
        # By magnitude where too few samples reach the matrix, as for a rare expert.
        method = Magnitude() if i in unreached else plan.method
        how = {"pattern": plan.pattern, "rounding": plan.rounding}
        program = functools.partial(_solved, dtype=weight.dtype, method=method, **how)
        own = weight
        if _is_corrected(method, statistics):
            correct = functools.partial(_target, method=method)
            two = statistics.hessian, statistics.drift
            own = placement.automatic(correct, weight, *two)
        of_own = statistics._replace(drift=None)
        found.append(
            placement.automatic(program, own, of_own, np.int32(i), np.uint32(count))
        )
    after = found[0][0] if len(found) == 1 else jnp.concatenate([f[0] for f in found])
    return after, _row(plan, op, statistics, unreached, [f[1:] for f in found])


class _Matrix(NamedTuple):
    """One matrix of a weight, by its number, and how it is pruned."""

    op: LinearOp
    number: int
    kept: int
    method: Any


def solve_together(
    plan: Plan,
    weights: Mapping[LinearOp, Float[Array, "batch in out"]],
    statistics: Mapping[str, InputStatistics],
    devices: PerDevice,
) -> list[tuple[Float[Array, "batch in out"], dict[str, Any]]]:
    """Prunes some weights over devices: for each what `solve` gives.

    Args:
      plan: what is done to which weight.
      weights: whole on every device.
      statistics: by the weight's name.
      devices: each takes a matrix.

    Returns:
      The new weights, whole on every device, and their rows.
    """
    unreached = {op: _unreached(plan.method, statistics[op.name]) for op in weights}
    matrices = [
        _Matrix(op, i, count, Magnitude() if i in unreached[op] else plan.method)
        for op in weights
        for i, count in enumerate(plan.kept[op.name])
    ]
    found: dict[tuple[LinearOp, int], Any] = {}
    ids = [id(statistics[op.name]) for op in weights]

    def kind(matrix: _Matrix) -> Any:
        weight, own = weights[matrix.op], id(statistics[matrix.op.name])
        # By place, since addresses differ from process to process.
        place = ids.index(own)
        return weight.shape[1:], str(weight.dtype), repr(matrix.method), place

    for _, group in itertools.groupby(sorted(matrices, key=kind), kind):
        for part in in_groups(group, devices.count):
            new = _side_by_side(plan, part, weights, statistics, devices)
            found |= {(m.op, m.number): own for m, own in zip(part, new, strict=True)}
    results = []
    for op in weights:
        own = [found[op, i] for i in range(len(plan.kept[op.name]))]
        facts = [f[1:] for f in own]
        row = _row(plan, op, statistics[op.name], unreached[op], facts)
        results.append((jnp.stack([f[0] for f in own]), row))
    return results


def _side_by_side(
    plan: Plan,
    matrices: Sequence[_Matrix],
    weights: Mapping[LinearOp, jax.Array],
    statistics: Mapping[str, InputStatistics],
    devices: PerDevice,
) -> list[tuple[jax.Array, jax.Array, jax.Array]]:
    """Matrices of one kind, at most one a device: the new ones, zeros and dampings."""
    filled = [*matrices, *[matrices[-1]] * (devices.count - len(matrices))]
    own = statistics[matrices[0].op.name]
    apart = len(own.reached) > 1  # experts, each with statistics of its own
    take = _taking(devices, apart)
    places, first = {}, 0  # of each weight's first matrix among those of all of them
    for op in dict.fromkeys(m.op for m in matrices):
        places[op], first = first, first + op.shape[0]
    rows = np.array([places[m.op] + m.number for m in filled], np.int32)
    numbers = np.array([m.number for m in filled], np.int32)
    stack, own = take([weights[op] for op in places], own, rows, numbers)
    counts = devices.stacked([np.uint32(m.kept) for m in filled])
    method, dtype = matrices[0].method, stack.dtype
    if _is_corrected(method, own):
        stack = _correcting(devices, method)(stack, own.hessian, own.drift)
    own = own._replace(drift=None)
    how: Any = method, plan.pattern, plan.rounding, dtype  # frozen values
    program = _solving(devices, *how, apart)
    after, zeros, damping = devices.first(program(stack, own, counts), len(matrices))
    return list(zip(after, zeros, damping, strict=True))


@functools.lru_cache(64)
def _taking(devices: PerDevice, apart: bool) -> Any:
    """A program that gives each device its matrix and, of experts, its statistics."""

    def take(
        weights: Any, statistics: InputStatistics, places: jax.Array, numbers: jax.Array
    ) -> Any:
        stack = jnp.concatenate(weights)[places]  # (devices, in, out)
        if not apart:
            return stack, statistics
        each = jax.tree.map(lambda x: x[numbers] if x.ndim else x, statistics)
        samples = jnp.broadcast_to(statistics.samples, numbers.shape)
        return stack, each._replace(samples=samples)

    placed = devices.split if apart else devices.whole
    return jax.jit(take, out_shardings=(devices.split, placed))


@functools.lru_cache(64)
def _solving(
    devices: PerDevice,
    method: Method,
    pattern: Pattern,
    rounding: Rounding | None,
    dtype: Any,
    apart: bool,
) -> Any:
    """A program by which each device prunes the matrix that it has."""

    def alone(statistics: InputStatistics) -> InputStatistics:
        own = jax.tree.map(lambda x: x[None], statistics)
        return own._replace(samples=statistics.samples)

    def solve(weight: jax.Array, statistics: InputStatistics, kept: jax.Array) -> Any:
        after, *rest = _solved(
            weight[None],
            alone(statistics) if apart else statistics,
            np.int32(0),
            kept,
            dtype=dtype,
            method=method,
            pattern=pattern,
            rounding=rounding,
        )
        return after[0], *rest

    return devices.compiled(solve, (True, apart, True))


@functools.lru_cache(64)
def _correcting(devices: PerDevice, method: Method) -> Any:
    """A program by which each device corrects the matrix that it has."""

    def correct(*arrays: jax.Array) -> jax.Array:
        weight, hessian, drift = arrays
        return _target(weight[None], hessian, drift, method=method)[0]

    return devices.compiled(correct, (True, False, False))


def _is_corrected(method: Method, statistics: InputStatistics) -> bool:
    """Whether a matrix makes up for those before it."""
    return statistics.drift is not None and methods.correction(method) > 0


def _row(
    plan: Plan,
    op: LinearOp,
    statistics: InputStatistics,
    unreached: list[int],
    found: Sequence[tuple[Any, Any]],
) -> dict[str, Any]:
    """A weight's row of the report, of each matrix' zeros and damping."""
    damping = [float(own) for _, own in found]
    if not np.isfinite(damping).all():
        raise ValueError(
            f"the Hessian of '{op.name}' must be positive definite, but could not "
            "be factorised with any damping; give more or other calibration batches, "
            "run the model in float32, or use the method wanda"
        )
    return {
        "name": op.name,
        "shape": list(op.shape),
        "removed": plan.removed[op.name],
        "zeros": sum(int(zeros) for zeros, _ in found),
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
    # Where all samples reach a matrix there is no router, and few samples are accepted.
    few = (reached < _FEW) & (reached < statistics.samples)
    several = reached.shape[0] > 1
    return jnp.all(statistics.mean_square == 0, axis=1) | (few & several)


# A program of its own: as a part of the solver's it would change the last bits of what
# that computes, and not the same way on every mesh.
@functools.partial(jax.jit, static_argnames="method")
def _target(
    weight: Float[Array, "1 in out"],
    hessian: Float[Array, "1 in in"],
    drift: Float[Array, "1 in in"],
    *,
    method: Method,
) -> Float[Array, "1 in out"]:
    """A weight, corrected; float32."""
    share, damping = methods.correction(method), methods.damping(method)
    wide = weight[0].astype(np.float32)
    return corrected(wide, hessian[0], drift[0], share=share, damping=damping)[None]


@functools.partial(jax.jit, static_argnames=("dtype", "method", "pattern", "rounding"))
def _solved(
    weight: Float[Array, "batch in out"],
    statistics: InputStatistics,
    i: jax.Array,
    kept: jax.Array,
    *,
    dtype: Any,
    method: Method,
    pattern: Pattern,
    rounding: Rounding | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Matrix i of a weight: pruned (1, in, out), its zeros, the damping used."""
    wide = weight[i].astype(np.float32)  # (in, out)
    hessian = None if statistics.hessian is None else statistics.hessian[i]
    square = statistics.mean_square[i]  # (in,)
    found = pruned(method, Matrix(wide, square, hessian, kept, pattern, rounding))
    after = found.weight.astype(dtype)
    if np.dtype(dtype).itemsize > 4:  # what a method leaves alone keeps its digits
        same = found.mask & (found.weight == wide)
        after = jnp.where(same, weight[i], after)
    zeros = jnp.sum(after == 0, dtype=np.uint32)
    return after[None], zeros, found.damping


def error(
    source: Input,
    value: Any,
    before: Float[Array, "batch in out"],
    after: Float[Array, "batch in out"],
    dense: Any = None,
    positions: Bool[Array, "..."] | None = None,
) -> float:
    """The relative squared error of a weight's output: |X (W - V)|^2 / |X W|^2.

    Args:
      source: how X is read.
      value: what X is read from, for one batch. The first 256 samples are used; for a
        weight of several matrices, such as experts, up to 256 at equal steps.
      before: W.
      after: V.
      dense: what the dense model's input D is read from, or None. Where D is given and
        the weight is one matrix, the error is |D W - X V|^2 / |D W|^2.
      positions: which samples count, None for all; the others are not measured.

    Returns:
      The error; 0 where the output is zero anyway.
    """
    found = placement.automatic(
        functools.partial(_error, source=source),
        value,
        before,
        after,
        dense,
        positions,
    )
    return float(found)


@functools.partial(jax.jit, static_argnames="source")
def _error(
    value: Any,
    before: jax.Array,
    after: jax.Array,
    dense: Any,
    positions: Any,
    *,
    source: Input,
) -> jax.Array:
    wide, left = before.astype(np.float32), after.astype(np.float32)
    if dense is None or source.grouped or source.shape[0] > 1:
        lost = _outputs(value, wide - left, source, positions)
        whole = _outputs(value, wide, source, positions)
    else:
        whole = _outputs(dense, wide, source, positions)
        lost = whole - _outputs(value, left, source, positions)
    total = jnp.sum(jnp.square(whole))
    return jnp.sum(jnp.square(lost)) / jnp.where(total > 0, total, 1)


def _outputs(
    value: Any, weight: Float[Array, "batch in out"], source: Input, positions: Any
) -> Any:
    """The outputs (batch, samples, out) for some samples; of experts (samples, out)."""
    x = source.read(value)
    if positions is not None:  # first those that count; the others, zero, are behind
        counts = jnp.ravel(positions)
        x = jnp.where(counts[None, :, None], x, jnp.zeros((), x.dtype))
        x = jnp.take(x, jnp.argsort(~counts, stable=True), axis=1)
    apart = max(1, x.shape[1] // _SAMPLES) if source.shape[0] > 1 else 1
    x = x[:, ::apart][:, :_SAMPLES].astype(np.float32)  # (batch, samples, in)
    if not source.grouped:
        return jnp.einsum("bsi,bio->bso", x, weight)
    of_rows = grouped_rows.of_rows(source.shape[1], value[1])[::apart][:_SAMPLES]
    sizes = jnp.bincount(of_rows, length=source.shape[0])
    return grouped_rows.dot(x[0], weight, sizes)
