"""A checkpoint directory written again: some tensors new, all else byte for byte.

The result is a plain Hugging Face directory that every loader reads: true zeros, the
same files, names, shapes and dtypes. Beside them lies `jaxprune.json`, which says how
they were made, how many zeros each replaced tensor has (counted in what was written)
and the SHA-256 of every file. Tensors are written one at a time.
"""

import hashlib
import json
import math
import os
import shutil
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

NAME = "jaxprune.json"
FORMAT, VERSION = "jaxprune.export", 1

Values: TypeAlias = Any
"""An array of NumPy or JAX, or a function of nothing that returns one."""


Finish: TypeAlias = Callable[
    [Path, Mapping[str, Any]], tuple[Mapping[str, Any], Mapping[str, bytes]]
]
"""A function of a directory that lacks only its record, and of that record. It returns
further entries of the record, and further files: name to content."""


_STATE = ".state.json"
_PAGE = "report.html"  # what the command writes beside
_CHUNK = 1 << 20
_OURS = ("format", "version", "achieved", "tensors", "files")


def write(
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
      source: the directory.
      directory: the new one, apart from the source.
      replaced: name to new values, in the stored shape; they are cast to the stored
        dtype, and minus zero becomes zero. A function is called when its turn comes.
      uncounted: which of those were not pruned, so that their zeros say nothing.
      provenance: JSON-able; how the values were made: "method", "pattern", "sparsity"
        (asked), and what else is known ("command", "calibration", "perplexity").
      overwrite: whether an earlier result of this function may be replaced. It is, once
        the new one is whole.
      resume: whether to keep files that an earlier run of the same source, names and
        provenance had finished. They are checked.
      progress: called after every tensor.
      finish: called before the directory takes its place, to measure what was written,
        say; what it returns is part of the result.

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
      >>> _ = rewrite.write(source, directory / "b", new, provenance={"method": "hand"})
      >>> rewrite.read_provenance(directory / "b")["achieved"]
      0.5
    """
    place = atomic.apart(directory, source.path)
    facts = _checked(source, replaced, provenance)
    others = [name for name in source.others if name != NAME]
    job = _job(source, replaced, facts)
    ours = why_not_ours if overwrite else None
    sizes = [
        (source.path / name).stat().st_size for name in (*source.metadata, *others)
    ]
    # What an earlier run left lies on the disk already.
    done_before = atomic.bytes_in(place.with_name(f".{place.name}.partial"))
    atomic.check_room(place, sum(sizes) - done_before)
    with atomic.staged(place, replaceable=ours, resume=resume) as partial:
        done = _finished(partial, job)
        advance = source.meter(progress)
        for file in source.metadata:
            if file in done:
                advance(file, sum(i.size for _, i in _within(source, file)))
                continue
            done[file] = _write_shard(
                source, file, partial, replaced, uncounted, advance
            )
            atomic.replace_json(partial / _STATE, {"job": job, "done": done})
        digests = {file: made["sha256"] for file, made in done.items()}
        for name in others:
            digests[name] = copy(source.path / name, partial / name)
        counts = {k: v for made in done.values() for k, v in made["tensors"].items()}
        for folder in {(partial / name).parent for name in others}:
            atomic.sync(folder)
        record = _record(facts, counts, digests)
        more, files = finish(partial, record) if finish else ({}, {})
        atomic.replace_files(partial, files)
        atomic.replace_json(partial / NAME, record | dict(more))
        (partial / _STATE).unlink()
    return [place / name for name in (*digests, *files, NAME)]


def check_place(
    directory: str | os.PathLike[str], source: Path, *, overwrite: bool
) -> None:
    """Refuses, before a long job, a place that `write` would refuse after it."""
    place = atomic.apart(directory, source)
    atomic.check_free(place, why_not_ours if overwrite else None)


def read_provenance(
    directory: str | os.PathLike[str], *, verify: bool = False
) -> dict[str, Any]:
    """What `jaxprune.json` says of a directory that `write` wrote.

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
    kind = (record.get("format"), record.get("version"))
    if kind != (FORMAT, VERSION):
        raise Unknown(
            f"'{file}' must be of format {FORMAT} version {VERSION}, got {kind[0]} "
            f"version {kind[1]}; read it with the jaxprune that wrote it"
        )
    files = record.get("files")
    if not is_text(files) or not isinstance(record.get("tensors"), dict):
        raise damaged(file, "it lists no tensors and files")
    if verify:
        for name, digest in record["files"].items():
            if not (is_inside(name) and _is_whole(file.parent / name, digest)):
                raise damaged(file.parent / name, "it is not what was written")
    return record


def _checked(
    source: CheckpointDir, replaced: Mapping[str, Values], provenance: Mapping[str, Any]
) -> dict[str, Any]:
    """The provenance as JSON, after all has been refused that can be at once."""
    if foreign := [name for name in replaced if name not in source.tensors]:
        raise ValueError(
            f"replaced tensors must be tensors of '{source.path}', but "
            f"{listed(foreign)} are not; it has {listed(source.tensors)}"
        )
    for name, values in replaced.items():
        if not callable(values):
            _check_kind(name, values, source.tensors[name])
    if taken := [name for name in _OURS if name in provenance]:
        raise ValueError(
            f"{listed(taken)} are written by jaxprune itself; leave them out of the "
            f"provenance"
        )
    try:
        return json.loads(json.dumps(dict(provenance), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise type(error)(
            f"the provenance must be JSON-able without NaN ({error}); give numbers, "
            f"strings, lists and dictionaries"
        ) from None


def _check_kind(name: str, values: Any, info: TensorInfo) -> None:
    if np.shape(values) != info.shape:
        raise ValueError(
            f"replaced values must have the stored shape, but '{name}' is "
            f"{info.shape} and got {np.shape(values)}; transpose them back"
        )
    given = np.dtype(getattr(values, "dtype", None) or np.asarray(values).dtype)
    floating = jnp.issubdtype(given, jnp.floating)
    if given != info.dtype and not (
        floating and jnp.issubdtype(info.dtype, jnp.floating)
    ):
        raise TypeError(
            f"replaced values must be floating like what is stored, but '{name}' is "
            f"{info.dtype} and got {given}; cast them first"
        )


def _job(
    source: CheckpointDir, replaced: Mapping[str, Values], facts: Mapping[str, Any]
) -> str:
    """What must be equal for a finished file of an earlier run to be of this one."""
    stats = {name: (source.path / name).stat() for name in source.metadata}
    files = {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}
    whole = [FORMAT, VERSION, str(source.path), files, sorted(replaced), facts]
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()


def _finished(partial: Path, job: str) -> dict[str, Any]:
    """The whole files of an earlier run of this job; all else is removed."""
    done: dict[str, Any] = {}
    if (partial / _STATE).is_file():
        try:
            state = read_json(partial / _STATE)
        except Damaged:
            state = {}
        if state.get("job") == job:
            done = {
                name: made
                for name, made in state["done"].items()
                if _is_whole(partial / name, made["sha256"])
            }
    # Half-written files, and whole ones of another job.
    for path in partial.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in (*done, _STATE):
            path.unlink()
    return done


def order(source: CheckpointDir, replaced: Collection[str]) -> list[str]:
    """The order in which `write` asks for new values."""
    names = [name for file in source.metadata for name, _ in _within(source, file)]
    return [name for name in names if name in replaced]


def _within(source: CheckpointDir, file: str) -> Iterator[tuple[str, TensorInfo]]:
    return ((k, info) for k, info in source.tensors.items() if info.file == file)


def _write_shard(
    source: CheckpointDir,
    file: str,
    partial: Path,
    replaced: Mapping[str, Values],
    uncounted: Collection[str],
    advance: Callable[[str, int], None],
) -> dict[str, Any]:
    """Writes one file of weights: the old bytes, but for the tensors replaced."""
    counts = {}
    with open(source.path / file, "rb") as origin, Sink(partial / file) as sink:
        end = os.fstat(origin.fileno()).st_size
        for name, info in _within(source, file):
            sink.copy(origin, info.offset)
            if name in replaced:
                zeros = _put_values(sink, name, info, replaced[name])
                if name not in uncounted:
                    counts[name] = {"zeros": zeros, "size": math.prod(info.shape)}
            else:
                sink.copy(origin, info.offset + info.size)
            advance(name, info.size)
        sink.copy(origin, end)
    return {"sha256": sink.digest, "tensors": counts}


def _put_values(sink: Sink, name: str, info: TensorInfo, values: Values) -> int:
    """Writes values in the stored dtype; how many are zero."""
    if callable(values):
        values = values()
        _check_kind(name, values, info)
    array, zeros = np.asarray(values), 0
    for part in _parts(array):
        with np.errstate(over="ignore", invalid="ignore"):
            cast = np.array(part, info.dtype, order="C").reshape(-1)
        if not np.isfinite(cast).all():
            raise ValueError(
                f"replaced values must be finite, but '{name}' holds NaN or infinity "
                f"as {info.dtype}; look at the method, or leave the tensor out"
            )
        # Minus zero compares equal to zero, and becomes plus zero.
        cast[cast == 0] = 0
        zeros += cast.size - int(np.count_nonzero(cast))
        sink.put(cast.view(np.uint8))
    return zeros


def _parts(array: np.ndarray) -> Iterator[np.ndarray]:
    """An array in pieces of a million elements, in C order."""
    if array.flags.c_contiguous:
        array = array.reshape(-1)
    # Of an array that is not contiguous whole rows, so that nothing is copied at once.
    rows = max(1, _CHUNK * len(array) // max(array.size, 1)) if array.ndim else 1
    for start in range(0, len(array), rows):
        yield array[start : start + rows]


def copy(origin: Path, target: Path) -> str:
    """Copies a file; its SHA-256."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(origin, "rb") as file, Sink(target) as sink:
        sink.copy(file, os.fstat(file.fileno()).st_size)
    return sink.digest


def _record(
    facts: Mapping[str, Any],
    counts: Mapping[str, Mapping[str, int]],
    digests: Mapping[str, str],
) -> dict[str, Any]:
    size = sum(count["size"] for count in counts.values())
    zeros = sum(count["zeros"] for count in counts.values())
    return {
        "format": FORMAT,
        "version": VERSION,
        **facts,
        "achieved": zeros / size if size else 0.0,
        "tensors": dict(counts),
        "files": dict(digests),
    }


def _is_whole(path: Path, sha256: str) -> bool:
    """Whether a file can be read and is what was written."""
    try:
        return atomic.digest(path) == sha256
    except OSError:
        return False


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
