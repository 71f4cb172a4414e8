"""A file that is hashed as it is written, and on disk when its block ends."""

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from jaxprune.files.safetensors_file import damaged

_CHUNK = 1 << 20  # bytes copied at a time


class Sink:
    """A file that is hashed as it is written, and on disk when its block ends.

    Example:
      >>> import pathlib, tempfile
      >>> from jaxprune.files.sink import Sink
      >>> with Sink(pathlib.Path(tempfile.mkdtemp()) / "file") as sink:
      ...     sink.put(b"abc")
      >>> sink.digest[:8]
      'ba7816bf'
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: BinaryIO = open(path, "wb")  # noqa: SIM115
        self._hash = hashlib.sha256()
        self._position = 0

    def __enter__(self) -> "Sink":
        return self

    def __exit__(self, error_type: Any, *_: Any) -> None:
        with naming_path(self._path), self._file:
            if error_type is None:
                self._file.flush()
                # Before the rename: a name must not stand for bytes that may be lost.
                os.fsync(self._file.fileno())

    @property
    def digest(self) -> str:
        """The SHA-256 of what was written so far."""
        return self._hash.hexdigest()

    def put(self, part: Any) -> None:
        """Writes bytes, or a contiguous array of them, at the end."""
        self._hash.update(part)
        with naming_path(self._path):
            self._position += self._file.write(part)

    def copy(self, origin: BinaryIO, end: int) -> None:
        """Copies what another file has from this one's end on, up to `end`."""
        # Read anew in pieces: a copy by the system would bypass the hash.
        origin.seek(self._position)
        while self._position < end:
            part = origin.read(min(end - self._position, _CHUNK))
            if not part:
                raise damaged(
                    Path(origin.name), "it became shorter since it was opened"
                )
            self.put(part)


@contextlib.contextmanager
def naming_path(path: Path) -> Iterator[None]:
    """Adds the path to errors of the system that name no file: a full disk, say."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise
