"""A pruned model in one file: a bit for each weight, then the weights that are left.

For storage and transfer; `expand` gives back the directory byte for byte. The file is a
safetensors file. Its `__metadata__` has "format", "version" and "contents", a JSON
object:

    {"tensors": {NAME: {"file": FILE, "dtype": CODE, "shape": [...],
                        "encoding": "mask", "levels" or "dense", "sha256": SHA-256}},
     "files": {FILE: SHA-256}}

FILE is a path in the directory, with "/" where it lies in a sub-directory.

Its tensors are, for each NAME of encoding "mask", `mask/NAME` (uint8: one bit a weight
of the flat tensor in C order, the first weight is the lowest bit, 1 where the weight's
own bits are not all zero) and `values/NAME` (the weights with bit 1, in that order);
for each of encoding "levels", whose entry also has "bits", "group" and "axis", the same
`mask/NAME`, `levels/NAME` (uint8: those weights as whole numbers of their scale, two's
complement, of 4 bits two a byte, the first in the low half) and `scales/NAME`
(bfloat16, see `levels`); for each of encoding "dense" `dense/NAME`; for each weights'
FILE `header/FILE` (uint8: its length and header as they were); for each other FILE
`file/FILE` (uint8). A mask is
used where it makes the tensor smaller, levels where the directory's jaxprune.json says
that it was rounded and every bit comes back. Minus zero and NaN are weights like
others.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from jaxprune.files import atomic
from jaxprune.files.safetensors_file import DTYPES, TensorInfo, damaged, write_header
from jaxprune.files.sink import Sink, naming_path
from jaxprune.lm.checkpoints import compact_sizes, levels
from jaxprune.lm.checkpoints.checkpoint_dir import CheckpointDir, Progress
from jaxprune.lm.checkpoints.compact_archive import (
    FORMAT,
    VERSION,
    checked_tensor,
    open_archive,
    packed_files,
)
from jaxprune.lm.checkpoints.compact_codecs import (
    CODECS,
    Archive,
    Layout,
    Target,
    chunks,
    decode_tensor,
    tensor_layout,
)
from jaxprune.lm.checkpoints.levels import Grid, Scales

_PART = 1 << 24  # bytes of a file that are copied at a time
_CODES = {dtype: code for code, dtype in DTYPES.items()}


class Result(NamedTuple):
    """What a compact file saves.

    Attributes:
      dense_bytes: number of bytes of the directory's files that are in it.
      compact_bytes: number of bytes of the compact file.
      omitted: files of the directory that are not in it: links out of the directory
        or to a directory, and what is no file.
    """

    dense_bytes: int
    compact_bytes: int
    omitted: tuple[str, ...] = ()


def compact(
    source: CheckpointDir,
    path: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Result:
    """Writes a directory as one compact file, tensor by tensor.

    Args:
      source: directory, all of whose files are packed, sub-directories' too.
      path: path of the compact file, outside of the directory.
      overwrite: whether an earlier compact file may be replaced.
      progress: function that is called when a tensor is counted, and again when it is
        written.

    Returns:
      The sizes.

    Raises:
      ValueError: `path` is taken or inside the directory, or the source changed while
        it was read.
      OSError: the file could not be written; nothing is left of it.

    Example:
      >>> import pathlib, tempfile
      >>> import numpy as np
      >>> from safetensors.numpy import save_file
      >>> from jaxprune.lm.checkpoints import checkpoint_dir, compact
      >>> directory = pathlib.Path(tempfile.mkdtemp())
      >>> (directory / "model").mkdir()
      >>> _ = (directory / "model" / "config.json").write_text("{}")
      >>> weight = np.zeros((64, 64), "f4")
      >>> save_file({"w": weight}, directory / "model" / "model.safetensors")
      >>> model = checkpoint_dir.open_directory(directory / "model")
      >>> result = compact.compact(model, directory / "model.compact")
      >>> result.compact_bytes < result.dense_bytes / 10
      True
      >>> _ = compact.expand(directory / "model.compact", directory / "again")
      >>> checkpoint_dir.open_directory(directory / "again").read("w").any()
      np.False_
    """
    place = atomic.apart(path, source.path)
    replaceable = _why_not_ours if overwrite else None
    # Everything is read twice: the header, which comes first, needs every size.
    advance = source.meter(progress, passes=2)
    stamps = _stamps(source)
    with atomic.staged_file(place, replaceable=replaceable) as partial:
        plan = _plan(source, advance)
        # Bytes of each entry.
        stored = (math.prod(n) * DTYPES[c].itemsize for c, n in plan.entries.values())
        atomic.check_room(place, sum(stored))
        with naming_path(partial), open(partial, "wb") as file:
            entries = write_header(file, plan.entries, plan.metadata)
            target = Target(file, entries)
            for name, info in source.tensors.items():
                write = CODECS[plan.encodings[name]].write
                if not write(target, name, source.read(name), plan.scales[name]):
                    raise _changed(source.path / info.file)
                advance(name, info.size)
            for name, size in plan.embedded.items():
                origin = source.path / name.partition("/")[2]
                _put_bytes(file, origin, size, entries[name])
            # Its digests are of the first reading, its contents of the second.
            for path, stamp in stamps.items():
                if _stamp(path) != stamp:
                    raise _changed(path)
            file.flush()  # fsync sees only what has left the buffer
            os.fsync(file.fileno())
    return Result(plan.dense_bytes, place.stat().st_size, packed_files(source)[1])


def _stamps(source: CheckpointDir) -> dict[Path, Any]:
    """What tells of each file of a directory whether it was written to."""
    names = (*source.metadata, *packed_files(source)[0])
    return {source.path / name: _stamp(source.path / name) for name in names}


def _stamp(path: Path) -> Any:
    stat = path.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


class _Plan(NamedTuple):
    """All that is known before the first byte is written.

    Attributes:
      encodings: name of a tensor to its encoding.
      scales: name to the scales of a tensor that is stored as levels, else None.
      entries: name to (code, shape) of what the file will hold.
      metadata: its `__metadata__`.
      embedded: "header/FILE" and "file/FILE" to how many bytes of FILE they hold.
      dense_bytes: bytes of the source's files.
    """

    encodings: dict[str, str]
    scales: dict[str, Scales | None]
    entries: Layout
    metadata: dict[str, str]
    embedded: dict[str, int]
    dense_bytes: int


def _plan(source: CheckpointDir, advance: Callable[[str, int], None]) -> _Plan:
    tensors: dict[str, Any] = {}
    scales: dict[str, Scales | None] = {}
    grid = compact_sizes.provenance_grid(source)
    entries: Layout = {}
    others, _ = packed_files(source)
    paths = {name: source.path / name for name in (*source.metadata, *others)}
    sizes = {name: path.stat().st_size for name, path in paths.items()}
    embedded, digests = {}, {}
    for file in source.metadata:
        in_file = {k: info for k, info in source.tensors.items() if info.file == file}
        # The length and the header are all that is no tensor.
        head = sizes[file] - sum(info.size for info in in_file.values())
        embedded[f"header/{file}"] = head
        sink = hashlib.sha256(_head(paths[file], head))  # of the file as it was
        for name, info in in_file.items():
            tensors[name], nonzero, scales[name] = _scan(source, name, info, sink, grid)
            entries |= tensor_layout(name, tensors[name], nonzero)
            advance(name, info.size)
        # The header, then all tensors in the file's order: the digest of the file.
        digests[file] = sink.hexdigest()
    for name in others:
        embedded[f"file/{name}"] = sizes[name]
        digests[name] = atomic.digest(paths[name])
    # Whole files and headers are bytes.
    entries |= {name: ("U8", (size,)) for name, size in embedded.items()}
    contents = json.dumps({"tensors": tensors, "files": digests})
    metadata = {"format": FORMAT, "version": VERSION, "contents": contents}
    encodings = {name: entry["encoding"] for name, entry in tensors.items()}
    return _Plan(encodings, scales, entries, metadata, embedded, sum(sizes.values()))


def _scan(
    source: CheckpointDir, name: str, info: TensorInfo, sink: Any, grid: Grid | None
) -> tuple[dict[str, Any], int, Scales | None]:
    """What the contents say of a tensor, its nonzero elements, its scales."""
    tensor, nonzero, digest = source.read(name), 0, hashlib.sha256()
    for bits in chunks(tensor):
        sink.update(bits)
        digest.update(bits.data)
        nonzero += int(np.count_nonzero(bits))
    size, itemsize = math.prod(info.shape), info.dtype.itemsize
    # Where a mask saves nothing.
    dense = compact_sizes.stored_bytes(nonzero, size, itemsize) == info.size
    entry: dict[str, Any] = {"file": info.file, "dtype": _CODES[info.dtype]}
    entry |= {"shape": info.shape, "encoding": "dense" if dense else "mask"}
    entry["sha256"] = digest.hexdigest()
    # Levels go before both: they take fewer bits than the values.
    scales = None if grid is None else levels.find_scales(tensor, grid)
    if scales is not None:
        entry |= {"encoding": "levels", "axis": scales.axis, **scales.grid._asdict()}
    return entry, nonzero, scales


def _head(path: Path, size: int) -> bytes:
    with open(path, "rb") as file:
        return file.read(size)


def _put_bytes(file: BinaryIO, path: Path, size: int, entry: TensorInfo) -> None:
    file.seek(entry.offset)
    with open(path, "rb") as origin:
        while size:
            part = origin.read(min(size, _PART))
            if not part:
                raise _changed(path)
            size -= file.write(part)


def dense_tensors(path: str | os.PathLike[str]) -> Iterator[tuple[str, np.ndarray]]:
    """The dense tensors of a compact file, one after the other; nothing is expanded.

    Each is held against its SHA-256 before it is handed out.

    Args:
      path: path of the compact file.

    Yields:
      Name and array, in the order of the directory.

    Raises:
      FileNotFoundError: there is no such file.
      Damaged: the file is not what its header says, or a tensor that comes out of it
        is not the one that went in.
      Unknown: it is another kind of file.
    """
    archive = open_archive(Path(path))
    for name in archive.tensors:
        yield name, checked_tensor(archive, name)


def expand(
    path: str | os.PathLike[str], directory: str | os.PathLike[str]
) -> list[Path]:
    """Writes the directory that a compact file was made of, byte for byte.

    Args:
      path: path of the compact file.
      directory: path of what is written; nothing or an empty one may be there.

    Returns:
      The paths of its files.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: `directory` is taken.
      Damaged: the file is not what its header says, or a file that comes out of it is
        not the one that went in; nothing is left of the directory.
      Unknown: it is another kind of file.
      OSError: the directory could not be written; nothing is left of it.
    """
    archive = open_archive(Path(path))
    place = atomic.apart(directory, archive.path)
    sizes = [
        math.prod(e["shape"]) * DTYPES[e["dtype"]].itemsize
        for e in archive.tensors.values()
    ]
    # Files and headers are stored as they are.
    sizes += [
        info.size
        for name, info in archive.entries.items()
        if name.startswith(("file/", "header/"))
    ]
    atomic.check_room(place, sum(sizes))
    with atomic.staged(place, replaceable=_is_taken) as partial:
        for name, digest in archive.files.items():
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            with Sink(partial / name) as sink:
                for part in _restored(archive, name):
                    sink.put(part)
            if sink.digest != digest:
                raise damaged(archive.path, f"'{name}' in it is not what went in")
    return [place / name for name in archive.files]


def _restored(archive: Archive, name: str) -> Iterator[np.ndarray]:
    """The bytes of one file of the directory, chunk by chunk."""
    if f"file/{name}" in archive.entries:
        yield from chunks(archive.look(f"file/{name}"))
        return
    yield from chunks(archive.look(f"header/{name}"))
    for tensor, entry in archive.tensors.items():
        if entry["file"] == name:
            for part in decode_tensor(archive, tensor):
                yield part.view(np.uint8)


def _changed(path: Path) -> ValueError:
    return ValueError(
        f"a directory must stay as it is while it is read, but '{path}' changed; "
        f"begin again"
    )


def _is_taken(path: Path) -> str:
    return "there is something already"


def _why_not_ours(path: Path) -> str | None:
    """Why a path must not be replaced: only earlier compact files may be."""
    try:
        open_archive(path)
    except (ValueError, OSError):
        return "it is no compact file"
    return None
