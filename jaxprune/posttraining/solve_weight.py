"""The weights of a segment, pruned matrix by matrix.

With a mesh, matrices of one shape are pruned at the same time, each whole on one device
and by the program that a single device would run. A matrix split over devices would be
summed in another order by the solvers, and a mask may depend on the last bit.
"""

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxprune.arrays import placement
from jaxprune.arrays.per_device import PerDevice, in_groups
from jaxprune.graph.linear_ops import LinearOp
from jaxprune.posttraining import old_zeros
from jaxprune.posttraining.old_zeros import Pruned
from jaxprune.posttraining.passes.base import Matrix
from jaxprune.posttraining.passes.chaining import Chain
from jaxprune.posttraining.pipeline.input_statistics import InputStatistics
from jaxprune.posttraining.plan import Plan
from jaxprune.typing import Pattern

# An expert that was given fewer tokens is pruned by magnitude: so few say too little of
# its inputs.
_FEW = 16


class _Part(NamedTuple):
    """One matrix of a weight, by its number, and the passes that prune it."""

    op: LinearOp
    number: int
    kept: int
    chain: Chain


def solve_weights(
    plan: Plan,
    weights: Mapping[LinearOp, Float[Array, "batch in out"]],
    statistics: Mapping[str, InputStatistics],
    devices: PerDevice | None,
) -> list[tuple[Float[Array, "batch in out"], dict[str, Any]]]:
    """Prunes some weights, over devices where there are some; the bits are the same.

    Args:
      plan: what is done to which weight.
      weights: the weights; with devices, whole on every device.
      statistics: statistics of their inputs, by the weight's name.
      devices: devices that take a matrix each, or None.

    Returns:
      The new weights in their own dtypes, with devices whole on every device, and their
      rows of the report.

    Raises:
      ValueError: a Hessian could not be factorised.
    """
    chain = plan.chain.solver
    # By magnitude where too few samples reach the matrix, as for a rare expert.
    few = {op: _unreached(chain, statistics[op.name]) for op in weights}
    parts = [
        _Part(op, i, count, chain.by_magnitude if i in few[op] else chain)
        for op in weights
        for i, count in enumerate(plan.kept[op.name])
    ]
    # One device and a mesh stay two ways: what is sharded without a mesh is left to the
    # compiler, which a program for each device would gather first.
    solved: dict[tuple[LinearOp, int], Pruned]
    if devices is None:
        solved = {
            (part.op, part.number): _solve_alone(
                plan, part, weights[part.op], statistics[part.op.name]
            )
            for part in parts
        }
    else:
        solved = dict(_solve_spread(plan, parts, weights, statistics, devices))
    results = []
    for op in weights:
        matrices = [
            old_zeros.hold(plan, op, i, weights[op], solved[op, i])
            for i in range(len(plan.kept[op.name]))
        ]
        row = _row(plan, op, statistics[op.name], few[op], [m[1:] for m in matrices])
        new = [matrix for matrix, *_ in matrices]
        # A lone matrix is not copied.
        results.append((new[0] if len(new) == 1 else jnp.concatenate(new), row))
    return results


def _solve_alone(
    plan: Plan,
    part: _Part,
    weight: Float[Array, "batch in out"],
    statistics: InputStatistics,
) -> Pruned:
    """One matrix, where it lies."""
    if _is_corrected(part.chain, statistics):
        correct = functools.partial(_target, chain=part.chain)
        moments = statistics.hessian, statistics.drift
        weight, dtype = placement.automatic(correct, weight, *moments), weight.dtype
    else:
        dtype = weight.dtype
    program = functools.partial(
        _solved, dtype=dtype, chain=part.chain, pattern=plan.pattern
    )
    return placement.automatic(
        program,
        weight,
        statistics._replace(drift=None),
        np.int32(part.number),
        np.uint32(part.kept),
    )


