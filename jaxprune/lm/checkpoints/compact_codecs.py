"""The encodings of a tensor in a compact file, one table: mask, levels, dense.

A codec says what a tensor's entry in the contents must hold, which entries of the file
hold the tensor, how they are written and how they are read. `compact` says how such a
file is laid out.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from jaxprune.files.safetensors_file import DTYPES, TensorInfo, damaged, view
from jaxprune.lm.checkpoints import levels
from jaxprune.lm.checkpoints.levels import Grid, Scales, scales_shape

CHUNK = 1 << 20
"""Elements at a time; a multiple of 8, so that no byte of a mask is cut."""
_ROUNDED = ("F16", "BF16", "F32")
Layout = dict[str, tuple[str, tuple[int, ...]]]
"""Prefix and name to code and shape; -1 is any length."""


class Archive(NamedTuple):
    """An opened compact file.

    Attributes:
      path: path of the file.
      entries: entries of the file, by prefix and name.
      tensors: name to what its contents say of the directory's tensor.
      files: name to SHA-256 of the directory's files.
    """

    path: Path
    entries: dict[str, TensorInfo]
    tensors: dict[str, dict[str, Any]]
    files: dict[str, str]

    def look(self, name: str) -> np.ndarray:
        """An entry as a flat view."""
        return view(self.path, self.entries[name]).reshape(-1)


class Target(NamedTuple):
    """A compact file that is being written.

    Attributes:
      file: file whose header is written.
      entries: places of its entries, by prefix and name.
    """

    file: BinaryIO
    entries: Mapping[str, TensorInfo]


class Codec(NamedTuple):
    """One encoding.

    Attributes:
      is_sound: whether what the contents say of a tensor is what the encoding needs.
      layout: function of a tensor's name, of what the contents say of it and of the
        number of its elements with a bit that is not zero (-1 for any) to the entries
        that hold it.
      write: function that writes the entries of a tensor; False where the tensor is not
        the one that the layout was made for.
      read: function that gives the bits of a tensor, chunk by chunk.
    """

    is_sound: Callable[[Mapping[str, Any]], bool]
    layout: Callable[[str, Mapping[str, Any], int], Layout]
    write: Callable[[Target, str, np.ndarray, Scales | None], bool]
    read: Callable[[Archive, str], Iterator[np.ndarray]]


def chunks(array: np.ndarray) -> Iterator[np.ndarray]:
    """The bits of a C-contiguous array as flat unsigned integers, `CHUNK` at a time."""
    # Minus zero and NaN stay what they are.
    bits = array.reshape(-1).view(bits_of(array.dtype))
    for start in range(0, bits.size, CHUNK):
        yield bits[start : start + CHUNK]


def bits_of(dtype: np.dtype) -> np.dtype:
    """The unsigned integer of a dtype's width."""
    return np.dtype(f"u{dtype.itemsize}")


def tensor_layout(name: str, entry: Mapping[str, Any], nonzero: int = -1) -> Layout:
    """The entries that hold a tensor, by its encoding."""
    return CODECS[entry["encoding"]].layout(name, entry, nonzero)


def decode_tensor(archive: Archive, name: str) -> Iterator[np.ndarray]:
    """The bits of a tensor, chunk by chunk; `Damaged` where mask and values differ."""
    return CODECS[archive.tensors[name]["encoding"]].read(archive, name)


def _dense_layout(name: str, entry: Mapping[str, Any], nonzero: int) -> Layout:
    return {f"dense/{name}": (entry["dtype"], tuple(entry["shape"]))}


def _write_dense(target: Target, name: str, tensor: np.ndarray, _: Any) -> bool:
    file, entries = target
    file.seek(entries[f"dense/{name}"].offset)
    for bits in chunks(tensor):
        file.write(bits.tobytes())
    return True


def _read_dense(archive: Archive, name: str) -> Iterator[np.ndarray]:
    return chunks(archive.look(f"dense/{name}"))


