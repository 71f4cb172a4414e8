"""A file or directory appears under its name whole, or not at all.

It is written beside its place as `.NAME.partial`, synced to disk and renamed. Who
writes a directory holds a lock that the system drops when the process ends, so what a
killed run left differs from what a running one writes. A directory that is replaced is
moved aside first and moved back if the new one fails. A directory in which a run can be
resumed names its job, and another job is refused.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxprune.arrays import rules
from jaxprune.arrays.rules import refusal
from jaxprune.files.safetensors_file import read_json
from jaxprune.files.sink import Sink

Replaceable = Callable[[Path], str | None]
"""Why an existing directory or file must not be replaced, or None where it may be."""


def replace(path: Path, content: bytes) -> None:
    """Writes a file that is whole on disk, or as it was before.

    Args:
      path: the file; its directory is made where absent.
      content: all of it.

    Raises:
      OSError: it could not be written; what was there is kept.

    Example:
      >>> import pathlib, tempfile
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "file"
      >>> replace(path, b"abc")
      >>> path.read_text()
      'abc'
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same directory: a rename is atomic only within one file system.
    partial = _beside(path, "partial")
    try:
        with Sink(partial) as sink:
            sink.put(content)
        os.replace(partial, path)
    finally:
        # After the rename there is nothing left to remove; after an error there is.
        partial.unlink(missing_ok=True)


def replace_json(path: Path, content: Any) -> None:
    """Writes JSON as `replace` writes bytes; NaN and infinity are a ValueError."""
    replace(path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())


def replace_files(directory: Path, files: Mapping[str, bytes]) -> list[Path]:
    """Writes some files of a directory, each as `replace` does; their paths."""
    for name, content in files.items():
        replace(directory / name, content)
    return [directory / name for name in files]


def begin_or_resume(path: Path, job: Mapping[str, Any]) -> bool:
    """Whether the job that a directory belongs to was begun; notes it if there is none.

    Args:
      path: JSON file that names the job; its directory is the job's.
      job: JSON-able settings that decide the result.

    Returns:
      Whether the same job was begun before.

    Raises:
      ValueError: the directory belongs to another job.
      Damaged: the file is no JSON object.
    """
    if not path.exists():
        replace_json(path, dict(job))
        return False
    different = "; ".join(differences(read_json(path), job))
    if different:
        raise ValueError(
            f"'{path.parent}' belongs to another job: {different}; give the old values "
            "to resume it, delete it to begin anew, or choose another directory"
        )
    return True


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """The entries of nested mappings, their names joined by dots."""
    if not isinstance(tree, Mapping):
        return {prefix: tree}
    entries: dict[str, Any] = {}
    for name, value in tree.items():
        entries |= flat(value, f"{prefix}.{name}" if prefix else str(name))
    return entries


def differences(begun: Mapping[str, Any], job: Mapping[str, Any]) -> list[str]:
    """How two jobs differ, entry by entry.

    Args:
      begun: settings of the old job, read from JSON: tuples are lists.
      job: JSON-able settings of the new job.

    Returns:
      A phrase for each entry that differs.

    Example:
      >>> differences({"data": {"seed": 0}}, {"data": {"seed": 1}})
      ['data.seed was 0 and is 1']
    """
    # The new job goes through JSON as the old one did: tuples become lists.
    old, new = flat(dict(begun)), flat(json.loads(json.dumps(dict(job))))
    return [
        f"{name} was {old.get(name, 'absent')!r} and is {new.get(name, 'absent')!r}"
        for name in {**old, **new}
        if name not in old or name not in new or old[name] != new[name]
    ]


def check_room(place: Path, size: int) -> None:
    """Refuses a place that cannot be written to, or has no room for so many bytes."""
    home = next(parent for parent in place.resolve().parents if parent.exists())
    # Permissions say too little (a read-only mount, a quota): a file is made and gone.
    tempfile.TemporaryFile(dir=home).close()
    free = shutil.disk_usage(home).free
    if free < size:
        raise OSError(
            f"'{home}' must have room for {size:,} bytes, but {free:,} are free; make "
            "room, or choose another place"
        )


def bytes_in(directory: Path) -> int:
    """The bytes of the files in a directory and below; 0 where there is none."""
    files = (path for path in directory.rglob("*") if path.is_file())
    return sum(path.stat().st_size for path in files)


