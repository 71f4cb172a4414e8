"""Tensors of a directory or a compact file as packed matrices.

The arrays of a compact file are those of a `PackedMatrix` but for where rows begin, so
a matrix of whole words is taken as it lies there. Levels stay the levels they are.
"""

from typing import Any

import numpy as np

from jaxprune.files.safetensors_file import DTYPES
from jaxprune.lm.checkpoints import levels
from jaxprune.lm.checkpoints.checkpoint_dir import CheckpointDir
from jaxprune.lm.checkpoints.compact_source import CompactSource
from jaxprune.lm.checkpoints.levels import Grid
from jaxprune.sparse import encodings
from jaxprune.sparse.encodings import WORD, Levels
from jaxprune.sparse.packed_matrix import (
    PackedMatrix,
    pack_bits,
    pack_levels,
    pack_matrix,
)


def packed_tensor(
    source: CheckpointDir,
    name: str,
    dtype: Any,
    *,
    transposed: bool,
    grid: Grid | None = None,
) -> PackedMatrix:
    """A tensor of two axes, packed.

    Args:
      source: directory or compact file.
      name: name of the tensor.
      dtype: dtype of the matrix unpacked.
      transposed: whether its last axis holds the outputs, and not the inputs.
      grid: bits and group that a directory was rounded to, if it was.

    Returns:
      The matrix (out, in): of levels where the tensor is on levels whose groups lie
      along the inputs, else of its values.

    Raises:
      Damaged: the file is not what its contents say.
    """
    if isinstance(source, CompactSource) and not transposed:
        packed = _as_stored(source, name, dtype)
        if packed is not None:
            return packed
    tensor = source.read(name)
    scales = None if grid is None else levels.find_scales(tensor, grid)
    matrix = tensor.T if transposed else tensor  # (out, in)
    # Of the axes of the tensor, the last holds the inputs, or the one before.
    if scales is None or (scales.axis == -1) == transposed:
        return pack_matrix(np.ascontiguousarray(matrix, dtype))
    # Exact: `find_scales` takes only scales that give every value back.
    numbers, factors = levels.to_levels(tensor, scales.spread()), scales.values
    on_levels = Levels(
        np.ascontiguousarray(numbers.T if transposed else numbers),
        (factors.T if transposed else factors).astype(np.float32),  # (out, groups)
        scales.grid.group,
    )
    return pack_levels(on_levels, encoding=f"int{scales.grid.bits}", dtype=dtype)


def _as_stored(source: CompactSource, name: str, dtype: Any) -> PackedMatrix | None:
    """A tensor whose bits and values can be taken as they lie in the file."""
    entry = source.archive.tensors[name]
    whole_words = entry["shape"][-1] % WORD == 0
    # Of other dtypes, as float64, the leaf is a cast.
    is_stored = DTYPES[entry["dtype"]].name in encodings.DTYPES
    # Groups along the outputs are no groups of a row.
    is_dense = f"dense/{name}" in source.archive.entries
    across = is_dense or entry.get("axis") == -2
    if across or not whole_words or not is_stored:
        return None
    parts = source.stored(name)
    on_levels = "bits" in entry
    return pack_bits(
        parts["mask"],
        parts["values"],
        shape=tuple(entry["shape"]),
        dtype=dtype,
        encoding=f"int{entry['bits']}" if on_levels else DTYPES[entry["dtype"]].name,
        scales=parts["scales"].astype(np.float32) if on_levels else None,
        group=entry["group"] if on_levels else 0,
    )
