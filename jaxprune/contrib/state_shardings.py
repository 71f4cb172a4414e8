"""Where a whole optimizer state lives, from where the parameters live.

A state's leaf belongs to the parameter whose name its own path ends in. It gets that
parameter's sharding, or as much of it as its shape allows; counters and whatever
belongs to no parameter are replicated.
"""

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import optax
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from jaxprune.arrays import placement, tree
from jaxprune.arrays.messages import listed
from jaxprune.arrays.rules import Rule, check
from jaxprune.training.masked import wrapped_optimizer
from jaxprune.typing import Params

_Path = tuple[str, ...]
_Shape = tuple[int, ...]

# How many parts a leaf may add behind its parameter's name: the fields of a container
# that stands for one array, as `codes` of a quantised one.
_BEHIND = 2


def state_shardings(
    optimizer: optax.GradientTransformation | optax.MultiSteps, params: Params
) -> Any:
    """The shardings of an optimizer's whole state, for `out_shardings` of `jax.jit`.

    Under `jit` on a mesh of Auto axes, moments that start as zeros are replicated: each
    device then holds all of them. With these shardings they never are, neither at
    `init` nor after a step.

    A leaf of the parameter's shape is placed like the parameter. One with other axes
    keeps what can be kept: with axes in front (a history) or left out (a factored
    moment) the rest stays sharded; with other lengths (one number for each block of 32
    weights) an axis stays sharded where its shards are even. Of two readings that
    disagree, as for the factors of a square matrix, neither is taken.

    Args:
      optimizer: optax optimizer, of which only `init` is read, abstractly.
      params: parameters, or `jax.ShapeDtypeStruct`s with shardings; all on one
        mesh, or all on one device.

    Returns:
      A tree like `optimizer.init(params)` with a `NamedSharding` for each array, or the
      `SingleDeviceSharding` of parameters on one device; what `init` puts into host
      memory is placed there.

    Raises:
      ValueError: there are no parameters, or some have no sharding (NumPy arrays,
        abstract ones), or one that is neither of the two kinds.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import jaxprune as jp
      >>> mesh = jax.make_mesh((1,), ("data",))
      >>> rows = jax.NamedSharding(mesh, jax.P("data"))
      >>> params = {"w": jax.device_put(jnp.ones((4, 2)), rows)}
      >>> tx = optax.chain(optax.adamw(1e-3), jp.track_importance())
      >>> shardings = jp.contrib.state_shardings(tx, params)
      >>> state = jax.jit(tx.init, out_shardings=shardings)(params)
      >>> state[0][0].mu["w"].sharding == rows
      True
    """
    init = wrapped_optimizer(optimizer, "contrib.state_shardings", "parameters").init
    leaves = {
        _parts(name): leaf
        for name, leaf in tree.named_leaves(params).items()
        if not tree.is_excluded(leaf)
    }
    shardings = _param_shardings(leaves)
    shapes = {path: tuple(leaf.shape) for path, leaf in leaves.items()}
    replicated = _with_spec(next(iter(shardings.values())))

    def place(name: str, leaf: Any, aval: Any) -> Sharding:
        sharding = replicated
        for owner in _owners(_parts(name), shapes):
            if specs := _specs(tuple(leaf.shape), shapes[owner], shardings[owner]):
                sharding = _with_spec(shardings[owner], *specs)
                break
        on_host = aval.memory_space == jax.memory.Space.Host
        return sharding.with_memory_kind("pinned_host") if on_host else sharding

    # Stand-ins without a place: of a state only names, shapes and memories are read.
    bare = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    traced, state = jax.make_jaxpr(init, return_shape=True)(bare)
    avals = jax.tree.unflatten(jax.tree.structure(state), traced.out_avals)
    # By names as the parameters have them, without the keys of what wraps an array.
    named = tree.pairs(state, lambda node: False)
    placed = [
        place(name, leaf, aval)
        for (name, leaf), aval in zip(named, jax.tree.leaves(avals), strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(state), placed)


def _parts(name: str) -> _Path:
    return tuple(name.split("/")) if name else ()


def _param_shardings(leaves: Mapping[_Path, Any]) -> dict[_Path, Sharding]:
    """The parameters' shardings, or one error that names the leaves."""
    shardings = {path: getattr(leaf, "sharding", None) for path, leaf in leaves.items()}

    names = {"/".join(path): sharding for path, sharding in shardings.items()}
    meshes = [k for k, s in names.items() if isinstance(s, NamedSharding)]
    single = [k for k, s in names.items() if isinstance(s, SingleDeviceSharding)]
    neither = [k for k in names if k not in (*meshes, *single)]
    check(
        _SHARDINGS,
        shardings=shardings,
        neither=listed(neither),
        meshes=meshes,
        single=listed(single),
    )
    return {path: s for path, s in shardings.items() if s is not None}


def _owners(path: _Path, shapes: Mapping[_Path, _Shape]) -> Iterator[_Path]:
    """The parameters whose name the path ends in, the longest name first."""
    for end in range(len(path), max(len(path) - _BEHIND, 0) - 1, -1):
        for start in range(end + 1):
            if path[start:end] in shapes:
                yield path[start:end]


def _specs(
    shape: _Shape, param_shape: _Shape, sharding: Sharding
) -> set[PartitionSpec]:
    """The ways to place a leaf of this shape like a parameter of another."""
    if not isinstance(sharding, NamedSharding):
        return {PartitionSpec()}
    rank, extra = len(param_shape), len(shape) - len(param_shape)
    spec = (*sharding.spec, *[None] * (rank - len(sharding.spec)))
    if shape == param_shape:
        return {sharding.spec}
    if extra > 0:  # axes in front, as of a history
        return (
            {PartitionSpec(*[None] * extra, *spec)}
            if shape[extra:] == param_shape
            else set()
        )
    if extra < 0:  # axes left out, as of a factored moment: every choice that fits
        return {
            PartitionSpec(*(spec[axis] for axis in kept))
            for kept in itertools.combinations(range(rank), len(shape))
            if tuple(param_shape[axis] for axis in kept) == shape
        }
    # Other lengths: an axis stays split where its shards are even.
    counts = [placement.shards(sharding.mesh, entry) for entry in spec]
    even = [size % count == 0 for size, count in zip(shape, counts, strict=True)]
    return {
        PartitionSpec(*(e if ok else None for e, ok in zip(spec, even, strict=True)))
    }


def _with_spec(like: Sharding, *specs: PartitionSpec) -> Sharding:
    """A sharding of the same devices; replicated unless there is one spec."""
    if not isinstance(like, NamedSharding):
        return like
    spec = specs[0] if len(specs) == 1 else PartitionSpec()
    memory = like.memory_kind if specs else None
    return NamedSharding(like.mesh, spec, memory_kind=memory)


_SHARDINGS = [
    Rule(
        lambda v: len(v.shardings) > 0,
        "state_shardings needs at least one parameter, got an empty tree",
    ),
    Rule(
        lambda v: not v.neither,
        "state_shardings needs parameters on a mesh or on a device, but {neither} "
        "are on neither",
        "give arrays placed with jax.device_put(params, shardings), or "
        "jax.ShapeDtypeStruct(shape, dtype, sharding=...)",
    ),
    Rule(
        lambda v: not (v.meshes and v.single),
        "state_shardings needs all parameters on one mesh, but {single} are on a "
        "single device",
        "place them with jax.device_put(leaf, NamedSharding(mesh, PartitionSpec()))",
    ),
]
