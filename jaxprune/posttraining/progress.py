"""What a long job has done so far, on disk, so that a killed one can resume.

A directory belongs to one job: `job.json` holds its identity, and another job's
directory is refused. What is done is an entry with a name: some arrays in one file, and
a record that names the file's digest and is renamed into place last. What has no whole
record is done again. Of several processes, which share the directory, the first one
looks and writes.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxprune.arrays import processes
from jaxprune.files import atomic, safetensors_file

_JOB = "job.json"


class ProgressLog:
    """The entries of a job that are done, each by its name.

    Attributes:
      directory: directory of the files.

    Example:
      >>> import pathlib, tempfile
      >>> place = pathlib.Path(tempfile.mkdtemp())
      >>> log = ProgressLog(place, {"batches": 8})
      >>> log.write("segment_00000", {"w": np.ones(2)}, {"error": 0.5})
      >>> arrays, record = ProgressLog(place, {"batches": 8}).read("segment_00000")
      >>> arrays["w"].tolist(), record
      ([1.0, 1.0], {'error': 0.5})
      >>> log.read("segment_00001") is None
      True
    """

    def __init__(self, directory: Path, job: Mapping[str, Any]) -> None:
        """Opens or begins the directory of a job.

        Args:
          directory: directory of its own, which is made.
          job: JSON-able identity of the job: all that decides the result.

        Raises:
          ValueError: the directory is another job's.
        """
        self.directory = directory
        processes.on_first(lambda: atomic.begin_or_resume(directory / _JOB, job))

    def read(self, entry: str) -> tuple[dict[str, np.ndarray], Any] | None:
        """The arrays of an entry, mapped from its file, and its record.

        Args:
          entry: name of the entry.

        Returns:
          Arrays by name and the record; None where the files are missing or damaged.
        """
        record = processes.on_first(lambda: self._record(entry))
        if record is None:
            return None
        path, _ = self._paths(entry)

        def mapped() -> dict[str, np.ndarray]:
            tensors, _ = safetensors_file.read_header(path)
            return {k: safetensors_file.view(path, v) for k, v in tensors.items()}

        return processes.together(mapped), record

    def array(self, entry: str, name: str) -> np.ndarray:
        """One array of an entry whose files are whole, mapped from its file."""
        path, _ = self._paths(entry)
        tensors, _ = safetensors_file.read_header(path)
        return safetensors_file.view(path, tensors[name])

    def write(self, entry: str, arrays: Mapping[str, np.ndarray], record: Any) -> None:
        """Notes an entry as done.

        Args:
          entry: name of the entry, which files are named by.
          arrays: arrays by name.
          record: anything JSON-able but None.
        """
        processes.on_first(lambda: self._write(entry, arrays, record))

    def forget(self, entry: str) -> None:
        """Makes room: the entry counts as not done."""
        for path in reversed(self._paths(entry)):
            path.unlink(missing_ok=True)

    def _record(self, entry: str) -> Any:
        """The record of an entry; None where its files are missing or damaged."""
        path, record = self._paths(entry)
        try:
            body = json.loads(record.read_text(encoding="utf-8"))
            if body["sha256"] != atomic.digest(path):
                return None
            safetensors_file.read_header(path)
            return body["record"]
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _write(self, entry: str, arrays: Mapping[str, np.ndarray], record: Any) -> None:
        path, place = self._paths(entry)
        partial = path.with_suffix(".partial")
        entries = {name: (array.dtype, array.shape) for name, array in arrays.items()}
        safetensors_file.write(partial, entries, lambda name: arrays[name])
        os.replace(partial, path)
        # Last, so that a record stands for arrays that are whole.
        body = {"sha256": atomic.digest(path), "record": record}
        atomic.replace(place, json.dumps(body).encode())

    def _paths(self, entry: str) -> tuple[Path, Path]:
        place = self.directory
        return place / f"{entry}.safetensors", place / f"{entry}.json"
