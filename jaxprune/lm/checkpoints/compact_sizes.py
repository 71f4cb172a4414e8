"""How large a directory would be as a compact file, before there is one."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from jaxprune.files.safetensors_file import Damaged, Unknown
from jaxprune.lm.checkpoints import levels, rewrite
from jaxprune.lm.checkpoints.checkpoint_dir import CheckpointDir
from jaxprune.lm.checkpoints.finite import has_nonfinite
from jaxprune.lm.checkpoints.levels import Grid


def provenance_grid(source: CheckpointDir) -> Grid | None:
    """How a directory's jaxprune.json says that its weights were rounded, or None."""
    try:
        rounding = rewrite.read_provenance(source.path).get("rounding")
    except (Unknown, Damaged):
        return None
    match rounding:
        case {"bits": 4 | 8 as bits, "group": int(group)} if group > 0:
            return Grid(bits, group)
    return None


def packed_bytes(
    source: CheckpointDir, zeros: Mapping[str, int], rounded: Mapping[str, Grid] = {}
) -> int:
    """The bytes of a directory's weights in a compact file, less its header."""
    # `zeros`: tensor name to the number of elements with no bit set, 0 where absent.
    # `rounded`: the grid of each tensor that was rounded to one.
    total = 0
    for name, info in source.tensors.items():
        size = math.prod(info.shape)
        nonzero = size - zeros.get(name, 0)  # of bits: minus zero is stored
        if name in rounded:
            total += levels.levels_bytes(info.shape, nonzero, rounded[name])
        else:  # dense where a mask and the values are no smaller
            total += min(info.size, -(-size // 8) + nonzero * info.dtype.itemsize)
    return total


class Sizes(NamedTuple):
    """How large a directory is, and would be as a compact file.

    Attributes:
      dense_bytes: the bytes of its weights.
      compact_bytes: about the bytes of its weights in a compact file.
      zeros: number of elements that are zero.
      size: number of all elements.
      by_tensor: name to (zeros, size).
      nonfinite: names of the tensors that hold NaN or infinity.
    """

    dense_bytes: int
    compact_bytes: int
    zeros: int
    size: int
    by_tensor: dict[str, tuple[int, int]]
    nonfinite: tuple[str, ...] = ()


def directory_sizes(source: CheckpointDir) -> Sizes:
    """Counts a directory's zeros exactly, and looks for NaN, in one reading."""
    by_tensor, blank, nonfinite = {}, {}, []
    grid, rounded = provenance_grid(source), {}
    for name, info in source.tensors.items():
        tensor, size = source.read(name), math.prod(info.shape)
        if grid is not None and levels.find_scales(tensor, grid) is not None:
            rounded[name] = grid
        # Minus zero is a zero to who counts weights, and a value to the file.
        by_tensor[name] = (size - int(np.count_nonzero(tensor)), size)
        bits = tensor.reshape(-1).view(f"u{info.dtype.itemsize}")
        blank[name] = size - int(np.count_nonzero(bits))
        if has_nonfinite(tensor):
            nonfinite.append(name)
    return Sizes(
        dense_bytes=source.size,
        compact_bytes=packed_bytes(source, blank, rounded),
        zeros=sum(zeros for zeros, _ in by_tensor.values()),
        size=sum(size for _, size in by_tensor.values()),
        by_tensor=by_tensor,
        nonfinite=tuple(nonfinite),
    )