def _solve_spread(
    plan: Plan,
    parts: Sequence[_Part],
    weights: Mapping[LinearOp, jax.Array],
    statistics: Mapping[str, InputStatistics],
    devices: PerDevice,
) -> Iterator[tuple[tuple[LinearOp, int], Pruned]]:
    """All matrices, those of one shape and one input at the same time."""
    ids = [id(statistics[op.name]) for op in weights]

    def program_key(part: _Part) -> Any:
        weight, shared = weights[part.op], id(statistics[part.op.name])
        # By place, since addresses differ from process to process.
        place = ids.index(shared)
        return weight.shape[1:], str(weight.dtype), repr(part.chain), place

    for _, group in itertools.groupby(sorted(parts, key=program_key), program_key):
        for batch in in_groups(group, devices.count):
            new = _side_by_side(plan, batch, weights, statistics, devices)
            for part, matrix in zip(batch, new, strict=True):
                yield (part.op, part.number), matrix


def _side_by_side(
    plan: Plan,
    parts: Sequence[_Part],
    weights: Mapping[LinearOp, jax.Array],
    statistics: Mapping[str, InputStatistics],
    devices: PerDevice,
) -> list[Pruned]:
    """Matrices of one shape and one input, at most one a device."""
    filled = [*parts, *[parts[-1]] * (devices.count - len(parts))]
    moments = statistics[parts[0].op.name]
    experts = len(moments.reached) > 1  # each with statistics of its own
    take = _taking(devices, experts)
    places, first = {}, 0  # of each weight's first matrix among those of all of them
    for op in dict.fromkeys(part.op for part in parts):
        places[op], first = first, first + op.shape[0]
    rows = np.array([places[part.op] + part.number for part in filled], np.int32)
    numbers = np.array([part.number for part in filled], np.int32)
    stack, moments = take([weights[op] for op in places], moments, rows, numbers)
    counts = devices.stacked([np.uint32(part.kept) for part in filled])
    chain, dtype = parts[0].chain, stack.dtype
    if _is_corrected(chain, moments):
        stack = _correcting(devices, chain)(stack, moments.hessian, moments.drift)
    pattern: Any = plan.pattern  # a frozen value, as every pattern is
    program = _solving(devices, chain, pattern, dtype, experts)
    solved = program(stack, moments._replace(drift=None), counts)
    after, zeros, damping = devices.first(solved, len(parts))
    return list(zip(after, zeros, damping, strict=True))


@functools.lru_cache(64)
def _taking(devices: PerDevice, experts: bool) -> Any:
    """A program that gives each device its matrix and, of experts, its statistics."""

    def take(
        weights: Any, statistics: InputStatistics, places: jax.Array, numbers: jax.Array
    ) -> Any:
        stack = jnp.concatenate(weights)[places]  # (devices, in, out)
        if not experts:
            return stack, statistics
        rows = jax.tree.map(lambda x: x[numbers] if x.ndim else x, statistics)
        samples = jnp.broadcast_to(statistics.samples, numbers.shape)
        return stack, rows._replace(samples=samples)

    placed = devices.split if experts else devices.whole
    return jax.jit(take, out_shardings=(devices.split, placed))


@functools.lru_cache(64)
def _solving(
    devices: PerDevice, chain: Chain, pattern: Pattern, dtype: Any, experts: bool
) -> Any:
    """A program by which each device prunes the matrix that it has."""

    def batched(statistics: InputStatistics) -> InputStatistics:
        rows = jax.tree.map(lambda x: x[None], statistics)
        return rows._replace(samples=statistics.samples)

    def solve(weight: jax.Array, statistics: InputStatistics, kept: jax.Array) -> Any:
        return _solved(
            weight[None],
            batched(statistics) if experts else statistics,
            np.int32(0),
            kept,
            dtype=dtype,
            chain=chain,
            pattern=pattern,
        )

    return devices.compiled(solve, (True, experts, True))


