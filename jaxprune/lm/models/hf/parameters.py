"""Parameters of a model from the tensors of a directory, and back.

A weight is read from the mapped file straight to its sharding, one leaf at a time, so
memory holds the model and one leaf. Kernels of torch are `[out, in]`, ours `[in, out]`;
a `Source` keeps which tensor a leaf came from and how it is stored there.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxprune.arrays import tree
from jaxprune.arrays.lazy import LazyArray
from jaxprune.arrays.messages import listed
from jaxprune.lm.checkpoints.checkpoint_dir import CheckpointDir
from jaxprune.lm.models.hf.tensor_names import Source

Dtype = Literal["float32", "bfloat16"]
Shardings = Callable[[str, tuple[int, ...]], jax.sharding.Sharding]

# Bytes of a file that are mapped at a time; its pages can be dropped after.
_BLOCK = 2**26


def check_options(
    dtype: str | None,
    compute: str | None,
    shardings: Shardings | None,
    mesh: jax.sharding.Mesh | None,
) -> None:
    """Refuses arguments of `load` that are not supported, or exclude each other."""
    for name, value in (("dtype", dtype), ("compute_dtype", compute)):
        if value not in (None, "float32", "bfloat16"):
            raise ValueError(
                f"load needs {name} to be float32, bfloat16 or None, got {value!r}"
            )
    if shardings is not None and mesh is not None:
        raise ValueError("load takes shardings or a mesh, got both; leave one out")


def leaf_shapes(model: nnx.Module) -> dict[str, tuple[int, ...]]:
    """Leaf name to shape of a model's parameters, abstract or not."""
    leaves = tree.named_leaves(nnx.state(model, nnx.Param))
    return {name: leaf.shape for name, leaf in leaves.items()}


def with_leaves(model: Any, leaves: list[LazyArray], *, lazy: bool) -> Any:
    """An abstract model with these parameters, read or still in their files."""
    graphdef, state = nnx.split(model, nnx.Param)
    arrays = leaves if lazy else [leaf.read() for leaf in leaves]
    return nnx.merge(graphdef, jax.tree.unflatten(jax.tree.structure(state), arrays))


def to_tensors(
    names: Mapping[str, Source], params: Any
) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of a directory from the parameters of the model it was loaded to.

    Each comes as it was stored: transposed back and in its dtype, so a leaf that nobody
    changed has the bits of the file. One leaf is on the host at a time.

    Args:
      names: tensor that each leaf came from, as `load` returned it.
      params: parameters with the leaves of `names`, of whatever containers.

    Yields:
      Name and array of every tensor that was read, and of its copies.

    Raises:
      ValueError: the leaves are not those of `names`.
    """
    leaves = tree.named_leaves(params)
    if differ := sorted(leaves.keys() ^ names.keys()):
        raise ValueError(
            f"to_tensors needs the parameters of the model that `names` came with, but "
            f"{listed(differ)} are in one of the two only"
        )
    for leaf, source in names.items():
        array = jax.device_get(leaves[leaf])  # one leaf on the host
        for i, name in enumerate((*source.names, *source.copies)):
            yield name, np.array(source.stored(array, i), source.dtype, order="C")


def common_dtype(directory: CheckpointDir, names: Mapping[str, Source]) -> Dtype:
    """The compute dtype of a directory: bfloat16 where most weights are in it."""
    sizes: Counter[str] = Counter()  # dtype to number of weights
    for source in names.values():
        weights = sum(math.prod(directory.tensors[name].shape) for name in source.names)
        sizes[source.dtype.name] += weights
    return "bfloat16" if sizes.most_common(1)[0][0] == "bfloat16" else "float32"


def stored_leaf(
    directory: CheckpointDir,
    source: Source,
    shape: tuple[int, ...],
    dtype: Dtype | None,
    sharding: jax.sharding.Sharding,
) -> LazyArray:
    """A leaf in its file; when it is read, each device reads its own part of that."""
    leaf_dtype = read_dtype(source, dtype)

    def part(index: Any) -> np.ndarray:
        return _read_part(directory, source, index, leaf_dtype)

    def read() -> jax.Array:
        return jax.make_array_from_callback(shape, sharding, part, dtype=leaf_dtype)

    return LazyArray(shape, leaf_dtype, read, sharding)


def read_dtype(source: Source, dtype: Dtype | None) -> np.dtype:
    """The dtype that a leaf is read to."""
    stored = source.dtype.name
    return np.dtype(jnp.dtype(dtype or ("float32" if stored == "float64" else stored)))


def _read_part(
    directory: CheckpointDir, source: Source, index: tuple[slice, ...], dtype: np.dtype
) -> np.ndarray:
    """A copy of a part of a leaf, made block by block so that few pages are in use."""
    if source.experts:
        alone = source._replace(experts=0)
        return np.stack(
            [
                _read_part(directory, alone._replace(name=name), index[1:], dtype)
                for name in source.names[index[0]]
            ]
        )
    stored = directory.tensors[source.name]
    index = index[::-1] if source.transposed else index  # of the tensor's axes
    rows, *others = (
        range(*cut.indices(size)) for cut, size in zip(index, stored.shape, strict=True)
    )
    shape = (len(rows), *map(len, others))
    part = _aligned(shape[::-1] if source.transposed else shape, dtype)
    target = part.T if source.transposed else part  # a view with the tensor's axes
    step = max(1, _BLOCK * stored.shape[0] // max(1, stored.size))
    # A compact file decodes the whole tensor, however little of it is looked at.
    decoded = None if directory.is_mapped else directory.read(source.name)
    # The pages of a block can be dropped before the next is mapped.
    for first in range(0, len(rows), step):
        block = rows[first : first + step]
        whole = directory.read(source.name) if decoded is None else decoded
        view = whole[block.start : block.stop]
        target[first : first + step] = view[(slice(None), *index[1:])]
    return part


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An empty array that XLA's CPU backend takes as it is: it copies others."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64  # it wants memory from a multiple of 64 on
    return raw[start : start + size].view(dtype).reshape(shape)


def on_one_device(name: str, shape: tuple[int, ...]) -> jax.sharding.Sharding:
    """The sharding of a leaf that nothing splits: the default device."""
    return jnp.zeros(()).sharding


def split_over(mesh: jax.sharding.Mesh, axes: Sequence[str] | None = None) -> Shardings:
    """Splits the longest axis of a leaf that the devices divide, if any.

    Args:
      mesh: mesh of the devices.
      axes: names of the axes of the mesh that split, all of them if left out; others
        repeat.

    Returns:
      The sharding of a leaf, by its name and shape.
    """
    names = tuple(n for n in mesh.axis_names if axes is None or n in axes)
    count = math.prod(mesh.shape[name] for name in names)

    def sharding(name: str, shape: tuple[int, ...]) -> jax.sharding.Sharding:
        fitting = [i for i, size in enumerate(shape) if size % count == 0]
        spec: list[tuple[str, ...] | None] = [None] * len(shape)  # no axis is split
        if fitting and names:
            spec[max(fitting, key=lambda i: shape[i])] = names
        return jax.sharding.NamedSharding(mesh, jax.P(*spec))

    return sharding
