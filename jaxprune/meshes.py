"""Explicit meshes taken for Auto ones, where only the compiler can know the way.

On a mesh with Explicit axes every reshape and contraction must say how its result is
sharded. A solver for any model cannot; so its arrays are seen on the same devices with
Auto axes, which moves nothing, and the compiler decides.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jax.sharding import AxisType, Mesh, NamedSharding

T = TypeVar("T")


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
