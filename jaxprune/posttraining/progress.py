"""What a long pruning has done so far, on disk, so that a killed one can resume.

One pair of files a segment: the weights that were pruned in it, and a record that names
their digest and is renamed into place last; so too for a block that was refined. What
has no whole record is done again. A directory belongs to one job; another job's is
refused. Of several processes, which share the directory, the first one looks and
writes.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np

from jaxprune.arrays import processes
from jaxprune.files import atomic, safetensors_file

_JOB = "job.json"

Part: TypeAlias = Literal["segment", "block"]
"""What a pair of files is of: a pruned segment, or a block that was refined after."""


class ProgressLog:
    """The segments that are done.

    Attributes:
      directory: where they are.
    """

    def __init__(self, directory: Path, job: Mapping[str, Any]) -> None:
        """Opens or begins the directory of a job, which is what decides the result."""
        self.directory = directory
        processes.on_first(lambda: atomic.begin_or_resume(directory / _JOB, job))

    def read(
        self, number: int, part: Part = "segment"
    ) -> tuple[dict[str, np.ndarray], Any] | None:
        """The weights and the record of a part; None where its files are damaged."""
        rows = processes.on_first(lambda: self._record(number, part))
        if rows is None:
            return None
        weights, _ = self._paths(number, part)

        def mapped() -> dict[str, np.ndarray]:
            tensors, _ = safetensors_file.read_header(weights)
            return {k: safetensors_file.view(weights, v) for k, v in tensors.items()}

        return processes.together(mapped), rows

    def _record(self, number: int, part: Part) -> Any:
        """The record of a part; None where its files are damaged."""
        weights, record = self._paths(number, part)
        try:
            body = json.loads(record.read_text(encoding="utf-8"))
            digest, rows = body["sha256"], body["record"]
            if digest != atomic.digest(weights):
                return None
            safetensors_file.read_header(weights)
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return rows

    def weight(self, number: int, name: str, part: Part = "segment") -> np.ndarray:
        """One weight of a part whose files are whole, mapped from its file."""
        weights, _ = self._paths(number, part)
        tensors, _ = safetensors_file.read_header(weights)
        return safetensors_file.view(weights, tensors[name])

    def write(
        self,
        number: int,
        arrays: Mapping[str, np.ndarray],
        record: Any,
        part: Part = "segment",
    ) -> None:
        """Notes a part as done: its weights by name, and a JSON-able record."""
        processes.on_first(lambda: self._write(number, arrays, record, part))

    def _write(
        self, number: int, arrays: Mapping[str, np.ndarray], record: Any, part: Part
    ) -> None:
        path, place = self._paths(number, part)
        partial = path.with_suffix(".partial")
        entries = {name: (array.dtype, array.shape) for name, array in arrays.items()}
        safetensors_file.write(partial, entries, lambda name: arrays[name])
        os.replace(partial, path)
        body = {"sha256": atomic.digest(path), "record": record}
        atomic.replace(place, json.dumps(body).encode())

    def forget(self, number: int, part: Part = "segment") -> None:
        """Makes room: the part counts as not done."""
        for path in reversed(self._paths(number, part)):
            path.unlink(missing_ok=True)

    def _paths(self, number: int, part: Part) -> tuple[Path, Path]:
        name = f"{part}_{number:05d}"
        return self.directory / f"{name}.safetensors", self.directory / f"{name}.json"
