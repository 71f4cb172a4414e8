"""A compact file, opened and checked: all but the bits themselves.

`compact` says how such a file is laid out.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

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
)
from jaxprune.lm.checkpoints.checkpoint_dir import CheckpointDir, leads_out
from jaxprune.lm.checkpoints.compact_codecs import (
    CODECS,
    Archive,
    Layout,
    bits_of,
    decode_tensor,
    tensor_layout,
)

FORMAT, VERSION = "jaxprune.compact", "1"


def open_archive(path: Path) -> Archive:
    """Opens a compact file, checking all but the bits themselves."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no compact file '{path}'; make it first")
    entries, metadata = read_header(path)
    written_as = metadata.get("format"), metadata.get("version")
    if written_as != (FORMAT, VERSION):
        raise Unknown(
            f"'{path}' must be of format {FORMAT} version {VERSION}, got "
            f"{written_as[0]} version {written_as[1]}; give a file that `compact` wrote"
        )
    match parse_json(metadata.get("contents", "").encode(), path):
        case {"tensors": dict(tensors), "files": dict(files)}:
            problem = _problem(entries, tensors, files)
        case _:
            problem = "its contents list no tensors and files"
    if problem:
        raise damaged(path, problem)
    return Archive(path, entries, tensors, files)


def checked_chunks(archive: Archive, name: str) -> Iterator[np.ndarray]:
    """The bits of a tensor, chunk by chunk; `Damaged` at the end if they are others."""
    digest = hashlib.sha256()
    for part in decode_tensor(archive, name):
        digest.update(part.data)
        yield part
    if digest.hexdigest() != archive.tensors[name]["sha256"]:
        raise damaged(archive.path, f"'{name}' in it is not what went in")


def checked_tensor(archive: Archive, name: str) -> np.ndarray:
    """A tensor, dense, held against its SHA-256."""
    entry = archive.tensors[name]
    dtype = DTYPES[entry["dtype"]]
    # (size,), filled chunk by chunk
    bits = np.empty(math.prod(entry["shape"]), bits_of(dtype))
    position = 0
    for part in checked_chunks(archive, name):
        bits[position : position + part.size] = part
        position += part.size
    return bits.view(dtype).reshape(entry["shape"])


def _problem(
    entries: Mapping[str, TensorInfo],
    tensors: Mapping[str, Any],
    files: Mapping[str, Any],
) -> str | None:
    """What is wrong between the contents and the entries of a file, or None."""
    if not is_text(files) or not all(map(is_inside, files)):
        return "it holds files whose names lead elsewhere"
    expected: Layout = {}
    for name, entry in tensors.items():
        if not _is_sound(entry, files):
            return f"its contents say nothing sound of '{name}'"
        expected |= tensor_layout(name, entry)
    for name in files:
        header = f"header/{name}" in entries
        expected[f"{'header' if header else 'file'}/{name}"] = ("U8", (-1,))
    if missing := [name for name in expected if name not in entries]:
        return f"it lacks {listed(missing)}"
    if unknown := [name for name in entries if name not in expected]:
        return f"its contents say nothing of {listed(unknown)}"
    for name, (code, shape) in expected.items():
        info = entries[name]
        if info.dtype != DTYPES[code] or shape not in ((-1,), info.shape):
            return f"'{name}' in it is not what its contents say"
    return None


def _is_sound(entry: Any, files: Mapping[str, str]) -> bool:
    """Whether the contents say of a tensor what its encoding needs."""
    match entry:
        case {
            "file": str(file),
            "dtype": str(code),
            "shape": [*shape],
            "encoding": str(encoding),
            "sha256": str(),
        } if file in files and code in DTYPES and all(map(_is_count, shape)):
            return encoding in CODECS and CODECS[encoding].is_sound(entry)
    return False


def _is_count(number: Any) -> bool:
    return type(number) is int and number >= 0


def packed_files(source: CheckpointDir) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What is packed beside the weights, and what lies there and is not packed."""
    omitted = tuple(
        name
        for name in source.uncopied
        if not (source.path / name).is_file() or leads_out(source.path, name)
    )
    packed = tuple(name for name in source.uncopied if name not in omitted)
    return (*source.others, *packed), omitted