def digest(path: Path) -> str:
    """The SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def apart(place: str | os.PathLike[str], source: Path) -> Path:
    """The absolute place of a result, refused where it and its source touch."""
    place, origin = Path(place).resolve(), source.resolve()
    if place.is_relative_to(origin) or origin.is_relative_to(place):
        raise ValueError(
            f"a result must lie apart from its source, but '{place}' and '{origin}' "
            "are in each other; choose a directory beside it"
        )
    return place


@contextlib.contextmanager
def staged(
    place: Path, *, replaceable: Replaceable | None = None, resume: bool = False
) -> Iterator[Path]:
    """A directory to fill, which takes its place when the block ends without an error.

    Args:
      place: final place, absolute; nothing or an empty directory may be there.
      replaceable: function that decides whether a directory that holds something may be
        replaced; None replaces none.
      resume: whether the directory still holds what an earlier run left, and keeps what
        the block wrote if the block is stopped or the disk, memory or device fails.
        Otherwise the directory begins empty, and nothing is left after an error.

    Yields:
      The directory beside, locked for this process.

    Raises:
      ValueError: the place is taken.
      OSError: another process writes to this place, or the disk fails.
    """
    partial = _beside(place, "partial")
    with locked(partial):
        _recover(place)
        try:
            check_free(place, replaceable)
            if not resume:
                _empty(partial)
            yield partial
            _check_still_free(place, replaceable)
            # The entries must be durable before the name is theirs.
            sync(partial)
            _place(partial, place)
        except BaseException as error:
            _recover(place)
            # What a crash of the disk or device left is good; other errors come again.
            # RuntimeError is JAX's, of a device.
            passing = OSError | MemoryError | RuntimeError
            stopped = not isinstance(error, Exception) or isinstance(error, passing)
            if not (resume and stopped):
                shutil.rmtree(partial, ignore_errors=True)
            # An empty one is of no use to a run that resumes.
            with contextlib.suppress(OSError):
                partial.rmdir()
            raise


@contextlib.contextmanager
def staged_file(
    place: Path, *, replaceable: Replaceable | None = None
) -> Iterator[Path]:
    """`staged` for a file: yields the path to write to, which the block must sync."""
    partial = _beside(place, "partial")
    with locked(partial):
        try:
            if place.is_dir():
                raise ValueError(f"'{place}' is a directory; give the name of a file")
            check_free(place, replaceable)
            _empty(partial)
            yield partial / place.name
            _check_still_free(place, replaceable)
            os.replace(partial / place.name, place)
            sync(place.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Makes a directory and locks it for this process until the block ends."""
    while True:
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise OSError(
                errno.EBUSY,
                f"another run writes to '{directory}'; wait for it, or choose another "
                "place",
            ) from None
        # The run that held it may have renamed it in between.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), directory.stat()):
                break
        os.close(descriptor)
    try:
        yield
    finally:
        os.close(descriptor)


def sync(directory: Path) -> None:
    """Makes the entries of a directory durable."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _beside(place: Path, what: str) -> Path:
    return place.with_name(f".{place.name}.{what}")


def _check_still_free(place: Path, replaceable: Replaceable | None) -> None:
    """Refuses a place that was taken while the result was made."""
    try:
        check_free(place, replaceable)
    except ValueError as error:  # the same run ends well once the place is free
        raise rules.reworded(error, FileExistsError) from None


def check_free(place: Path, replaceable: Replaceable | None) -> None:
    """Refuses a place that holds something, unless `replaceable` allows it."""
    inside = place.is_dir() and Path.cwd().is_relative_to(place.resolve())
    if place.is_mount() or inside:
        raise ValueError(
            f"a result cannot take the place of '{place}', where a disk is mounted or "
            "this process runs; give a directory inside it"
        )
    if _is_free(place):
        return
    reason: str | None = "there is something already"
    ways = [f", or {way} if it is an earlier result" for way in _OVERWRITE]
    if replaceable is not None:
        reason, ways = replaceable(place), ["", ""]
    if reason:
        raise refusal(
            f"the result must not destroy what is at '{place}', but {reason}",
            f"choose another place{ways[0]}",
            f"choose another place{ways[1]}",
        )


def _place(partial: Path, place: Path) -> None:
    """Puts a whole directory into its place, and removes what was there after that."""
    # The system replaces no directory that holds something: two renames, which
    # `_recover` completes or undoes if the process dies in between.
    if not _is_free(place):
        os.rename(place, _beside(place, "replaced"))
    os.rename(partial, place)
    sync(place.parent)
    shutil.rmtree(_beside(place, "replaced"), ignore_errors=True)


def _recover(place: Path) -> None:
    """Brings back, or clears, what a run that died while replacing moved aside."""
    replaced = _beside(place, "replaced")
    if not replaced.exists():
        return
    if _is_free(place):  # an empty directory may be what a job's script made
        os.rename(replaced, place)
    else:
        shutil.rmtree(replaced)


def _is_free(place: Path) -> bool:
    """Whether there is nothing, or an empty directory."""
    return not place.exists() or (place.is_dir() and not any(place.iterdir()))


def _empty(directory: Path) -> None:
    for path in directory.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


_OVERWRITE = "pass overwrite=True", "give --overwrite"