@functools.lru_cache(64)
def _correcting(devices: PerDevice, chain: Chain) -> Any:
    """A program by which each device corrects the matrix that it has."""

    def correct(*arrays: jax.Array) -> jax.Array:
        weight, hessian, drift = arrays
        return _target(weight[None], hessian, drift, chain=chain)[0]

    return devices.compiled(correct, (True, False, False))


def _is_corrected(chain: Chain, statistics: InputStatistics) -> bool:
    """Whether a matrix makes up for those before it."""
    return statistics.drift is not None and "drift" in chain.observes


def _row(
    plan: Plan,
    op: LinearOp,
    statistics: InputStatistics,
    unreached: list[int],
    matrices: Sequence[tuple[Any, Any]],
) -> dict[str, Any]:
    """A weight's row of the report, of each matrix' zeros and damping."""
    damping = [float(used) for _, used in matrices]
    for used in damping:
        check_factorised(op.name, used, also=", or use the method wanda")
    row = {
        "name": op.name,
        "shape": list(op.shape),
        "removed": plan.removed[op.name],
        "zeros": sum(int(zeros) for zeros, _ in matrices),
        "size": op.size,
        "damping": max(damping),
        "by_magnitude": unreached,
    }
    if plan.chain.reads_inputs and len(statistics.reached) > 1:
        row["samples"] = [int(n) for n in np.asarray(statistics.reached)]
    return row


def check_factorised(name: str, damping: float, *, also: str = "") -> None:
    """Refuses a damping that is infinite, as it is where none helped."""
    if not np.isfinite(damping):
        raise ValueError(
            f"the Hessian of '{name}' must be positive definite, but could not be "
            "factorised with any damping; give more or other calibration batches, run "
            f"the model in float32{also}"
        )


def _unreached(chain: Chain, statistics: InputStatistics) -> list[int]:
    """The matrices whose input was zero in all samples, or in all but a few of them."""
    if not chain.reads_inputs:
        return []
    few = np.asarray(placement.automatic(_too_few, statistics))  # (batch,)
    return [int(i) for i in np.flatnonzero(few)]


@jax.jit
def _too_few(statistics: InputStatistics) -> Bool[Array, " batch"]:
    reached = statistics.reached
    # Where all samples reach a matrix there is no router, and few samples are accepted.
    few = (reached < _FEW) & (reached < statistics.samples)
    several = reached.shape[0] > 1
    return jnp.all(statistics.mean_square == 0, axis=1) | (few & several)


# A program of its own: as a part of the solver's it would change the last bits of what
# that computes, and not the same way on every mesh.
@functools.partial(jax.jit, static_argnames="chain")
def _target(
    weight: Float[Array, "1 in out"],
    hessian: Float[Array, "1 in in"],
    drift: Float[Array, "1 in in"],
    *,
    chain: Chain,
) -> Float[Array, "1 in out"]:
    """A weight, corrected; float32."""
    wide = weight[0].astype(np.float32)
    return chain.target(wide, hessian[0], drift[0], chain.pruning.damping)[None]


@functools.partial(jax.jit, static_argnames=("dtype", "chain", "pattern"))
def _solved(
    weight: Float[Array, "batch in out"],
    statistics: InputStatistics,
    i: jax.Array,
    kept: jax.Array,
    *,
    dtype: Any,
    chain: Chain,
    pattern: Pattern,
) -> Pruned:
    """Matrix i of a weight: pruned (1, in, out), its zeros, the damping used."""
    wide = weight[i].astype(np.float32)  # (in, out)
    hessian = None if statistics.hessian is None else statistics.hessian[i]
    square = statistics.mean_square[i]  # (in,)
    matrix = Matrix(wide, square, hessian, kept, pattern, chain.quantization)
    solution = chain.solve(matrix)
    after = solution.weight.astype(dtype)
    if np.dtype(dtype).itemsize > 4:  # what a pass leaves alone keeps its digits
        same = solution.mask & (solution.weight == wide)
        after = jnp.where(same, weight[i], after)
    zeros = jnp.sum(after == 0, dtype=np.uint32)
    return after[None], zeros, solution.damping
