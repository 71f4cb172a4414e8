"""A compact file as the directory that it was made of: its tensors stay in the file.

Its small files and the headers of its weights are written to a scratch directory, and
the weights' files end in a hole of their size, which takes no room. So everything that
reads directories reads compact files, but for the tensors, which come out of the file.
"""

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from jaxprune.arrays.rules import command_words
from jaxprune.files.safetensors_file import DTYPES, write_header
from jaxprune.lm.checkpoints.checkpoint_dir import CheckpointDir, open_directory
from jaxprune.lm.checkpoints.compact import Archive, open_archive, write_other

_CODES = {dtype: code for code, dtype in DTYPES.items()}


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
        return self.archive.read(name)

    def stored(self, name: str) -> dict[str, np.ndarray]:
        """What the file holds of a tensor with a mask, held against its SHA-256.

        Args:
          name: one of `tensors`.

        Returns:
          Views of the file: "mask", and "values" or "levels" and "scales"; empty for a
          tensor that is stored dense.
        """
        parts = {
            prefix: self.archive.look(f"{prefix}/{name}")
            for prefix in ("mask", "values", "levels", "scales")
            if f"{prefix}/{name}" in self.archive.entries
        }
        if parts:
            self.archive.read(name)  # which checks it
        return parts


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
        for name in archive.files:
            write_other(archive, name, Path(scratch) / name)
        for name, metadata in archive.weights.items():
            layout = archive.layout(name)
            entries = {n: (_CODES[d], shape) for n, (d, shape) in layout.items()}
            (Path(scratch) / name).parent.mkdir(parents=True, exist_ok=True)
            with open(Path(scratch) / name, "wb") as file:
                places = write_header(file, entries, metadata)
                ends = [info.offset + info.size for info in places.values()]
                file.truncate(max(ends, default=file.tell()))
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
