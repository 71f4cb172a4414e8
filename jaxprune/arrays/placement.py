"""Where arrays lie: results placed like the leaves they belong to, nothing gathered.

On a mesh with Explicit axes every reshape and contraction must say how its result is
sharded. A solver for any model cannot; `automatic` shows its arrays on the same devices
with Auto axes, which moves nothing, and the compiler decides.
"""

import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from jaxprune.arrays import low_bit

T = TypeVar("T")


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
    like = low_bit.on_device(like)
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


def automatic(function: Callable[..., T], *arguments: Any) -> T:
    """Calls a function with arrays of Explicit meshes seen on Auto ones.

    Args:
      function: of arrays, or of pytrees of them.
      *arguments: what it is called with.

    Returns:
      What it returns, on the Auto mesh; `jax.device_put` onto an Explicit sharding of
      the same devices moves nothing either.
    """
    meshes = [mesh for leaf in jax.tree.leaves(arguments) if (mesh := _mesh(leaf))]
    ambient = jax.sharding.get_abstract_mesh()
    if not meshes or not (ambient.explicit_axes or any(map(_explicit, meshes))):
        return function(*arguments)
    mesh = meshes[0]
    kinds = (AxisType.Auto,) * len(mesh.axis_names)
    seen = Mesh(mesh.devices, mesh.axis_names, axis_types=kinds)

    def put(leaf: Any) -> Any:
        own_mesh = _mesh(leaf)
        if own_mesh is None or not _explicit(own_mesh):
            return leaf
        where = leaf.sharding
        own = NamedSharding(seen, where.spec, memory_kind=where.memory_kind)
        return jax.device_put(leaf, own)

    with jax.set_mesh(seen):
        return function(*jax.tree.map(put, arguments))


def _mesh(leaf: Any) -> Mesh | None:
    """The mesh that an array lies on, or None."""
    sharding = getattr(leaf, "sharding", None)
    mesh = sharding.mesh if isinstance(sharding, NamedSharding) else None
    return mesh if isinstance(mesh, Mesh) else None


def _explicit(mesh: Mesh) -> bool:
    return AxisType.Explicit in mesh.axis_types
