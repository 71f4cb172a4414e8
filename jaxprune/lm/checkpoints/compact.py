"""A pruned model in one file: a bit for each weight, then the weights that are left.

For storage and transfer; `expand` gives the directory back. The file is a safetensors
file. Its `__metadata__` has "format", "version" and "contents", a JSON object:

    {"tensors": {NAME: {"file": FILE, "dtype": CODE, "shape": [...],
                        "sha256": SHA-256}},
     "weights": {FILE: the __metadata__ of a file of weights},
     "files": {FILE: SHA-256 of each other file}}

FILE is a path in the directory, with "/" where it lies in a sub-directory.

Its tensors are `file/FILE` (uint8) for each other FILE, and for each NAME either
`dense/NAME`, or `mask/NAME` (uint8: one bit a weight of the flat tensor in C order, the
first weight is the lowest bit, 1 where the weight's own bits are not all zero) with
`values/NAME` (the weights with bit 1, in that order), or `mask/NAME` with `levels/NAME`
(uint8: those weights as whole numbers of their scale, two's complement, of 4 bits two a
byte, the first in the low half) and `scales/NAME` (bfloat16; see `levels`). An entry of
levels also has "bits", "group" and "axis". A mask is used where it makes the tensor
smaller, levels where the directory's jaxprune.json says that it was rounded and every
bit comes back. Minus zero and NaN are weights like others.
"""

import functools
import hashlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxprune.files import atomic, safetensors_file
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
from jaxprune.lm.checkpoints import compact_sizes, levels
from jaxprune.lm.checkpoints.checkpoint_dir import CheckpointDir, Progress, leads_out
from jaxprune.lm.checkpoints.levels import Grid, Scales

FORMAT, VERSION = "jaxprune.compact", "2"
Layout = dict[str, tuple[np.dtype, tuple[int, ...]]]
"""Name to dtype and shape."""
_TAKEN = "there is something already"
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


class Archive(NamedTuple):
    """An opened compact file.

    Attributes:
      path: path of the file.
      entries: tensors of the file, by prefix and name.
      tensors: name to what its contents say of the directory's tensor.
      weights: name of each file of weights to its `__metadata__`.
      files: name of each other file to its SHA-256.
    """

    path: Path
    entries: dict[str, TensorInfo]
    tensors: dict[str, dict[str, Any]]
    weights: dict[str, dict[str, str]]
    files: dict[str, str]

    def look(self, name: str) -> np.ndarray:
        """An entry, a view of the file."""
        return view(self.path, self.entries[name])

    def layout(self, file: str) -> Layout:
        """Dtype and shape of the tensors of a file of weights, by name."""
        return {
            name: (DTYPES[entry["dtype"]], tuple(entry["shape"]))
            for name, entry in self.tensors.items()
            if entry["file"] == file
        }

    def read(self, name: str) -> np.ndarray:
        """A tensor, dense, held against its SHA-256."""
        entry = self.tensors[name]
        try:
            tensor = self._decoded(name, tuple(entry["shape"]), DTYPES[entry["dtype"]])
            if _digest(tensor) == entry["sha256"]:
                return tensor
        except (KeyError, TypeError, ValueError, IndexError, AttributeError):
            pass  # its contents and its arrays do not fit each other
        raise damaged(self.path, f"'{name}' in it is not what went in")

    def _decoded(
        self, name: str, shape: tuple[int, ...], dtype: np.dtype
    ) -> np.ndarray:
        if f"dense/{name}" in self.entries:
            return self.look(f"dense/{name}")
        size = math.prod(shape)
        mask = np.unpackbits(self.look(f"mask/{name}"), count=size, bitorder="little")
        kept = mask.view(bool)  # (size,)
        flat = np.zeros(size, dtype)
        if f"values/{name}" in self.entries:
            flat[kept] = self.look(f"values/{name}")
        else:
            entry, stored = self.tensors[name], self.look(f"scales/{name}")
            grid = Grid(entry["bits"], entry["group"])
            scales = Scales(grid, entry["axis"], shape, stored).spread().reshape(-1)
            numbers = levels.unpack_levels(
                self.look(f"levels/{name}"), grid.bits, int(np.count_nonzero(kept))
            )
            flat[kept] = levels.from_levels(numbers, scales[kept], dtype)
        return flat.reshape(shape)


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
      progress: function that is called when a tensor is counted.

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
    advance, grid = source.meter(progress), compact_sizes.provenance_grid(source)
    omitted = tuple(
        name
        for name in source.uncopied
        if not (source.path / name).is_file() or leads_out(source.path, name)
    )
    others = [*source.others, *(n for n in source.uncopied if n not in omitted)]
    stamps = {name: _stamp(source.path / name) for name in (*source.metadata, *others)}
    tensors: dict[str, Any] = {}
    layout: Layout = {}
    scales: dict[str, Scales | None] = {}
    # All tensors are read once more when they are written: the header, which comes
    # first, needs every size.
    for name, info in source.tensors.items():
        tensor = source.read(name)
        scales[name] = None if grid is None else levels.find_scales(tensor, grid)
        entry = {"file": info.file, "dtype": _CODES[info.dtype], "shape": info.shape}
        tensors[name] = entry | {"sha256": _digest(tensor)}
        if (on_grid := scales[name]) is not None:
            tensors[name] |= {"axis": on_grid.axis, **on_grid.grid._asdict()}
        for prefix, array in _encoded(tensor, on_grid).items():
            layout[f"{prefix}/{name}"] = array.dtype, array.shape
        advance(name, info.size)
    digests = {name: atomic.digest(source.path / name) for name in others}
    for name in others:
        layout[f"file/{name}"] = np.dtype(np.uint8), (stamps[name][1],)

    @functools.lru_cache(1)
    def encoded(name: str) -> dict[str, np.ndarray]:
        return _encoded(source.read(name), scales[name])

    def part(entry: str) -> np.ndarray:
        prefix, _, name = entry.partition("/")
        if prefix == "file":
            return np.fromfile(source.path / name, np.uint8)
        return encoded(name)[prefix]

    contents = {"tensors": tensors, "weights": source.metadata, "files": digests}
    about = {"format": FORMAT, "version": VERSION, "contents": json.dumps(contents)}
    replaceable = _why_not_ours if overwrite else None
    with atomic.staged_file(place, replaceable=replaceable) as partial:
        atomic.check_room(place, _bytes(layout))
        safetensors_file.write(partial, layout, part, about)
        # Its digests are of the first reading, its contents of the second.
        for name, stamp in stamps.items():
            if _stamp(source.path / name) != stamp:
                raise ValueError(
                    "a directory must stay as it is while it is read, but "
                    f"'{source.path / name}' changed; begin again"
                )
    dense = sum(size for _, size, _ in stamps.values())
    return Result(dense, place.stat().st_size, omitted)


