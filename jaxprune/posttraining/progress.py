"""What a long pruning has done so far, on disk, so that a killed one can resume.

One pair of files a segment: the weights that were pruned in it, and a record that names
their digest and is renamed into place last. A segment without a whole record is pruned
again. A directory belongs to one job; another job's is refused.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxprune.formats import atomic, safetensors_file

_JOB = "job.json"


class ProgressLog:
    """The segments that are done.

    Attributes:
      directory: where they are.
    """

    def __init__(self, directory: Path, job: Mapping[str, Any]) -> None:
        """Opens or begins the directory of a job, which is what decides the result."""
        self.directory = directory
        atomic.begin_or_resume(directory / _JOB, job)

    def read(self, segment: int) -> tuple[dict[str, np.ndarray], Any] | None:
        """The weights and the record of a segment; None where its files are damaged."""
        weights, record = self._paths(segment)
        try:
            body = json.loads(record.read_text(encoding="utf-8"))
            digest, rows = body["sha256"], body["record"]
            if digest != atomic.digest(weights):
                return None
            tensors, _ = safetensors_file.read_header(weights)
        except (OSError, ValueError, KeyError, TypeError):
            return None
        arrays = {
            name: safetensors_file.view(weights, info) for name, info in tensors.items()
        }
        return arrays, rows

    def weight(self, segment: int, name: str) -> np.ndarray:
        """One weight of a segment whose files are whole, mapped from its file."""
        weights, _ = self._paths(segment)
        tensors, _ = safetensors_file.read_header(weights)
        return safetensors_file.view(weights, tensors[name])

    def write(
        self, segment: int, arrays: Mapping[str, np.ndarray], record: Any
    ) -> None:
        """Notes a segment as done: its weights by name, and a JSON-able record."""
        path, place = self._paths(segment)
        partial = path.with_suffix(".partial")
        entries = {name: (array.dtype, array.shape) for name, array in arrays.items()}
        safetensors_file.write(partial, entries, lambda name: arrays[name])
        os.replace(partial, path)
        body = {"sha256": atomic.digest(path), "record": record}
        atomic.replace(place, json.dumps(body).encode())

    def forget(self, segment: int) -> None:
        """Makes room: the segment counts as not done."""
        for path in reversed(self._paths(segment)):
            path.unlink(missing_ok=True)

    def _paths(self, segment: int) -> tuple[Path, Path]:
        name = f"segment_{segment:05d}"
        return self.directory / f"{name}.safetensors", self.directory / f"{name}.json"
