"""A compact file as the directory that it was made of: its tensors stay in the file.

Its small files and the headers of its weights are written to a scratch directory, and
the weights' files end in a hole of their size, which takes no room. So everything that
reads directories reads compact files, but for the tensors, which come out of the file.
"""

import contextlib
import dataclasses
import hashlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from jaxprune.arrays.rules import command_words
from jaxprune.files.safetensors_file import DTYPES, damaged, view
from jaxprune.lm.checkpoints.checkpoint_dir import CheckpointDir, open_directory
from jaxprune.lm.checkpoints.compact_archive import (
    checked_chunks,
    checked_tensor,
    open_archive,
)
from jaxprune.lm.checkpoints.compact_codecs import Archive, chunks


@dataclasses.dataclass(frozen=True)
class CompactSource(CheckpointDir):
    """The directory of a compact file.

    Attributes:
      archive: the file.
    """

    archive: Archive = dataclasses.field(kw_only=True)
    is_mapped: ClassVar[bool] = False  # a tensor is decoded

    def read(self, name: str) -> np.ndarray:
        """A tensor, dense, held against its SHA-256."""
        return checked_tensor(self.archive, name)

    def stored(self, name: str) -> dict[str, np.ndarray]:
        """What the file holds of a tensor with a mask, held against its SHA-256.

        Args:
          name: one of `tensors`, of encoding "mask" or "levels".

        Returns:
          Views of the file: "mask", "values", and of levels "scales".
        """
        for _ in checked_chunks(self.archive, name):
            pass  # a chunk is dense at a time
        archive, values = self.archive, f"values/{name}"
        if values in archive.entries:
            return {
                "mask": archive.look(f"mask/{name}"),
                "values": archive.look(values),
            }
        return {
            "mask": archive.look(f"mask/{name}"),
            "values": archive.look(f"levels/{name}"),
            "scales": view(archive.path, archive.entries[f"scales/{name}"]),
        }


@contextlib.contextmanager
def open_source(path: Path) -> Iterator[CheckpointDir]:
    """A model's directory, or the compact file of one.

    Args:
      path: path of the directory or of the file.

    Yields:
      The directory; a `CompactSource`, whose small files last as long as this, where
      it is a file.

    Raises:
      Damaged: the file is not what its header says, or a small file in it is not the
        one that went in.
      Unknown: it is no compact file, or what `open_directory` refuses.
    """
    if not path.is_file():
        yield open_directory(path)
        return
    archive = open_archive(path)
    with tempfile.TemporaryDirectory() as scratch:
        for name, digest in archive.files.items():
            _write_small(archive, name, digest, Path(scratch) / name)
        try:
            opened = open_directory(scratch)
            yield CompactSource(**vars(opened), archive=archive)
        except ValueError as error:
            # Who gave a file knows nothing of the scratch directory.
            place = str(Path(scratch).absolute())
            if place not in str(error):
                raise
            refused: Any = type(error)(str(error).replace(place, str(path)))
            refused.command = command_words(error).replace(place, str(path))
            raise refused from None


def _write_small(archive: Archive, name: str, digest: str, path: Path) -> None:
    """Writes a file of the directory; of one with weights, all but the weights."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if f"file/{name}" in archive.entries:
        content = b"".join(
            part.tobytes() for part in chunks(archive.look(f"file/{name}"))
        )
        if hashlib.sha256(content).hexdigest() != digest:
            raise damaged(archive.path, f"'{name}' in it is not what went in")
        path.write_bytes(content)
        return
    head = archive.look(f"header/{name}").tobytes()
    entries = [e for e in archive.tensors.values() if e["file"] == name]
    sizes = [
        int(np.prod(e["shape"], dtype=np.int64)) * DTYPES[e["dtype"]].itemsize
        for e in entries
    ]
    with open(path, "wb") as file:
        file.write(head)
        file.truncate(len(head) + sum(sizes))
