"""A checkpoint directory written again: some tensors new, all else byte for byte.

The result is a plain Hugging Face directory that every loader reads: true zeros, the
same files, names, shapes and dtypes. Beside them lies `jaxprune.json`, which says how
they were made, how many zeros each replaced tensor has (counted in what was written)
and the SHA-256 of every file. Tensors are written one at a time.
"""

import functools
import hashlib
import json
import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import jax.numpy as jnp
import numpy as np

from jaxprune.arrays.messages import listed
from jaxprune.files import atomic
from jaxprune.files.safetensors_file import (
    Damaged,
    TensorInfo,
    Unknown,
    damaged,
    is_inside,
    is_text,
    read_json,
)
from jaxprune.files.sink import Sink
from jaxprune.lm.checkpoints.checkpoint_dir import CheckpointDir, Progress, files_below
from jaxprune.lm.checkpoints.directory_writer import (
    Finish,
    Resume,
    Written,
    copy_file,
    is_written,
    write_files,
)
from jaxprune.lm.checkpoints.finite import check_tensor

NAME = "jaxprune.json"
FORMAT, VERSION = "jaxprune.export", 1

Values: TypeAlias = Any
"""An array of NumPy or JAX, or a function of nothing that returns one."""


_PAGE = "report.html"  # what the command writes beside
_CHUNK = 1 << 20


def write_directory(
    source: CheckpointDir,
    directory: str | os.PathLike[str],
    replaced: Mapping[str, Values],
    *,
    uncounted: Collection[str] = (),
    provenance: Mapping[str, Any],
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
    finish: Finish | None = None,
) -> list[Path]:
    """Writes a directory again, with new values for some of its tensors.

    Args:
      source: directory that is written again.
      directory: path of the new one, apart from the source.
      replaced: name to new values, in the stored shape; they are cast to the stored
        dtype, and minus zero becomes zero. A function is called when its turn comes.
      uncounted: names of those that were not pruned, so that their zeros say nothing.
      provenance: facts of how the values were made, JSON-able: "method", "pattern",
        "sparsity" (asked), and what else is known ("command", "calibration",
        "perplexity").
      overwrite: whether an earlier result of this function may be replaced. It is, once
        the new one is complete.
      resume: whether to keep files that an earlier run of the same source, names and
        provenance had finished. They are checked.
      progress: function that is called after every tensor.
      finish: function that is called before the directory takes its place, to measure
        what was written, say; what it returns is part of the result.

    Returns:
      The paths of the files.

    Raises:
      ValueError: a name is not in the source, a shape differs, values are NaN or
        infinite in the stored dtype; `directory` is taken, or not apart from the
        source; provenance uses a name of ours or is no JSON.
      TypeError: values are not floating where the stored tensor is.
      OSError: the directory could not be written.

    Example:
      >>> import pathlib, tempfile
      >>> import numpy as np
      >>> from safetensors.numpy import save_file
      >>> from jaxprune.lm.checkpoints import checkpoint_dir, rewrite
      >>> directory = pathlib.Path(tempfile.mkdtemp())
      >>> (directory / "a").mkdir()
      >>> _ = (directory / "a" / "config.json").write_text("{}")
      >>> save_file({"w": np.ones(4, "f4")}, directory / "a" / "model.safetensors")
      >>> source = checkpoint_dir.open_directory(directory / "a")
      >>> new = {"w": np.array([1.0, 0.0, 0.0, 1.0])}
      >>> facts = {"method": "by hand"}
      >>> _ = rewrite.write_directory(source, directory / "b", new, provenance=facts)
      >>> rewrite.read_provenance(directory / "b")["achieved"]
      0.5
    """
    place = atomic.apart(directory, source.path)
    facts = json.loads(json.dumps(dict(provenance), allow_nan=False))
    if foreign := [name for name in replaced if name not in source.tensors]:
        raise ValueError(
            f"replaced tensors must be tensors of '{source.path}', but "
            f"{listed(foreign)} are not; it has {listed(source.tensors)}"
        )
    for name, values in replaced.items():
        if not callable(values):
            _check_values(name, values, source.tensors[name])
    others = [name for name in source.others if name != NAME]
    paths = [source.path / name for name in (*source.metadata, *others)]
    # What an earlier run left lies on the disk already.
    on_disk = atomic.bytes_in(place.with_name(f".{place.name}.partial"))
    atomic.check_room(place, sum(path.stat().st_size for path in paths) - on_disk)
    advance = source.meter(progress)
    files: dict[str, Callable[[Path], Written]] = {
        file: functools.partial(
            _write_shard, source, file, replaced, uncounted, advance
        )
        for file in source.metadata
    }
    files |= {name: functools.partial(copy_file, source.path / name) for name in others}

    def skip(file: str) -> None:
        advance(file, sum(info.size for _, info in _within(source, file)))

    def record(
        counts: Mapping[str, Mapping[str, int]], digests: Mapping[str, str]
    ) -> dict[str, Any]:
        size = sum(count["size"] for count in counts.values())
        zeros = sum(count["zeros"] for count in counts.values())
        share = zeros / size if size else 0.0
        entries = {"achieved": share, "tensors": dict(counts), "files": dict(digests)}
        return {"format": FORMAT, "version": VERSION, **facts, **entries}

    # Equal for runs whose files are the same; hashing a large model takes minutes.
    stats = {name: (source.path / name).stat() for name in source.metadata}
    stamps = {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}
    job = json.dumps(
        [FORMAT, VERSION, str(source.path), stamps, sorted(replaced), facts],
        sort_keys=True,
    )
    digest = hashlib.sha256(job.encode()).hexdigest()
    return write_files(
        place,
        files,
        (NAME, record),
        replaceable=why_not_ours if overwrite else None,
        resume=Resume(digest, [*source.metadata], skip) if resume else None,
        finish=finish,
    )


