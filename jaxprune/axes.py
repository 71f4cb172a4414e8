"""Any leaf seen as a batch of matrices (batch, in, out), and back.

Flax kernels are [in, out], so that is the default; further leading axes are a stack of
such matrices (a scan over layers, experts). A leaf of four axes or more is taken for a
convolution's [..., in, out], whose window belongs to the input.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from jaxprune import storage, tree


@dataclasses.dataclass(frozen=True)
class Axes:
    """Which axes of a leaf are its input and its output; the others are the batch.

    Attributes:
      inputs: the axes that the product sums over, negative numbers count from the end.
      outputs: the axes that index the result.

    Example:
      >>> import jaxprune as jp
      >>> jp.Axes(inputs=(-1,), outputs=(-2,))  # torch and Equinox: [out, in]
      Axes(inputs=(-1,), outputs=(-2,))
    """

    inputs: tuple[int, ...] = (-2,)
    outputs: tuple[int, ...] = (-1,)

    def order(self, ndim: int) -> tuple[int, ...]:
        """The permutation that brings batch, input and output axes together.

        Args:
          ndim: how many axes the leaf has.

        Returns:
          All axes, batch first, then inputs, then outputs.

        Raises:
          ValueError: an axis is out of range or named twice.
        """
        if problem := self.problem(ndim):
            raise ValueError(problem)
        own = [axis % ndim for axis in (*self.inputs, *self.outputs)]
        return (*(axis for axis in range(ndim) if axis not in own), *own)

    def problem(self, ndim: int) -> str | None:
        """Why a leaf of so many axes cannot be seen this way, or None if it can."""
        named = [*self.inputs, *self.outputs]
        if len({axis % ndim for axis in named if -ndim <= axis < ndim}) == len(named):
            return None
        return (
            f"{self} must name different axes of a leaf of {ndim} axes, or give "
            "axes={glob: Axes(inputs=..., outputs=...)}"
        )

    def matrix(self, leaf: jax.Array) -> jax.Array:
        """The leaf as (batch, in, out), each of the three possibly of size 1."""
        moved = jnp.transpose(leaf, self.order(leaf.ndim))
        batch = leaf.ndim - len(self.inputs) - len(self.outputs)
        inputs = batch + len(self.inputs)
        shape = moved.shape
        return moved.reshape(
            math.prod(shape[:batch]),
            math.prod(shape[batch:inputs]),
            math.prod(shape[inputs:]),
        )

    def restore(self, matrix: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """The leaf of this shape whose `matrix` is given."""
        order = self.order(len(shape))
        moved = matrix.reshape([shape[axis] for axis in order])
        return jnp.transpose(moved, sorted(range(len(order)), key=order.__getitem__))


def default(leaf: jax.Array) -> Axes:
    """The axes of a leaf of which nothing else is known: Flax's [..., in, out]."""
    return Axes(tuple(range(-leaf.ndim, -1))) if leaf.ndim >= 4 else Axes()


def resolve(
    axes: Axes | Mapping[str, Axes] | None,
    names: Sequence[str],
    leaves: Sequence[jax.Array],
) -> list[Axes]:
    """The axes of each leaf from one value, from rules by name, or by default.

    Args:
      axes: one `Axes` for all leaves, {glob on the path name: Axes} (the first match
        counts, unmatched leaves take the default), or None.
      names: the leaves' path names.
      leaves: the leaves.

    Returns:
      One `Axes` a leaf.

    Raises:
      ValueError: a rule matches nothing.
    """
    if isinstance(axes, Axes):
        return [axes] * len(leaves)
    ruled = tree.by_rule(axes or {}, names, None, "axes")
    return [rule or default(leaf) for rule, leaf in zip(ruled, leaves, strict=True)]


def divisible(matrix: jax.Array, *tiles: int) -> jax.Array:
    """The array with no shard boundary inside a tile, where its mesh is known.

    An axis whose tiles are cut hands its shards to another axis that can take them, so
    that each device holds as much as before; where none can, the axis is gathered. A
    mesh of Auto axes is not known under `jit`: there the compiler sees to it.

    Args:
      matrix: any array.
      *tiles: the tile's length along each axis.

    Returns:
      The same values.
    """
    sharding = _sharding(matrix)
    if not isinstance(sharding, NamedSharding):
        return matrix
    before = (*sharding.spec, *[None] * (matrix.ndim - len(sharding.spec)))
    own = [e if isinstance(e, tuple) else (e,) if e else () for e in before]
    spec = list(own)

    def whole(axis: int, entry: tuple[Any, ...]) -> bool:
        return matrix.shape[axis] % (shards(sharding.mesh, entry) * tiles[axis]) == 0

    for axis, entry in enumerate(own):
        if entry and not whole(axis, entry):
            spec[axis] = ()
            takers = (
                i for i, e in enumerate(spec) if i != axis and whole(i, e + entry)
            )
            if (taker := next(takers, None)) is not None:
                spec[taker] += entry
    if spec == own:
        return matrix
    wanted = NamedSharding(sharding.mesh, PartitionSpec(*(e or None for e in spec)))
    if isinstance(matrix, jax.core.Tracer):
        return jax.sharding.reshard(matrix, wanted)
    return jax.device_put(matrix, wanted)


def _sharding(array: jax.Array) -> Any:
    """Where an array is, as far as that is known."""
    traced = isinstance(array, jax.core.Tracer)
    return jax.typeof(array).sharding if traced else array.sharding


def zeros_like(leaf: Any, dtype: Any) -> jax.Array:
    """Zeros placed like the leaf, under `jit` on Auto meshes too.

    Args:
      leaf: an array, or `jax.ShapeDtypeStruct`.
      dtype: of the zeros.

    Returns:
      Zeros of the leaf's shape, whatever its values, NaN too.
    """
    if isinstance(leaf, jax.core.Tracer):
        return _never(leaf).astype(dtype)
    return jnp.zeros_like(leaf, dtype)


def placed(array: jax.Array, like: jax.Array) -> jax.Array:
    """The array with the sharding of another of its shape.

    Args:
      array: any array.
      like: an array of the same shape; what is no JAX array says nothing.

    Returns:
      The same values, in the memory they are in; eagerly the very array where nothing
      is to be moved.
    """
    if not isinstance(like, jax.Array):
        return array
    if not isinstance(array, jax.core.Tracer) and not isinstance(like, jax.core.Tracer):
        where, kind = like.sharding, array.sharding.memory_kind
        return jax.device_put(array, where.with_memory_kind(kind) if kind else where)
    like = storage.on_device(like)
    wanted = jax.typeof(like).sharding
    if wanted.mesh.shape_tuple and jax.typeof(array).sharding != wanted:
        array = jax.sharding.reshard(array, wanted)
    return jnp.where(_never(like), jnp.zeros((), array.dtype), array)


def _never(leaf: jax.Array) -> jax.Array:
    """False everywhere, for any value, and placed like the leaf.

    Under `jit` on Auto meshes a result that reads no parameter is replicated. XLA knows
    that no magnitude is under zero, but drops the comparison only after it has placed
    everything: the leaf's sharding stays, and nothing is computed. (Of bfloat16 some
    versions keep the comparison, which reads the leaf where it is.)
    """
    return jnp.abs(leaf) < 0


def shards(mesh: Mesh | AbstractMesh, entry: Any) -> int:
    """How many shards an entry of a partition spec makes of its axis."""
    names = (entry,) if isinstance(entry, str) else (entry or ())
    return math.prod(mesh.shape[name] for name in names)
