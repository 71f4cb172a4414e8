"""A compact file, opened and checked; its tensors come back chunk by chunk.

`compact` says how such a file is laid out.
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxprune.arrays.messages import listed
from jaxprune.formats.checkpoint_dir import CheckpointDir, leads_out
from jaxprune.formats.safetensors_file import (
    DTYPES,
    TensorInfo,
    Unknown,
    damaged,
    is_inside,
    is_text,
    parse,
    read_header,
    view,
)

FORMAT, VERSION = "jaxprune.compact", "1"

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
    contents = parse(metadata.get("contents", "").encode(), path)
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
            "encoding": "mask" | "dense",
            "sha256": str(),
        } if file in files and code in DTYPES and all(map(_is_count, shape)):
            return
    raise damaged(path, f"its contents say nothing sound of '{name}'")


def decoded(archive: Archive, name: str) -> Iterator[np.ndarray]:
    """The bits of a tensor, chunk by chunk; `Damaged` where mask and values differ."""
    if f"dense/{name}" in archive.entries:
        yield from chunks(archive.look(f"dense/{name}"))
        return
    mask, values = archive.look(f"mask/{name}"), archive.look(f"values/{name}")
    size = math.prod(archive.tensors[name]["shape"])
    count = int(np.bitwise_count(mask).sum(dtype=np.int64))
    if count != values.size or (size % 8 and mask[-1] >> size % 8):
        raise damaged(
            archive.path, f"the mask of '{name}' has {count} bits for {values.size}"
        )
    bits, position = values.view(bits_of(values.dtype)), 0
    for start in range(0, size, CHUNK):
        length = min(CHUNK, size - start)
        some = mask[start // 8 : (start + length + 7) // 8]
        kept = np.unpackbits(some, count=length, bitorder="little").view(bool)
        part = np.zeros(length, bits.dtype)
        number = int(np.count_nonzero(kept))
        part[kept] = bits[position : position + number]
        position += number
        yield part


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
