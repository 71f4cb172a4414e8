"""Where arrays lie: results placed like the leaves they belong to, nothing gathered.

On a mesh with Explicit axes every reshape and contraction must say how its result is
sharded. A solver for any model cannot; `automatic` shows its arrays on the same devices
with Auto axes, which moves nothing, and the compiler decides.
"""

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from jaxprune.arrays import low_bit

T = TypeVar("T")


def divisible(matrix: jax.Array, *tiles: int) -> jax.Array:
    """Reshards so that no shard boundary cuts a tile; `tiles` has a length an axis."""
    # An axis whose tiles are cut hands its shards to another axis that can take them,
    # so that each device holds as much as before; where none can, the axis is gathered.
    # A mesh of Auto axes is not known under `jit`: there the compiler sees to it.
    traced = isinstance(matrix, jax.core.Tracer)
    sharding = jax.typeof(matrix).sharding if traced else matrix.sharding
    if not isinstance(sharding, NamedSharding):
        return matrix
    before = (*sharding.spec, *[None] * (matrix.ndim - len(sharding.spec)))
    # One tuple of mesh axes for each axis of the array.
    entries = [e if isinstance(e, tuple) else (e,) if e else () for e in before]
    spec = list(entries)

    def whole(axis: int, entry: tuple[Any, ...]) -> bool:
        return matrix.shape[axis] % (shards(sharding.mesh, entry) * tiles[axis]) == 0

    for axis, entry in enumerate(entries):
        if entry and not whole(axis, entry):
            spec[axis] = ()
            takers = (
                i for i, e in enumerate(spec) if i != axis and whole(i, e + entry)
            )
            if (taker := next(takers, None)) is not None:
                spec[taker] += entry
    if spec == entries:
        return matrix
    resharded = NamedSharding(sharding.mesh, PartitionSpec(*(e or None for e in spec)))
    return (jax.sharding.reshard if traced else jax.device_put)(matrix, resharded)


def zeros_like(leaf: Any, dtype: Any) -> jax.Array:
    """Zeros of an array's shape, or a stand-in's, placed like it on Auto meshes too."""
    if isinstance(leaf, jax.core.Tracer):
        return _never(leaf).astype(dtype)
    return jnp.zeros_like(leaf, dtype)


def counter(params: Any) -> jax.Array:
    """Zero, int32, on every device of the parameters' mesh if they are on one."""
    # Elsewhere the first step would move it there, and the second compile anew.
    zero = jnp.zeros((), jnp.int32)
    for leaf in jax.tree.leaves(params):
        traced = isinstance(leaf, jax.core.Tracer)
        sharding = None if traced else getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh):
            return jax.device_put(zero, NamedSharding(sharding.mesh, PartitionSpec()))
    return zero


def committed(tree: T) -> T:
    """The arrays of a tree; where all are on one device, each committed to it."""
    # Arrays from a checkpoint or a solver are committed to a device, fresh moments are
    # not. If one argument of a step is committed, all its results are committed, and
    # `jit` would compile the next step again.
    devices = {device for leaf in jax.tree.leaves(tree) for device in leaf.devices()}
    if len(devices) > 1:
        return tree
    return jax.tree.map(lambda leaf: jax.device_put(leaf, leaf.sharding), tree)


def placed(array: jax.Array, like: jax.Array) -> jax.Array:
    """The array with the sharding of another of its shape, in the memory it is in."""
    if not isinstance(like, jax.Array):  # NumPy's and stand-ins lie nowhere
        return array
    if not isinstance(array, jax.core.Tracer) and not isinstance(like, jax.core.Tracer):
        sharding, memory_kind = like.sharding, array.sharding.memory_kind
        # `device_put` would commit it; a step that takes what is committed and what is
        # not gives all committed, and the next step compiles once more.
        if not like.committed and array.sharding.device_set == sharding.device_set:
            return array
        return jax.device_put(
            array, sharding.with_memory_kind(memory_kind) if memory_kind else sharding
        )
    like = low_bit.on_device(like)
    like_sharding = jax.typeof(like).sharding
    if like_sharding.mesh.shape_tuple and jax.typeof(array).sharding != like_sharding:
        array = jax.sharding.reshard(array, like_sharding)
    return jnp.where(_never(like), jnp.zeros((), array.dtype), array)


def beside(array: jax.Array, like: jax.Array) -> jax.Array:
    """The array, placed like another of its shape where it is committed elsewhere."""
    if any(not is_concrete(x) for x in (array, like)) or not array.committed:
        return array
    return array if devices(array) == devices(like) else placed(array, like)