def _mask_entry(name: str, entry: Mapping[str, Any]) -> Layout:
    # One bit a weight, and the last byte filled up.
    return {f"mask/{name}": ("U8", (-(-math.prod(entry["shape"]) // 8),))}


def _mask_layout(name: str, entry: Mapping[str, Any], nonzero: int) -> Layout:
    return {f"values/{name}": (entry["dtype"], (nonzero,)), **_mask_entry(name, entry)}


def _write_mask(target: Target, name: str, tensor: np.ndarray, _: Any) -> bool:
    file, entries = target
    values = entries[f"values/{name}"]
    to_values = values.offset
    for bits, kept in _masked(file, entries[f"mask/{name}"].offset, tensor):
        file.seek(to_values)
        to_values += file.write(bits[kept].tobytes())
    return to_values == values.offset + values.size


def _read_mask(archive: Archive, name: str) -> Iterator[np.ndarray]:
    values = archive.look(f"values/{name}")
    return _filled(archive, name, values, lambda values, start, kept: values)


def _is_sound_levels(entry: Mapping[str, Any]) -> bool:
    match entry:
        case {"bits": 4 | 8, "axis": -1 | -2, "group": int(group)}:
            fits = len(entry["shape"]) > 1 and entry["dtype"] in _ROUNDED
            return fits and group > 0 and type(group) is int
    return False


def _levels_layout(name: str, entry: Mapping[str, Any], nonzero: int) -> Layout:
    grid = Grid(entry["bits"], entry["group"])
    # -1: any number.
    size = nonzero if nonzero < 0 else levels.packed_size(nonzero, grid.bits)
    shape = scales_shape(tuple(entry["shape"]), grid, entry["axis"])
    return {
        f"levels/{name}": ("U8", (size,)),
        f"scales/{name}": ("BF16", shape),
        **_mask_entry(name, entry),
    }


def _write_levels(
    target: Target, name: str, tensor: np.ndarray, scales: Scales | None
) -> bool:
    file, entries = target
    if scales is None:
        return False
    start, parts = 0, []
    for bits, kept in _masked(file, entries[f"mask/{name}"].offset, tensor):
        weights = bits.view(tensor.dtype)[kept]  # (kept,)
        parts.append(levels.to_levels(weights, scales.of(start, bits.size)[kept]))
        start += bits.size
    file.seek(entries[f"scales/{name}"].offset)
    file.write(scales.values.tobytes())
    packed = entries[f"levels/{name}"]
    file.seek(packed.offset)
    # At the end: two levels of 4 bits share a byte, across chunks too.
    written = levels.pack_levels(np.concatenate(parts), scales.grid.bits)
    return file.write(written.tobytes()) == packed.size


def _read_levels(archive: Archive, name: str) -> Iterator[np.ndarray]:
    entry = archive.tensors[name]
    count = _mask_count(archive, name)
    packed = archive.look(f"levels/{name}")
    unpacked = levels.unpack_levels(packed, entry["bits"], count)
    grid, shape = Grid(entry["bits"], entry["group"]), tuple(entry["shape"])
    stored = view(archive.path, archive.entries[f"scales/{name}"])
    scales, dtype = Scales(grid, entry["axis"], shape, stored), DTYPES[entry["dtype"]]

    def weights(part: np.ndarray, start: int, kept: np.ndarray) -> np.ndarray:
        return levels.from_levels(part, scales.of(start, kept.size)[kept], dtype)

    return _filled(archive, name, unpacked, weights)


def _masked(
    file: BinaryIO, to_mask: int, tensor: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Writes a tensor's mask; gives chunks of its bits, and where they are not zero."""
    for bits in chunks(tensor):
        kept = bits != 0
        file.seek(to_mask)
        to_mask += file.write(np.packbits(kept, bitorder="little").tobytes())
        yield bits, kept


def _mask_count(archive: Archive, name: str) -> int:
    """How many elements of a tensor its mask keeps."""
    return int(np.bitwise_count(archive.look(f"mask/{name}")).sum(dtype=np.int64))


def _filled(
    archive: Archive,
    name: str,
    values: np.ndarray | None,
    weights: Callable[[np.ndarray, int, np.ndarray], np.ndarray],
) -> Iterator[np.ndarray]:
    """Bits of a tensor, zero but where the mask keeps `weights(values, start, kept)`.

    `start` is the first element of the chunk, `kept` the mask of its elements.
    """
    mask, entry = archive.look(f"mask/{name}"), archive.tensors[name]
    size, dtype = math.prod(entry["shape"]), DTYPES[entry["dtype"]]
    count = _mask_count(archive, name)
    # A bit past the last weight would be one that nobody wrote.
    if values is None or count != values.size or (size % 8 and mask[-1] >> size % 8):
        raise damaged(
            archive.path, f"the mask of '{name}' has {count} bits, not its values"
        )
    position = 0
    for start in range(0, size, CHUNK):
        length = min(CHUNK, size - start)
        # `start` is a multiple of 8.
        mask_bytes = mask[start // 8 : (start + length + 7) // 8]
        kept = np.unpackbits(mask_bytes, count=length, bitorder="little").view(bool)
        number = int(np.count_nonzero(kept))
        part = np.zeros(length, dtype)  # (length,)
        part[kept] = weights(values[position : position + number], start, kept)
        position += number
        yield part.view(bits_of(dtype))


CODECS: Mapping[str, Codec] = {
    "mask": Codec(lambda entry: True, _mask_layout, _write_mask, _read_mask),
    "levels": Codec(_is_sound_levels, _levels_layout, _write_levels, _read_levels),
    "dense": Codec(lambda entry: True, _dense_layout, _write_dense, _read_dense),
}
"""The encodings by the name that the contents give them."""
