"""One safetensors file: what its header says, held against its size, and its tensors.

A file is eight bytes of length, a JSON header and the tensors, without gap or overlap.
Tensors are views of the mapped file. `Damaged` means that a file is not what it says;
`Unknown` that it is another kind of thing. Nothing is unpickled.
"""

import dataclasses
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

_KINDS = {
    "F": (np.float16, np.float32, np.float64),
    "BF": (ml_dtypes.bfloat16,),
    "I": (np.int8, np.int16, np.int32, np.int64),
    "U": (np.uint8, np.uint16, np.uint32, np.uint64),
    "C": (np.complex64,),
}
DTYPES = {
    "BOOL": np.dtype(bool),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "F8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
} | {
    f"{letter}{8 * np.dtype(scalar).itemsize}": np.dtype(scalar)
    for letter, scalars in _KINDS.items()
    for scalar in scalars
}
"""NumPy's dtype for each of safetensors' codes, little-endian."""

_LONGEST_JSON = 100_000_000  # bytes, the limit of Hugging Face's own reader


class Damaged(ValueError):
    """Files that are not what they say: cut short, inconsistent, or missing."""


class Unknown(ValueError):
    """A directory or file of another kind than the one that is read here."""


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies.

    Attributes:
      file: the name of its safetensors file.
      dtype: NumPy's dtype.
      shape: its shape.
      offset: its first byte, from the beginning of the file.
      size: its bytes.
    """

    file: str
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int
    size: int

    @property
    def ndim(self) -> int:
        """How many axes it has."""
        return len(self.shape)


def read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """What a safetensors file holds, checked against its size.

    The tensors must fill the file from the header's end to its own, without gap or
    overlap.

    Args:
      path: the file.

    Returns:
      Name to place, in the order in which they lie, and the file's `__metadata__`.

    Raises:
      Damaged: the file is cut short or inconsistent.
      Unknown: a tensor's dtype is not in `DTYPES`.

    Reference:
      Hugging Face, "Safetensors: format", github.com/huggingface/safetensors.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        # Looked at before it is read: a damaged length may ask for any memory.
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= min(size - 8, _LONGEST_JSON):
            raise damaged(
                path,
                f"its header of {length} bytes does not fit {size}, or it is no "
                "safetensors file",
            )
        entries = parse_json(file.read(length), path)
    metadata = entries.pop("__metadata__", {})
    if not is_text(metadata):
        raise damaged(path, "its __metadata__ is no map of text to text")
    pairs = [(n, _entry(path, n, e, 8 + length)) for n, e in entries.items()]
    # Empty tensors begin where the next one begins, and come before it.
    tensors = dict(sorted(pairs, key=lambda pair: (pair[1].offset, pair[1].size)))
    begins = [*(info.offset for info in tensors.values()), size]
    if begins != [8 + length, *(i.offset + i.size for i in tensors.values())]:
        raise damaged(path, "its tensors leave gaps, overlap or miss its end")
    return tensors, metadata


