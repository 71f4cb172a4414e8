"""Writes a directory file by file: the one writer of checkpoint directories.

Each file has a function that writes it. The directory appears complete, with a record
of all files, or not at all; a run that was killed goes on after its last file.
"""

import os
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from jaxprune.files import atomic
from jaxprune.files.safetensors_file import read_json
from jaxprune.files.sink import Sink

Finish: TypeAlias = Callable[
    [Path, Mapping[str, Any]], tuple[Mapping[str, Any], Mapping[str, bytes]]
]
"""A function of a directory that lacks only its record, and of that record. It returns
further entries of the record, and further files: name to content."""


Record: TypeAlias = Callable[
    [Mapping[str, Mapping[str, int]], Mapping[str, str]], Mapping[str, Any]
]
"""A function of the counts of tensors, and of the SHA-256 of files, to the record."""
_STATE = ".state.json"


class Written(NamedTuple):
    """A file that was written.

    Attributes:
      sha256: of its bytes.
      tensors: name to "zeros" and "size" of the tensors in it that were counted.
    """

    sha256: str
    tensors: Mapping[str, Mapping[str, int]] = {}


class Resume(NamedTuple):
    """How a directory goes on after a run that was killed.

    Attributes:
      job: digest of all that decides the content of the files; another job's are
        removed.
      files: names of the files that are kept; the others are quickly written again.
      skip: function that is called with the name of a file that is there already.
    """

    job: str
    files: Collection[str]
    skip: Callable[[str], None]


def write_files(
    place: Path,
    files: Mapping[str, Callable[[Path], Written]],
    record: tuple[str, Record],
    *,
    replaceable: Callable[[Path], str | None] | None = None,
    resume: Resume | None = None,
    finish: Finish | None = None,
) -> list[Path]:
    """Writes a directory file by file, and a record of it; all appears at once.

    Args:
      place: path of the directory.
      files: name to a function that writes the file, in order.
      record: name of the record and a function of all counted tensors and of all
        SHA-256 to its content, JSON-able.
      replaceable: function to the reason why an earlier directory must not be replaced,
        or None; see `atomic.staged`.
      resume: rules of what is kept of an earlier run; None for nothing.
      finish: function that is called before the directory takes its place.

    Returns:
      The paths of the files.
    """
    record_name, content = record
    begun = resume is not None
    with atomic.staged(place, replaceable=replaceable, resume=begun) as partial:
        done = {} if resume is None else _finished(partial, resume.job)
        for name, write in files.items():
            if resume is not None and name in done:
                resume.skip(name)  # it was checked against its SHA-256
                continue
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            done[name] = write(partial / name)
            if resume is not None and name in resume.files:
                state = {n: done[n]._asdict() for n in resume.files if n in done}
                atomic.replace_json(
                    partial / _STATE, {"job": resume.job, "done": state}
                )
        for folder in {(partial / name).parent for name in files}:
            atomic.sync(folder)  # names are on disk before the record that lists them
        digests = {name: done[name].sha256 for name in files}
        counts = {k: v for name in files for k, v in done[name].tensors.items()}
        facts = content(counts, digests)
        further_facts, pages = finish(partial, facts) if finish else ({}, {})
        atomic.replace_files(partial, pages)
        # Last: a directory without it is not complete.
        atomic.replace_json(partial / record_name, {**facts, **further_facts})
        (partial / _STATE).unlink(missing_ok=True)
    return [place / name for name in (*digests, *pages, record_name)]


def _finished(partial: Path, job: str) -> dict[str, Written]:
    """The complete files of an earlier run of this job; all else is removed."""
    done: dict[str, Written] = {}
    if (partial / _STATE).is_file():
        state = read_json(partial / _STATE)
        if state.get("job") == job:
            done = {
                name: Written(**file)
                for name, file in state["done"].items()
                if is_written(partial / name, file["sha256"])
            }
    # Half-written files, and whole ones of another job.
    for path in partial.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in (*done, _STATE):
            path.unlink()
    return done


def copy_file(origin: Path, target: Path) -> Written:
    """Copies a file."""
    with open(origin, "rb") as file, Sink(target) as sink:
        sink.copy(file, os.fstat(file.fileno()).st_size)
    return Written(sink.digest)


def is_written(path: Path, sha256: str) -> bool:
    """Whether a file can be read and is what was written."""
    try:
        return path.is_file() and atomic.digest(path) == sha256
    except OSError:
        return False