def check_place(
    directory: str | os.PathLike[str], source: Path, *, overwrite: bool
) -> None:
    """Refuses before a long job a place that `write_directory` would refuse."""
    place = atomic.apart(directory, source)
    atomic.check_free(place, why_not_ours if overwrite else None)


def read_provenance(
    directory: str | os.PathLike[str], *, verify: bool = False
) -> dict[str, Any]:
    """What `jaxprune.json` says of a directory that `write_directory` wrote.

    Args:
      directory: the directory.
      verify: whether to hold every file against its SHA-256.

    Returns:
      What was given as provenance, and "achieved" (the share of zeros in the replaced
      tensors), "tensors" (name to "zeros" and "size") and "files" (name to SHA-256).

    Raises:
      Unknown: there is none, or it is of another format or version.
      Damaged: it is no such file, or with `verify` a file is not the one written.
    """
    file = Path(directory) / NAME
    if not file.is_file():
        raise Unknown(
            f"'{directory}' has no {NAME}; give a directory that jaxprune wrote"
        )
    record = read_json(file)
    written_as = record.get("format"), record.get("version")
    if written_as != (FORMAT, VERSION):
        raise Unknown(
            f"'{file}' must be of format {FORMAT} version {VERSION}, got "
            f"{written_as[0]} version {written_as[1]}; read it with the jaxprune that "
            "wrote it"
        )
    files = record.get("files")
    if not is_text(files) or not isinstance(record.get("tensors"), dict):
        raise damaged(file, "it lists no tensors and files")
    if verify:  # reads every byte
        for name, digest in record["files"].items():
            if not (is_inside(name) and is_written(file.parent / name, digest)):
                raise damaged(file.parent / name, "it is not what was written")
    return record


def _check_values(name: str, values: Any, info: TensorInfo) -> None:
    dtype = np.dtype(getattr(values, "dtype", None) or np.asarray(values).dtype)
    shape = np.shape(values)
    floating = all(jnp.issubdtype(d, jnp.floating) for d in (dtype, info.dtype))
    if shape != info.shape or not (dtype == info.dtype or floating):
        error = ValueError if shape != info.shape else TypeError
        raise error(
            f"'{name}' is {info.dtype} of shape {info.shape}, got {dtype} of shape "
            f"{shape}; transpose replaced values back, or cast them"
        )


def order(source: CheckpointDir, replaced: Collection[str]) -> list[str]:
    """The order in which `write_directory` asks for new values."""
    names = [name for file in source.metadata for name, _ in _within(source, file)]
    return [name for name in names if name in replaced]


def _within(source: CheckpointDir, file: str) -> Iterator[tuple[str, TensorInfo]]:
    return ((k, info) for k, info in source.tensors.items() if info.file == file)


def _write_shard(
    source: CheckpointDir,
    file: str,
    replaced: Mapping[str, Values],
    uncounted: Collection[str],
    advance: Callable[[str, int], None],
    path: Path,
) -> Written:
    """Writes one file of weights: the old bytes, but for the tensors replaced."""
    counts = {}
    with open(source.path / file, "rb") as origin, Sink(path) as sink:
        end = os.fstat(origin.fileno()).st_size  # what lies behind the last tensor too
        for name, info in _within(source, file):
            sink.copy(origin, info.offset)
            if name in replaced:
                # In place of the old bytes.
                zeros = _put_values(sink, name, info, replaced[name])
                if name not in uncounted:
                    counts[name] = {"zeros": zeros, "size": math.prod(info.shape)}
            else:
                sink.copy(origin, info.offset + info.size)
            advance(name, info.size)
        sink.copy(origin, end)
    return Written(sink.digest, counts)


def _put_values(sink: Sink, name: str, info: TensorInfo, values: Values) -> int:
    """Writes values in the stored dtype; how many are zero."""
    if callable(values):
        values = values()
        _check_values(name, values, info)
    array, zeros = np.asarray(values), 0
    if array.flags.c_contiguous:
        array = array.reshape(-1)
    # A million elements at once, or whole rows, so that nothing is copied whole.
    rows = max(1, _CHUNK * len(array) // max(array.size, 1)) if array.ndim else 1
    for start in range(0, len(array), rows):
        # What does not fit the stored dtype becomes infinite, and is refused.
        with np.errstate(over="ignore", invalid="ignore"):
            cast = np.array(array[start : start + rows], info.dtype, order="C")
        cast = cast.reshape(-1)
        check_tensor(name, cast)
        # Minus zero compares equal to zero, and becomes plus zero.
        cast[cast == 0] = 0
        zeros += cast.size - int(np.count_nonzero(cast))
        sink.put(cast.view(np.uint8))
    return zeros


def why_not_ours(path: Path) -> str | None:
    """Why a directory must not be replaced: only an earlier result may be."""
    try:
        files = read_provenance(path)["files"]
    except (Unknown, Damaged):
        return f"it has no {NAME} of an earlier result"
    names = files_below(path)
    if foreign := [n for n in names if n not in files and n not in (NAME, _PAGE)]:
        return f"it also holds {listed(foreign)}, which is not of an earlier result"
    return None