def write(
    path: Path,
    entries: Mapping[str, tuple[np.dtype, tuple[int, ...]]],
    read: Callable[[str], np.ndarray],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a file, one tensor in memory at a time, and syncs it to disk.

    Args:
      path: path of the file.
      entries: dtype and shape by name.
      read: function of a name that gives its tensor, when its turn comes.
      metadata: map of text to text, the file's `__metadata__`.
    """
    codes = {dtype: code for code, dtype in DTYPES.items()}
    header = {n: (codes[np.dtype(dtype)], s) for n, (dtype, s) in entries.items()}
    with open(path, "wb") as file:
        places = write_header(file, header, metadata or {})
        for name in places:  # in the order of their places
            # A scalar has no bytes to view until it has an axis.
            array = np.ascontiguousarray(read(name)).reshape(-1)
            file.write(array.view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())


def write_header(
    file: BinaryIO,
    entries: Mapping[str, tuple[str, tuple[int, ...]]],
    metadata: Mapping[str, str],
) -> dict[str, TensorInfo]:
    """Begins a safetensors file; the tensors are written to their places afterwards.

    Args:
      file: file open for writing, at its beginning.
      entries: code (one of `DTYPES`) and shape by name.
      metadata: map of text to text, the file's `__metadata__`.

    Returns:
      Name to place. Wider dtypes come first, so that every tensor is aligned.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    # The widest first: then each begins at a multiple of its own item's size.
    for name in sorted(entries, key=lambda name: -DTYPES[entries[name][0]].itemsize):
        code, shape = entries[name]
        begin, end = end, end + math.prod(shape) * DTYPES[code].itemsize
        offsets = [begin, end]
        header[name] = dict(dtype=code, shape=list(shape), data_offsets=offsets)
    text = json.dumps(header, separators=(",", ":")).encode()
    # The format pads its header with spaces: tensors begin at a multiple of 8.
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    del header["__metadata__"]
    path = Path(file.name)
    return {name: _entry(path, name, e, 8 + len(text)) for name, e in header.items()}


def view(path: Path, info: TensorInfo) -> np.ndarray:
    """A tensor of a safetensors file, read-only; the array's memory is the file's."""
    if not info.size:  # no memory map is empty
        return np.frombuffer(b"", info.dtype).reshape(info.shape)
    try:
        mapped = np.memmap(path, info.dtype, "r", info.offset, info.shape)
    except ValueError:
        raise damaged(path, "it became shorter since it was opened") from None
    # A plain array: slices of a `memmap` would each carry the file's attributes.
    return mapped.view(np.ndarray)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; `Damaged` where there is none, or it is too long."""
    if path.stat().st_size > _LONGEST_JSON:
        raise damaged(path, f"it is longer than {_LONGEST_JSON} bytes")
    return parse_json(path.read_bytes(), path)


def parse_json(content: bytes, path: Path) -> dict[str, Any]:
    """A JSON object from UTF-8, `Damaged` where it is none or a name comes twice."""

    # JSON itself lets a name come twice, and the last one wins without a word.
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            raise ValueError("a name comes twice")
        return table

    try:
        value = json.loads(content.decode(), object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise damaged(path, f"it holds no JSON ({error})") from None
    if not isinstance(value, dict):
        raise damaged(path, "it holds no JSON object")
    return value


def is_text(value: Any) -> bool:
    """Whether a JSON value is a map of text to text."""
    return isinstance(value, dict) and all(isinstance(v, str) for v in value.values())


def is_plain(name: str) -> bool:
    """Whether a name is that of a file in a directory, and leads nowhere else."""
    return bool(name) and not {"/", "\0"} & set(name) and name not in (".", "..")


def is_inside(path: str) -> bool:
    """Whether a path with "/" is that of a file in a directory or below it."""
    return all(map(is_plain, path.split("/")))


def damaged(path: Path, what: str) -> Damaged:
    """The error of a file that is not what it says."""
    return Damaged(f"'{path}' is damaged: {what}; bring the file back from a copy")


def _entry(path: Path, name: str, entry: Any, start: int) -> TensorInfo:
    """One tensor of a header, checked in itself."""
    match entry:
        case {
            "dtype": str(code),
            "shape": [*shape],
            "data_offsets": [begin, end],
        } if all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
            pass
        case _:
            raise damaged(
                path, f"'{name}' needs a dtype, and shape and data_offsets of integers"
            )
    if code not in DTYPES:
        raise Unknown(
            f"the dtypes read here are {', '.join(DTYPES)}, but '{name}' in '{path}' "
            f"is {code}; save the model in one of them"
        )
    size = math.prod(shape) * DTYPES[code].itemsize
    if size != end - begin:
        raise damaged(path, f"'{name}' needs {size} bytes and has {end - begin}")
    return TensorInfo(path.name, DTYPES[code], tuple(shape), start + begin, size)
