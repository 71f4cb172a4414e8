"""Where a run's arrays live: a mesh named by a flag, and the axes that it splits.

"data" splits the batch and repeats the parameters, "fsdp" splits both, "model" splits
the matrices of the model between the devices that share a batch (Shoeybi et al.,
"Megatron-LM", 2019, arXiv 1909.08053): up-projections by output, down-projections by
input. An axis that does not divide evenly stays whole.
"""

import fnmatch
import math
from typing import Any

import jax
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxprune as jp
from jaxprune.arrays import meshes, per_device, tree

AXES = ("data", "fsdp", "model")
"""What a mesh may be made of."""

_BATCH = ("data", "fsdp")
_MODEL = {
    "token_embedding/embedding": 0,
    "embedding/embedding": 0,
    "qkv/kernel": 1,
    "qkv/bias": 0,
    **{f"attention/{part}/kernel": 1 for part in "qkv"},
    "out/kernel": 0,
    "gate_up/kernel": 1,
    "gate/kernel": 1,
    "up/kernel": 1,
    "up/bias": 0,
    "down/kernel": 0,
    "head/kernel": 1,
}
"""End of a leaf's name, a glob, to the axis that "model" splits; others stay whole."""


def make_mesh(text: str | None, batch_size: int) -> Mesh | None:
    """The mesh of a run, its axes in the order they were given; None for one device.

    Args:
      text: axes and sizes, "data=4,model=2"; None for one axis "data" over every device
        that the batch can be split over.
      batch_size: number of sequences in a batch.

    Raises:
      ValueError: the text names no such mesh, there are fewer devices, the batch cannot
        be split over it, or it leaves out devices of a run of several processes.

    Example:
      >>> make_mesh("data=1,model=1", batch_size=2) is None
      True
    """
    if text is None:
        # 1 always fits, so there is a greatest.
        fitting = [n for n in range(1, len(jax.devices()) + 1) if batch_size % n == 0]
        axes = {"data": max(fitting)}
    else:
        axes = meshes.parse_mesh(text, AXES)
    meshes.check_devices(axes)
    split = math.prod(axes.get(name, 1) for name in _BATCH)
    mesh = meshes.mesh_words(axes)
    if batch_size % split:
        raise ValueError(
            f"{mesh} splits a batch over {split} devices, got batch_size={batch_size}; "
            f"give a multiple of {split}, or other sizes"
        )
    return None if math.prod(axes.values()) == 1 else meshes.make_mesh(axes)


def shardings(params: Any, mesh: Mesh) -> Any:
    """Where each parameter lives: a tree like `params`, of `NamedSharding`.

    Raises:
      ValueError: an axis of the mesh that should split parameters divides none.
    """
    leaves = jp.tree.named_leaves(params)
    specs = [_spec(name, leaf.shape, mesh) for name, leaf in leaves.items()]
    used = {axis for spec in specs for axis in spec}
    for axis in mesh.axis_names:
        # "data" repeats the parameters.
        splits = axis == "data" or axis in used
        size = mesh.shape[axis]
        if not splits and size != 1:
            raise ValueError(
                f"the mesh's axis {axis}={size} must divide an axis of a parameter, "
                "got none that it does; give another size"
            )
    placed = [NamedSharding(mesh, spec) for spec in specs]
    return jax.tree.unflatten(jax.tree.structure(params), placed)


def _spec(name: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """By "model" on the axis its rule names; by "fsdp" on the longest that is left."""
    parts: list[str | None] = [None] * len(shape)
    for ending, axis in _MODEL.items():
        # With a slash in front, else "up/kernel" would be the end of "gate_up/kernel"
        # too.
        matches = fnmatch.fnmatchcase(f"/{name}", f"*/{ending}")
        if matches and _divides(mesh, "model", shape[axis]):
            parts[axis] = "model"
    free = [
        axis
        for axis, size in enumerate(shape)
        if parts[axis] is None and _divides(mesh, "fsdp", size)
    ]
    if free:
        # The longest free axis gives the largest, so the fewest, pieces to gather.
        parts[max(free, key=lambda axis: shape[axis])] = "fsdp"
    # JAX compares specs by value: ("model", None) is another one than ("model",).
    while parts and parts[-1] is None:
        parts.pop()
    return PartitionSpec(*parts)


def _divides(mesh: Mesh, axis: str, size: int) -> bool:
    return axis in mesh.shape and size > 0 and size % mesh.shape[axis] == 0


def state_shardings(optimizer: optax.GradientTransformation, params: Any) -> Any:
    """Where the leaves of an optimizer's state live, a tree of `NamedSharding`.

    Each as the parameter whose name is in its own and that has its shape; counters are
    repeated. `params` may be `jax.ShapeDtypeStruct`s with shardings.
    """
    named = jp.tree.named_leaves(params)
    longest = sorted(named, key=len, reverse=True)
    state = jax.eval_shape(optimizer.init, params)

    def place(where: str, leaf: Any) -> NamedSharding:
        for name in longest:
            if f"/{name}/" in f"/{where}/" and named[name].shape == leaf.shape:
                return named[name].sharding
        sharding = named[name].sharding  # without a mesh on one device
        return repeated(sharding.mesh) if hasattr(sharding, "mesh") else sharding

    places = [place(*pair) for pair in tree.pairs(state, lambda node: False)]
    return jax.tree.unflatten(jax.tree.structure(state), places)


def repeated(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def of_batch(mesh: Mesh) -> NamedSharding:
    """Split along the first axis by every axis of the mesh that splits batches."""
    names = tuple(name for name in mesh.axis_names if name in _BATCH)
    # One tuple for one axis of the array: the batch is split by all these mesh axes.
    return NamedSharding(mesh, PartitionSpec(names) if names else PartitionSpec())


def batch_size(at_least: int, mesh: Mesh | None) -> int:
    """The smallest size of a batch, no less than this, that splits evenly."""
    if mesh is None:
        return at_least
    split = math.prod(mesh.shape[name] for name in mesh.axis_names if name in _BATCH)
    return -(-at_least // split) * split  # rounded up


def put(tree: Any, placement: Any) -> Any:
    """Places arrays, over the devices of all processes too.

    `placement` is a sharding or a tree of them; arrays in the memory of one process
    must be the same on every process.
    """
    if jax.process_count() == 1:
        return jax.device_put(tree, placement)
    if isinstance(placement, NamedSharding):
        return jax.tree.map(lambda leaf: per_device.put(leaf, placement), tree)
    return jax.tree.map(per_device.put, tree, placement)
