"""A packed matrix whose rows are split over the devices of a mesh.

Each device has its own rows: their bits, their values, and where each begins among
those. A product is computed where the rows are, so that no packed array moves; what
moves are vectors.
"""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxprune.sparse import encodings, expansion
from jaxprune.sparse.encodings import WORD
from jaxprune.sparse.matmul import matmul
from jaxprune.sparse.packed_matrix import PackedMatrix


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SplitMatrix:
    """A matrix (out, in), packed, its rows split over devices.

    Attributes:
      parts: packed rows of each device; its arrays have an axis of devices in front,
        which is split, and its shape is that of one part.
      shape: shape of the matrix (static).
      kept: number of weights that are stored (static).
      mesh: mesh of the devices (static).
      axes: names of the axes of the mesh that split (static).
    """

    parts: PackedMatrix
    shape: tuple[int, int] = dataclasses.field(metadata={"static": True})
    kept: int = dataclasses.field(metadata={"static": True})
    mesh: Mesh = dataclasses.field(metadata={"static": True})
    axes: tuple[str, ...] = dataclasses.field(metadata={"static": True})

    @property
    def size(self) -> int:
        """The number of weights, kept or not."""
        return self.shape[0] * self.shape[1]

    @property
    def rows(self) -> int:
        """The number of rows."""
        return self.shape[0]

    @property
    def nbytes(self) -> int:
        """The bytes of all parts."""
        return self.parts.nbytes

    @property
    def encoding(self) -> str:
        """How values are stored."""
        return self.parts.encoding


def split_rows(packed: PackedMatrix, mesh: Mesh, axes: tuple[str, ...]) -> SplitMatrix:
    """Splits the rows of a packed matrix over axes of a mesh.

    Args:
      packed: matrix (out, in).
      mesh: mesh of the devices.
      axes: names of the axes that split; the others have copies.

    Returns:
      The split matrix; the last parts have empty rows where the devices do not divide
      the rows.
    """
    devices = int(np.prod([mesh.shape[axis] for axis in axes]))
    outputs, inputs = packed.shape
    height = -(-outputs // devices)  # rows of a part
    bounds = np.minimum(np.arange(devices + 1) * height, outputs)
    width = -(-inputs // WORD) * WORD  # rows are filled up
    flat = encodings.stored_values(packed.values, packed.encoding)
    if packed.starts is None:
        starts = np.arange(outputs + 1) * width
    else:
        starts = np.asarray(packed.starts)  # (out + 1,)
    pairs = list(itertools.pairwise(bounds))
    # As long as the longest part, since an array has one shape on all devices.
    longest = max(int(starts[end] - starts[first]) for first, end in pairs)
    longest = height * width if packed.starts is None else longest
    values = [
        encodings.store(
            _filled(flat[starts[first] : starts[end]], longest), packed.encoding
        )
        for first, end in pairs
    ]
    first_values = [
        _filled(starts[first : end + 1] - starts[first], height + 1, last=True)
        for first, end in pairs
    ]

    def rows_of(array: Any) -> Any:
        if array is None:
            return None
        host = np.asarray(array)
        return place([_filled(host[first:end], height) for first, end in pairs])

    sharding = NamedSharding(mesh, PartitionSpec(axes))

    def place(arrays: list[np.ndarray]) -> jax.Array:
        return jax.device_put(np.stack(arrays), sharding)  # (devices, ...)

    parts = dataclasses.replace(
        packed,
        values=place(values),
        scales=rows_of(packed.scales),
        words=rows_of(packed.words),
        starts=None if packed.starts is None else place(first_values),
        shape=(height, inputs),
    )
    return SplitMatrix(parts, (outputs, inputs), packed.kept, mesh, axes)


def _filled(array: np.ndarray, length: int, *, last: bool = False) -> np.ndarray:
    """An array with so many rows, those behind it zero or like the last."""
    pad = [(0, length - len(array)), *[(0, 0)] * (array.ndim - 1)]
    return np.pad(array, pad, mode="edge" if last else "constant")


def split_matmul(x: jax.Array, matrix: SplitMatrix, *, precision: Any = None) -> Any:
    """The product of vectors with a split matrix.

    Args:
      x: floating (samples, in), the same on all devices of the axes that split.
      matrix: matrix (out, in).
      precision: `precision` of the dense product, where no kernel runs.

    Returns:
      float32 (samples, out), split by output where the compiler decides, and whole on
      each device where axes are Explicit.
    """

    def product(x: jax.Array, parts: PackedMatrix) -> jax.Array:
        return matmul(x, jax.tree.map(lambda a: a[0], parts), precision=precision)

    return _on_parts(product, x, matrix, outputs=matrix.axes)[:, : matrix.rows]


def split_expand(matrix: SplitMatrix, rows: jax.Array) -> jax.Array:
    """Some rows of a split matrix, dense.

    Args:
      matrix: matrix (out, in).
      rows: integers (count,), numbers of rows.

    Returns:
      (count, in), as of `expansion.expand`.
    """
    height = matrix.parts.shape[0]

    def expand(rows: jax.Array, parts: PackedMatrix) -> jax.Array:
        local = rows - jax.lax.axis_index(matrix.axes) * height
        part = jax.tree.map(lambda a: a[0], parts)
        dense = expansion.expand(part, jnp.clip(local, 0, height - 1))
        inside = (local >= 0) & (local < height)
        dense = jnp.where(inside[:, None], dense, jnp.zeros_like(dense))
        # One device has each row, the others have zeros.
        return jax.lax.psum(dense, matrix.axes)

    return _on_parts(expand, rows, matrix, outputs=None)


def _on_parts(fn: Any, x: jax.Array, matrix: SplitMatrix, *, outputs: Any) -> jax.Array:
    """A function of rows and a part, on each device.

    Args:
      fn: function of rows (samples, ...) and a part to (samples, outputs).
      x: rows.
      matrix: split matrix.
      outputs: names of the axes that the results are split over; None for whole ones.

    Returns:
      (samples, outputs); whole along the outputs where axes are Explicit.
    """
    explicit = bool(jax.typeof(x).sharding.mesh.explicit_axes)
    # Where axes are Explicit, rows stay split along others than the matrix is.
    along = _other_axes(jax.typeof(x).sharding.spec, matrix.axes) if explicit else None
    if explicit:
        x = jax.sharding.reshard(x, PartitionSpec(along, *[None] * (x.ndim - 1)))
    y = jax.shard_map(
        fn,
        mesh=matrix.mesh,
        in_specs=(PartitionSpec(along), PartitionSpec(matrix.axes)),
        out_specs=PartitionSpec(along, outputs),
        # Elsewhere the compiler splits rows as it likes.
        axis_names=set(matrix.mesh.axis_names if explicit else matrix.axes),
        check_vma=False,
    )(x, matrix.parts)
    return jax.sharding.reshard(y, PartitionSpec(along, None)) if explicit else y


def _other_axes(spec: Any, axes: tuple[str, ...]) -> Any:
    """How the first axis of an array is split, if it is not by one of these."""
    names = (spec[0],) if isinstance(spec[0], str) else spec[0] or ()
    return spec[0] if set(axes).isdisjoint(names) else None
