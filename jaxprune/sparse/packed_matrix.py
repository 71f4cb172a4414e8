"""A matrix of which only the kept weights are stored: the leaf that `jp.pack` makes.

The layout is that of `jaxprune compact`: one bit a weight of [out, in] in C order, the
lowest bit first, and the kept values in that order. Beside it stands where each row's
first value lies. Rows are filled up to whole words of 32 weights, which changes nothing
where the number of inputs is a multiple of 32.
"""

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from jaxprune.sparse import encodings, expansion
from jaxprune.sparse.encodings import DTYPES, WORD, Levels


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedMatrix:
    """A matrix (out, in), or several of one shape (batch, out, in), packed.

    Attributes:
      values: kept values in C order and spare elements: floating (kept + 64,), or int8
        levels, or uint8 with two levels of four bits.
      scales: float32 (rows, groups) of levels, rows being batch x out; else None.
      words: uint32 (rows, words), a bit a weight; None where all weights are stored,
        as those of int4 are.
      starts: int32 (rows + 1,), the position of each row's first value, the number of
        values last; None where all weights are stored.
      shape: shape of the matrix or matrices (static).
      dtype: dtype of the matrix (static).
      encoding: name of how values are stored (static): "float32", "bfloat16",
        "float16", "int8" or "int4".
      group: number of inputs that share a scale; 0 without scales (static).
    """

    values: jax.Array
    scales: jax.Array | None
    words: jax.Array | None
    starts: jax.Array | None
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    dtype: np.dtype = dataclasses.field(metadata={"static": True})
    encoding: str = dataclasses.field(metadata={"static": True})
    group: int = dataclasses.field(default=0, metadata={"static": True})

    @property
    def ndim(self) -> int:
        """The number of axes of the matrix."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """The number of weights, kept or not."""
        return math.prod(self.shape)

    @property
    def rows(self) -> int:
        """The number of rows, of all matrices together."""
        return math.prod(self.shape[:-1])

    @property
    def kept(self) -> int:
        """The number of weights that are stored.

        Of a matrix that is stored whole, those whose bits are not all zero.
        """
        if self.words is None:
            values = encodings.stored_values(self.values, self.encoding)
            return int(np.count_nonzero(values.view(f"u{values.itemsize}")))
        return self.values.shape[-1] - encodings.SPARE

    @property
    def nbytes(self) -> int:
        """The bytes that a product with it reads of memory, spare elements included."""
        arrays = (self.values, self.scales, self.words, self.starts)
        return sum(array.nbytes for array in arrays if array is not None)

    def unpack(self) -> jax.Array:
        """The matrix as it was packed, of its shape and dtype."""
        return unpack(self)


def _static_bytes(static: Any) -> bytes:
    """The static fields, for `jax.export`."""
    shape, dtype, encoding, group = static
    return json.dumps([list(shape), np.dtype(dtype).name, encoding, group]).encode()


def _static_fields(content: bytes) -> Any:
    shape, dtype, encoding, group = json.loads(content)
    return tuple(shape), DTYPES[dtype], encoding, group


export.register_pytree_node_serialization(
    PackedMatrix,
    serialized_name="jaxprune.PackedMatrix",
    serialize_auxdata=_static_bytes,
    deserialize_auxdata=_static_fields,
)


def pack_matrix(
    matrix: Any, *, mask: Any = None, values: str | None = None, group: int = 128
) -> PackedMatrix:
    """A matrix with only its kept weights stored.

    Weights whose bits are not all zero are kept, minus zero and NaN included, as they
    are. A matrix with so few zeros that a bit a weight costs more than they do is
    stored whole, and so is one of int4.

    Args:
      matrix: floating (out, in), or (batch, out, in).
      mask: booleans of the matrix's shape, which weights are kept; a kept weight may be
        zero. None for those that are not zero.
      values: encoding of the kept values: "float32", "bfloat16", "float16", "int8" or
        "int4"; None for the matrix's own dtype.
      group: number of inputs that share a scale, of "int8" and "int4": a multiple of
        16, or 0 for whole rows.

    Returns:
      The packed matrix, on the default device.

    Raises:
      ValueError: the matrix has no such dtype or axes, there is no such encoding, or a
        weight is infinite in it.

    Example:
      >>> import numpy as np
      >>> from jaxprune.sparse.packed_matrix import pack_matrix
      >>> packed = pack_matrix(np.array([[0, 2.0], [0, 0]], np.float32))
      >>> packed.starts.tolist(), packed.unpack().tolist()
      ([0, 1, 1], [[0.0, 2.0], [0.0, 0.0]])
    """
    matrix = np.asarray(matrix)
    name = values or matrix.dtype.name
    if matrix.dtype.name not in DTYPES:
        raise ValueError(
            "a packed matrix needs weights of float32, bfloat16 or float16, got "
            f"{matrix.dtype.name}; cast them"
        )
    if matrix.ndim not in (2, 3):
        raise ValueError(
            "a packed matrix needs the axes (out, in) or (batch, out, in), got "
            f"{matrix.shape}; reshape it"
        )
    _check_size(matrix.shape)
    if name not in (*DTYPES, *encodings.BITS):
        raise ValueError(
            f"values must be float32, bfloat16, float16, int8 or int4, got {name!r}"
        )
    rows = matrix.reshape(math.prod(matrix.shape[:-1]), matrix.shape[-1])
    if mask is not None:
        kept = np.asarray(mask, bool).reshape(rows.shape)
    else:
        kept = rows.view(f"u{rows.dtype.itemsize}") != 0  # (rows, in)
    if name in DTYPES:
        with np.errstate(over="ignore"):
            stored = rows.astype(DTYPES[name])
        overflown = rows[np.isinf(stored) & np.isfinite(rows) & kept]
        if overflown.size:
            raise ValueError(
                f"a weight of {float(overflown[np.argmax(np.abs(overflown))]):g} is "
                f'infinite as {name}; keep it as "bfloat16" or "float32"'
            )
        return _stored(kept, stored, matrix, name, None)
    filled = np.where(kept, rows, np.zeros_like(rows))  # NaN times False is NaN
    on_levels = encodings.to_levels(filled, name, group)
    return _stored(kept, on_levels.levels, matrix, name, on_levels)


def pack_levels(levels: Levels, *, encoding: str, dtype: Any) -> PackedMatrix:
    """A matrix that is on levels already, packed without being rounded again.

    Args:
      levels: levels (out, in), their scales and the number of inputs that share one.
      encoding: "int8" or "int4".
      dtype: dtype that the matrix has unpacked.

    Returns:
      The packed matrix; levels of zero are its zeros.

    Example:
      >>> import numpy as np
      >>> from jaxprune.sparse.encodings import Levels
      >>> from jaxprune.sparse.packed_matrix import pack_levels
      >>> levels = Levels(np.array([[7, 0]], np.int8), np.array([[0.5]], np.float32), 2)
      >>> pack_levels(levels, encoding="int4", dtype="float32").unpack().tolist()
      [[3.5, 0.0]]
    """
    _check_size(levels.levels.shape)
    matrix = jax.ShapeDtypeStruct(levels.levels.shape, np.dtype(dtype))
    return _stored(levels.levels != 0, levels.levels, matrix, encoding, levels)


def pack_bits(
    mask: np.ndarray,
    values: np.ndarray,
    *,
    shape: tuple[int, int],
    dtype: Any,
    encoding: str,
    scales: np.ndarray | None = None,
    group: int = 0,
) -> PackedMatrix:
    """A matrix of which the bits and the kept values are at hand, as in a compact file.

    Args:
      mask: uint8 (out x in / 8,), a bit a weight in C order, the lowest first; rows
        must be of whole words of 32 weights.
      values: kept values in that order; of "int4" uint8 with two levels a byte.
      shape: shape (out, in) of the matrix.
      dtype: dtype that the matrix has unpacked.
      encoding: how the values are stored.
      scales: float32 (out, groups) of levels; None without.
      group: number of inputs that share a scale.

    Returns:
      The packed matrix; nothing is dense on the way where that is smaller.

    Example:
      >>> import numpy as np
      >>> from jaxprune.sparse.packed_matrix import pack_bits
      >>> mask = np.array([2, 0, 0, 0], np.uint8)
      >>> packed = pack_bits(mask, np.array([5], np.float32), shape=(1, 32),
      ...                    dtype="float32", encoding="float32")
      >>> packed.unpack()[0, :3].tolist()
      [0.0, 5.0, 0.0]
    """
    _check_size(shape)
    words = mask.view("<u4").reshape(shape[0], shape[1] // WORD)
    starts = np.zeros(len(words) + 1, np.int32)
    np.cumsum(np.bitwise_count(words).sum(axis=1, dtype=np.int32), out=starts[1:])
    values = values.view(np.int8) if encoding == "int8" else values
    whole = _smaller_whole(words, starts, encoding)
    if whole:
        kept = encodings.stored_values(values, encoding)[: starts[-1]]
        flat = np.zeros(words.size * WORD, kept.dtype)
        flat[np.unpackbits(mask, bitorder="little").view(bool)] = kept
        stored = encodings.store(flat, encoding)
    else:
        stored = encodings.store(values, encoding)
    return PackedMatrix(
        values=jnp.asarray(stored),
        scales=None if scales is None else jnp.asarray(scales),
        words=None if whole else jnp.asarray(words),
        starts=None if whole else jnp.asarray(starts),
        shape=shape,
        dtype=np.dtype(dtype),
        encoding=encoding,
        group=group,
    )


def stack_packed(matrices: Sequence[PackedMatrix]) -> PackedMatrix | None:
    """Several packed matrices of one shape as one of three axes.

    Args:
      matrices: matrices (out, in), packed alike.

    Returns:
      The matrices (batch, out, in); None where they are not packed alike.
    """
    first = matrices[0]
    layouts = {
        (m.shape, m.dtype, m.encoding, m.group, m.words is None) for m in matrices
    }
    if len(layouts) > 1:
        return None
    _check_size((len(matrices), *first.shape))
    spare, starts = encodings.SPARE, [np.zeros(1, np.int32)]
    flat = [encodings.stored_values(m.values, m.encoding)[:-spare] for m in matrices]
    if first.words is not None:
        for matrix in matrices:
            starts.append(np.asarray(matrix.starts)[1:] + starts[-1][-1])  # (out,) each
    values = encodings.store(np.concatenate(flat), first.encoding)

    def joined(name: str) -> Any:
        if getattr(first, name) is None:
            return None
        return jnp.concatenate([getattr(matrix, name) for matrix in matrices])

    return dataclasses.replace(
        first,
        values=jnp.asarray(values),
        scales=joined("scales"),
        words=joined("words"),
        starts=None if first.starts is None else jnp.asarray(np.concatenate(starts)),
        shape=(len(matrices), *first.shape),
    )


def _stored(
    kept: np.ndarray, stored: np.ndarray, matrix: Any, name: str, levels: Levels | None
) -> PackedMatrix:
    """Rows of stored values (rows, in), in whichever layout is smaller."""
    words, starts, flat = _with_bits(kept, stored)
    whole = _smaller_whole(words, starts, name)
    if whole:
        filled = np.where(kept, stored, np.zeros_like(stored))
        flat = np.pad(filled, ((0, 0), (0, -stored.shape[1] % WORD))).reshape(-1)
    return PackedMatrix(
        values=jnp.asarray(encodings.store(flat, name)),
        scales=None if levels is None else jnp.asarray(levels.scales, jnp.float32),
        words=None if whole else jnp.asarray(words),
        starts=None if whole else jnp.asarray(starts),
        shape=tuple(matrix.shape),
        dtype=np.dtype(matrix.dtype),
        encoding=name,
        group=0 if levels is None else levels.group,
    )


def _smaller_whole(words: np.ndarray, starts: np.ndarray, name: str) -> bool:
    """Whether the zeros among the values take no more than a bit for each weight."""
    if name == "int4":  # its zeros cost as much as they save
        return True
    kept = encodings.stored_bytes(int(starts[-1]), name)
    with_bits = words.nbytes + starts.nbytes + kept
    return encodings.stored_bytes(words.size * WORD, name) <= with_bits


def _with_bits(
    kept: np.ndarray, stored: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The words of the mask, the rows' starts, and the kept values in C order."""
    wide = np.pad(kept, ((0, 0), (0, -kept.shape[1] % WORD)))  # (rows, words x 32)
    packed = np.packbits(wide, axis=1, bitorder="little")  # (rows, words x 4)
    # Words of the file's byte order: the lowest bit of the lowest byte comes first.
    words = packed.view("<u4").reshape(len(kept), wide.shape[1] // WORD)
    starts = np.zeros(len(kept) + 1, np.int32)
    np.cumsum(kept.sum(axis=1), out=starts[1:])
    return words, starts, stored[kept]


def unpack(packed: PackedMatrix) -> jax.Array:
    """The matrix that was packed, of its shape and dtype.

    Args:
      packed: packed matrix.

    Returns:
      Floating (out, in), or (batch, out, in); bit for bit what was packed where the
      values are stored in its dtype.

    Example:
      >>> import numpy as np
      >>> from jaxprune.sparse.packed_matrix import pack_matrix, unpack
      >>> unpack(pack_matrix(np.array([[0, -0.0]], np.float32))).tolist()
      [[0.0, -0.0]]
    """
    rows = expansion.expand(packed, jnp.arange(packed.rows))
    return rows.astype(packed.dtype).reshape(packed.shape)


def is_packed_matrix(node: Any) -> bool:
    """Whether a node of a tree is a packed matrix."""
    return isinstance(node, PackedMatrix)


MOST = 2**31 - 1
"""Weights of a packed matrix, or of several together: positions are int32."""


def _check_size(shape: Sequence[int]) -> None:
    if math.prod(shape) > MOST:
        raise ValueError(
            f"a packed matrix needs under 2**31 weights, got {shape}; pack its parts"
        )
