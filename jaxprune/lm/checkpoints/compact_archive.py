"""A compact file, opened and checked; its tensors come back chunk by chunk.

`compact` says how such a file is laid out.
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxprune.arrays.messages import listed
from jaxprune.files.safetensors_file import (
    DTYPES,
    TensorInfo,
    Unknown,
    damaged,
    is_inside,
    is_text,
    parse_json,
    read_header,
    view,
)
from jaxprune.lm.checkpoints import levels
from jaxprune.lm.checkpoints.checkpoint_dir import CheckpointDir, leads_out
from jaxprune.lm.checkpoints.levels import Grid, Scales, scales_shape

FORMAT, VERSION = "jaxprune.compact", "1"

_ROUNDED = ("F16", "BF16", "F32")
CHUNK = 1 << 20
"""Elements at a time; a multiple of 8, so that no byte of a mask is cut."""


class Archive(NamedTuple):
    """An opened compact file.

    Attributes:
      path: where it is.
      entries: what it holds, by prefix and name.
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


def open_archive(path: Path) -> Archive:
    """Opens a compact file, checking all but the bits themselves."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no compact file '{path}'; make it first")
    entries, metadata = read_header(path)
    kind = (metadata.get("format"), metadata.get("version"))
    if kind != (FORMAT, VERSION):
        raise Unknown(
            f"'{path}' must be of format {FORMAT} version {VERSION}, got "
            f"{kind[0]} version {kind[1]}; give a file that `compact` wrote"
        )
    contents = parse_json(metadata.get("contents", "").encode(), path)
    match contents:
        case {"tensors": dict(held), "files": dict(files)}:
            pass
        case _:
            raise damaged(path, "its contents list no tensors and files")
    if not is_text(files) or not all(map(is_inside, files)):
        raise damaged(path, "it holds files whose names lead elsewhere")
    wanted: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, entry in held.items():
        _check_entry(path, name, entry, files)
        wanted |= layout(name, entry)
    for name in files:
        header = f"header/{name}" in entries
        wanted[f"{'header' if header else 'file'}/{name}"] = ("U8", (-1,))
    if wrong := [name for name in wanted if name not in entries]:
        raise damaged(path, f"it lacks {listed(wrong)}")
    if wrong := [name for name in entries if name not in wanted]:
        raise damaged(path, f"its contents say nothing of {listed(wrong)}")
    for name, (code, shape) in wanted.items():
        found = entries[name]
        if found.dtype != DTYPES[code] or shape not in ((-1,), found.shape):
            raise damaged(path, f"'{name}' in it is not what its contents say")
    return Archive(path, entries, held, files)


def packed_files(source: CheckpointDir) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What is packed beside the weights, and what lies there and is not packed."""
    left = tuple(
        name
        for name in source.left
        if not (source.path / name).is_file() or leads_out(source.path, name)
    )
    rest = tuple(name for name in source.left if name not in left)
    return (*source.others, *rest), left


def layout(
    name: str, entry: Mapping[str, Any], kept: int = -1
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Prefix and name to code and shape of what is stored of a tensor."""
    # `entry` is what the contents say of it, `kept` how many of its elements have a bit
    # that is not zero, or -1 for any number.
    code, shape = entry["dtype"], tuple(entry["shape"])
    if entry["encoding"] == "dense":
        return {f"dense/{name}": (code, shape)}
    if entry["encoding"] == "levels":
        grid = Grid(entry["bits"], entry["group"])
        size = kept if kept < 0 else levels.packed_size(kept, grid.bits)
        return {
            f"levels/{name}": ("U8", (size,)),
            f"scales/{name}": ("BF16", scales_shape(shape, grid, entry["axis"])),
            f"mask/{name}": ("U8", (-(-math.prod(shape) // 8),)),
        }
    return {
        f"values/{name}": (code, (kept,)),
        f"mask/{name}": ("U8", (-(-math.prod(shape) // 8),)),
    }


def _check_entry(path: Path, name: str, entry: Any, files: Mapping[str, str]) -> None:
    match entry:
        case {
            "file": str(file),
            "dtype": str(code),
            "shape": [*shape],
            "encoding": str(encoding),
            "sha256": str(),
        } if file in files and code in DTYPES and all(map(_is_count, shape)):
            if encoding in ("mask", "dense"):
                return
            if encoding == "levels" and len(shape) > 1 and code in _ROUNDED:
                match entry:
                    case {"bits": 4 | 8, "axis": -1 | -2, "group": int(group)}:
                        if group > 0 and type(group) is int:
                            return
    raise damaged(path, f"its contents say nothing sound of '{name}'")


def decoded(archive: Archive, name: str) -> Iterator[np.ndarray]:
    """The bits of a tensor, chunk by chunk; `Damaged` where mask and values differ."""
    if f"dense/{name}" in archive.entries:
        yield from chunks(archive.look(f"dense/{name}"))
        return
    mask, entry = archive.look(f"mask/{name}"), archive.tensors[name]
    size, dtype = math.prod(entry["shape"]), DTYPES[entry["dtype"]]
    count = int(np.bitwise_count(mask).sum(dtype=np.int64))
    if entry["encoding"] == "levels":
        packed = archive.look(f"levels/{name}")
        values = levels.unpack(packed, entry["bits"], count)
        grid = Grid(entry["bits"], entry["group"])
        own = view(archive.path, archive.entries[f"scales/{name}"])
        scales = Scales(grid, entry["axis"], tuple(entry["shape"]), own)
    else:
        values, scales = archive.look(f"values/{name}"), None
    if values is None or count != values.size or (size % 8 and mask[-1] >> size % 8):
        raise damaged(
            archive.path, f"the mask of '{name}' has {count} bits, not its values"
        )
    position = 0
    for start in range(0, size, CHUNK):
        length = min(CHUNK, size - start)
        some = mask[start // 8 : (start + length + 7) // 8]
        kept = np.unpackbits(some, count=length, bitorder="little").view(bool)
        part = np.zeros(length, dtype)
        number = int(np.count_nonzero(kept))
        held = values[position : position + number]
        if scales is not None:
            held = levels.values(held, scales.of(start, length)[kept], dtype)
        part[kept] = held
        position += number
        yield part.view(bits_of(dtype))


def chunks(array: np.ndarray) -> Iterator[np.ndarray]:
    """The bits of a C-contiguous array as flat unsigned integers, `CHUNK` at a time."""
    bits = array.reshape(-1).view(bits_of(array.dtype))
    for start in range(0, bits.size, CHUNK):
        yield bits[start : start + CHUNK]


def bits_of(dtype: np.dtype) -> np.dtype:
    """The unsigned integer of a dtype's width."""
    return np.dtype(f"u{dtype.itemsize}")


def _is_count(number: Any) -> bool:
    return type(number) is int and number >= 0