def masked(leaf: jax.Array, mask: jax.Array) -> jax.Array:
    """The leaf, zero where a mask in device memory is False; it stays in its memory."""
    space, on_device = jax.typeof(leaf).memory_space, low_bit.on_device(leaf)
    kept = jnp.where(mask, on_device, jnp.zeros((), leaf.dtype))
    return kept if on_device is leaf else jax.device_put(kept, space)


def devices(array: jax.Array) -> tuple[Any, ...]:
    """The devices of an array; arrays of one program have them in one order."""
    mesh = _mesh(array)
    if mesh is not None:
        return tuple(mesh.devices.flat)
    return tuple(sorted(array.sharding.device_set, key=lambda device: device.id))


def together(array: Any, like: Any) -> Any:
    """The array, moved where needed so that one program can take both it and `like`."""
    if is_concrete(like) and len(like.sharding.device_set) > 1:
        return placed(jnp.asarray(array), like)
    return beside(array, like)


def copied(array: Any, like: jax.Array) -> jax.Array:
    """A copy, placed like another, that is committed only if the other is."""
    if is_concrete(array) and is_concrete(like) and not like.committed:
        array = np.asarray(array)  # a step would compile anew for what is committed
    return placed(jnp.array(array, copy=True), like)


def is_concrete(leaf: Any) -> bool:
    """Whether it is an array with values, not one that `jit` traces."""
    return isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer)


def at_once(leaves: Sequence[Any]) -> contextlib.AbstractContextManager[None]:
    """A context that computes now, in `jit` too, unless one of the leaves is traced."""
    traced = any(isinstance(leaf, jax.core.Tracer) for leaf in leaves)
    if not traced and isinstance(jnp.zeros(()), jax.core.Tracer):
        return jax.ensure_compile_time_eval()
    return contextlib.nullcontext()


def varying(tree: Any, like: Sequence[Any]) -> Any:
    """The tree, inside of `shard_map`, as different on each device as these arrays."""

    def varied(x: Any) -> frozenset[Any]:
        return jax.typeof(x).manual_axis_type.varying

    def vary(x: jax.Array) -> jax.Array:
        missing = tuple(axes - varied(x))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    axes = frozenset().union(*map(varied, like))
    return jax.tree.map(vary, tree) if axes else tree


def _never(leaf: jax.Array) -> jax.Array:
    """False everywhere, for any value, and placed like the leaf.

    Under `jit` on Auto meshes a result that reads no parameter is replicated. XLA knows
    that no magnitude is under zero, but drops the comparison only after it has placed
    everything: the leaf's sharding stays, and nothing is computed. (Of bfloat16 some
    versions keep the comparison, which reads the leaf where it is.)
    """
    if jnp.issubdtype(leaf.dtype, jnp.signedinteger):
        return (leaf < 0) & (leaf > 0)  # the least integer has no magnitude
    return jnp.abs(leaf) < 0


def shards(mesh: Mesh | AbstractMesh, entry: Any) -> int:
    """How many shards an entry of a partition spec makes of its axis."""
    names = (entry,) if isinstance(entry, str) else (entry or ())
    return math.prod(mesh.shape[name] for name in names)


def automatic(function: Callable[..., T], *arguments: Any) -> T:
    """Calls a function of pytrees with arrays of Explicit meshes seen on Auto ones."""
    # The result is on the Auto mesh; `jax.device_put` onto an Explicit sharding of the
    # same devices moves nothing either.
    meshes = [mesh for leaf in jax.tree.leaves(arguments) if (mesh := _mesh(leaf))]
    ambient = jax.sharding.get_abstract_mesh()
    if not meshes or not (ambient.explicit_axes or any(map(_explicit, meshes))):
        return function(*arguments)
    mesh = meshes[0]
    kinds = (AxisType.Auto,) * len(mesh.axis_names)
    auto_mesh = Mesh(mesh.devices, mesh.axis_names, axis_types=kinds)

    def put(leaf: Any) -> Any:
        own_mesh = _mesh(leaf)
        if own_mesh is None or not _explicit(own_mesh):
            return leaf
        sharding = leaf.sharding
        auto_sharding = NamedSharding(
            auto_mesh, sharding.spec, memory_kind=sharding.memory_kind
        )
        return jax.device_put(leaf, auto_sharding)

    with jax.set_mesh(auto_mesh):
        return function(*jax.tree.map(put, arguments))


def _mesh(leaf: Any) -> Mesh | None:
    """The mesh that an array lies on, or None."""
    sharding = getattr(leaf, "sharding", None)
    mesh = sharding.mesh if isinstance(sharding, NamedSharding) else None
    return mesh if isinstance(mesh, Mesh) else None


def _explicit(mesh: Mesh) -> bool:
    return AxisType.Explicit in mesh.axis_types
