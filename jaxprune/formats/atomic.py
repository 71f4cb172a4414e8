"""A folder appears under its name whole, or not at all.

It is written beside its place as `.NAME.partial` and renamed when all is on disk. The
writer holds a lock that the system drops when its process dies, so what a dead run left
is told from what a running one writes. A folder that is replaced is moved aside first
and comes back if the new one does not arrive.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from jaxprune.formats.safetensors_file import damaged

_CHUNK = 1 << 20

Replaceable = Callable[[Path], str | None]
"""Why an existing folder or file must not be replaced, or None where it may be."""


def apart(out: str | os.PathLike[str], source: Path) -> Path:
    """The place of a result, refused where it would touch what it is made from.

    Args:
      out: where the result goes.
      source: the folder or file that it is made from.

    Returns:
      `out`, absolute, links followed.

    Raises:
      ValueError: one of the two lies in the other.
    """
    place, origin = Path(out).resolve(), source.resolve()
    if place.is_relative_to(origin) or origin.is_relative_to(place):
        raise ValueError(
            f"a result must lie apart from its source, but '{place}' and '{origin}' "
            f"are in each other; choose a folder beside it."
        )
    return place


@contextlib.contextmanager
def staged(
    out: Path, *, replaceable: Replaceable | None = None, resume: bool = False
) -> Iterator[Path]:
    """A folder to fill, which takes its place when the block ends without an error.

    Args:
      out: the final place, absolute; nothing or an empty folder may be there.
      replaceable: decides whether a folder that holds something may be replaced; None
        replaces none.
      resume: whether the block finds what an earlier run left, and leaves what it wrote
        when it is stopped or the disk fails. Otherwise it begins empty, and it leaves
        nothing after an error.

    Yields:
      The folder beside, locked for this process.

    Raises:
      ValueError: the place is taken.
      OSError: another process writes to this place, or the disk fails.
    """
    partial = _beside(out, "partial")
    with _locked(partial):
        _recover(out)
        try:
            _check_free(out, replaceable)
            if not resume:
                _empty(partial)
            yield partial
            sync(partial)
            _place(partial, out)
        except BaseException as error:
            _recover(out)
            if not (resume and _may_go_on(error)):
                shutil.rmtree(partial, ignore_errors=True)
            with contextlib.suppress(OSError):
                partial.rmdir()
            raise


@contextlib.contextmanager
def staged_file(out: Path, *, replaceable: Replaceable | None = None) -> Iterator[Path]:
    """A file to write, which takes its place when the block ends without an error.

    Args:
      out: the final place, absolute.
      replaceable: decides whether a file that is there may be replaced; None replaces
        none.

    Yields:
      The path to write to; the block syncs the file.

    Raises:
      ValueError: the place is taken.
      OSError: another process writes to this place, or the disk fails.
    """
    partial = _beside(out, "partial")
    with _locked(partial):
        try:
            _check_free(out, replaceable)
            _empty(partial)
            yield partial / out.name
            os.replace(partial / out.name, out)
            sync(out.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


class Sink:
    """A file that is hashed as it is written, and on disk when its block ends.

    Example:
      >>> import pathlib, tempfile
      >>> from jaxprune.formats.atomic import Sink
      >>> with Sink(pathlib.Path(tempfile.mkdtemp()) / "file") as sink:
      ...     sink.put(b"abc")
      >>> sink.digest[:8]
      'ba7816bf'
    """

    def __init__(self, path: Path) -> None:
        self._file: BinaryIO = open(path, "wb")  # noqa: SIM115
        self._hash = hashlib.sha256()
        self._position = 0

    def __enter__(self) -> "Sink":
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is None:
            self._file.flush()
            os.fsync(self._file.fileno())
        self._file.close()

    @property
    def digest(self) -> str:
        """The SHA-256 of what was written so far."""
        return self._hash.hexdigest()

    def put(self, part: Any) -> None:
        """Writes bytes, or an array of them, at the end.

        Args:
          part: contiguous.
        """
        self._hash.update(part)
        self._position += self._file.write(part)

    def copy(self, origin: BinaryIO, end: int) -> None:
        """Copies from another file what lies there from this one's end on.

        Args:
          origin: open for reading.
          end: up to which position.

        Raises:
          Damaged: the other file ends before.
        """
        origin.seek(self._position)
        while self._position < end:
            part = origin.read(min(end - self._position, _CHUNK))
            if not part:
                raise damaged(
                    Path(origin.name), "it became shorter since it was opened"
                )
            self.put(part)


def sync(path: Path) -> None:
    """Makes the entries of a folder durable.

    Args:
      path: the folder.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _may_go_on(error: BaseException) -> bool:
    """Whether the same run may do better when it is started again."""
    return not isinstance(error, Exception) or isinstance(error, OSError | MemoryError)


def _beside(out: Path, what: str) -> Path:
    return out.with_name(f".{out.name}.{what}")


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Makes a folder and holds it for this process alone."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise OSError(
                errno.EBUSY,
                f"another run writes to '{folder}'; wait for it, or choose another "
                f"place",
            ) from None
        # The run that held it may have renamed it in between.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), folder.stat()):
                break
        os.close(descriptor)
    try:
        yield
    finally:
        os.close(descriptor)


def _check_free(out: Path, replaceable: Replaceable | None) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    reason = "there is something already"
    if replaceable is not None:
        reason = replaceable(out) or ""
    if reason:
        raise ValueError(
            f"the result must not destroy what is at '{out}', but {reason}; choose "
            f"another place, or remove it yourself."
        )


def _place(partial: Path, out: Path) -> None:
    """Puts a whole folder into its place; what was there goes when it has arrived."""
    if out.exists() and any(out.iterdir()):
        os.rename(out, _beside(out, "replaced"))
    os.rename(partial, out)
    sync(out.parent)
    shutil.rmtree(_beside(out, "replaced"), ignore_errors=True)


def _recover(out: Path) -> None:
    """Brings back, or clears, what a run that died while replacing moved aside."""
    replaced = _beside(out, "replaced")
    if not replaced.exists():
        return
    if out.exists():
        shutil.rmtree(replaced)
    else:
        os.rename(replaced, out)


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