def _encoded(tensor: np.ndarray, scales: Scales | None) -> dict[str, np.ndarray]:
    """What the file holds of a tensor, by prefix."""
    flat = tensor.reshape(-1)
    kept = flat.view(f"u{tensor.dtype.itemsize}") != 0
    mask = np.packbits(kept, bitorder="little")
    if scales is not None:
        numbers = levels.to_levels(flat[kept], scales.spread().reshape(-1)[kept])
        packed = levels.pack_levels(numbers, scales.grid.bits)
        return {"mask": mask, "levels": packed, "scales": scales.values}
    values = flat[kept]
    if mask.nbytes + values.nbytes >= tensor.nbytes:
        return {"dense": tensor}
    return {"mask": mask, "values": values}


def _bytes(layout: Layout) -> int:
    return sum(math.prod(shape) * dtype.itemsize for dtype, shape in layout.values())


def _digest(array: np.ndarray) -> str:
    return hashlib.sha256(array.reshape(-1).view(np.uint8).data).hexdigest()


def _stamp(path: Path) -> tuple[int, int, int]:
    """What tells of a file whether it was written to, its size second."""
    stat = path.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def open_archive(path: Path) -> Archive:
    """Opens a compact file; its tensors are checked when they are read."""
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
        case {"tensors": dict(tensors), "weights": dict(weights), "files": dict(files)}:
            archive = Archive(path, entries, tensors, weights, files)
        case _:
            raise damaged(path, "its contents list no tensors, weights and files")
    texts = all(map(is_text, (files, *weights.values())))
    if not texts or not all(map(is_inside, (*weights, *files))):
        raise damaged(path, "it holds files whose names lead elsewhere")
    for name, entry in tensors.items():
        match entry:
            case {"file": str(file), "dtype": str(code), "shape": [*_]} if (
                file in weights and code in DTYPES
            ):
                continue
        raise damaged(path, f"its contents say nothing sound of '{name}'")
    return archive


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
        yield name, archive.read(name)


def expand(
    path: str | os.PathLike[str], directory: str | os.PathLike[str]
) -> list[Path]:
    """Writes the directory that a compact file was made of.

    Tensors and all other files are bit for bit what went in; so are the files of
    weights that this package wrote. Headers of others are written anew.

    Args:
      path: path of the compact file.
      directory: path of what is written; nothing or an empty one may be there.

    Returns:
      The paths of its files.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: `directory` is taken.
      Damaged: the file is not what its header says, or a tensor or file that comes out
        of it is not the one that went in; nothing is left of the directory.
      Unknown: it is another kind of file.
      OSError: the directory could not be written; nothing is left of it.
    """
    archive = open_archive(Path(path))
    place = atomic.apart(directory, archive.path)
    atomic.check_room(place, sum(_bytes(archive.layout(f)) for f in archive.weights))
    with atomic.staged(place, replaceable=lambda _: _TAKEN) as partial:
        for name, metadata in archive.weights.items():
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            layout = archive.layout(name)
            safetensors_file.write(partial / name, layout, archive.read, metadata)
        for name in archive.files:
            write_other(archive, name, partial / name)
    return [place / name for name in (*archive.weights, *archive.files)]


def write_other(archive: Archive, name: str, path: Path) -> None:
    """Writes a file that holds no weights, held against its SHA-256."""
    if f"file/{name}" not in archive.entries:
        raise damaged(archive.path, f"it lacks '{name}'")
    content = archive.look(f"file/{name}")
    if _digest(content) != archive.files[name]:
        raise damaged(archive.path, f"'{name}' in it is not what went in")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.data)


def _why_not_ours(path: Path) -> str | None:
    """Why a path must not be replaced: only earlier compact files may be."""
    try:
        open_archive(path)
    except (ValueError, OSError):
        return "it is no compact file"
    return None
