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
        entry, stored = source.archive.tensors[name], source.stored(name)
        encoding = DTYPES[entry["dtype"]].name
        # Otherwise rows end within a word, the leaf is a cast, or groups lie across.
        whole_words = entry["shape"][-1] % WORD == 0
        as_it_lies = whole_words and encoding in encodings.DTYPES
        if stored and as_it_lies and entry.get("axis") != -2:
            rounded = "levels" in stored
            return pack_bits(
                stored["mask"],
                stored["levels" if rounded else "values"],
                shape=tuple(entry["shape"]),
                dtype=dtype,
                encoding=f"int{entry['bits']}" if rounded else encoding,
                scales=stored["scales"].astype(np.float32) if rounded else None,
                group=entry["group"] if rounded else 0,
            )
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
