"""What a long pruning has done so far, on disk, so that a killed one goes on.

One pair of files a stage: the weights it pruned, and a record that names their digest
and is renamed into place last. A stage without a whole record is done again. The folder
belongs to one job; another job's is refused.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from jaxprune.formats import safetensors_file

_JOB = "job.json"


class Journal:
    """The stages that are done.

    Attributes:
      folder: where they are.
    """

    def __init__(self, folder: Path, job: Mapping[str, Any]) -> None:
        """Opens or begins the folder of a job.

        Args:
          folder: made where absent.
          job: JSON-able; what decides the result.

        Raises:
          ValueError: the folder is another job's, and the sentence names what differs;
            or what says whose it is is damaged.
        """
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        job = json.loads(json.dumps(dict(job)))
        if (path := folder / _JOB).exists():
            known = _known(path)
            differs = sorted(k for k in {**known, **job} if known.get(k) != job.get(k))
            if differs:
                raise ValueError(
                    f"'{folder}' must be this job's folder, but {differs} differ from "
                    "the job that began it; choose another folder, or delete it"
                )
        else:
            _replace(path, json.dumps(job, indent=1).encode())

    def read(self, stage: int) -> tuple[dict[str, np.ndarray], Any] | None:
        """The weights and the record of a stage.

        Args:
          stage: its number.

        Returns:
          Name to matrix, and what `write` was given; None where the stage is not whole.
        """
        weights, record = self._paths(stage)
        try:
            body = json.loads(record.read_text(encoding="utf-8"))
            digest, told = body["sha256"], body["record"]
            if digest != hashlib.sha256(weights.read_bytes()).hexdigest():
                return None
            tensors, _ = safetensors_file.read_header(weights)
        except (OSError, ValueError, KeyError, TypeError):
            return None
        arrays = {
            name: safetensors_file.view(weights, info) for name, info in tensors.items()
        }
        return arrays, told

    def matrix(self, stage: int, name: str) -> np.ndarray:
        """One weight of a stage that is whole, as a view of its file.

        Args:
          stage: its number.
          name: of the weight.

        Returns:
          The matrix; its memory is the file's, and is let go with it.
        """
        weights, _ = self._paths(stage)
        tensors, _ = safetensors_file.read_header(weights)
        return safetensors_file.view(weights, tensors[name])

    def write(self, stage: int, arrays: Mapping[str, np.ndarray], record: Any) -> None:
        """Notes a stage as done.

        Args:
          stage: its number.
          arrays: name to matrix.
          record: JSON-able.
        """
        path, place = self._paths(stage)
        content = save({name: np.ascontiguousarray(x) for name, x in arrays.items()})
        _replace(path, content)
        body = {"sha256": hashlib.sha256(content).hexdigest(), "record": record}
        _replace(place, json.dumps(body).encode())

    def _paths(self, stage: int) -> tuple[Path, Path]:
        name = f"stage_{stage:05d}"
        return self.folder / f"{name}.safetensors", self.folder / f"{name}.json"


def _known(path: Path) -> dict[str, Any]:
    """The job that a folder belongs to."""
    try:
        job = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        job = None
    if not isinstance(job, dict):
        raise ValueError(
            f"'{path}' must say whose folder it is, but is damaged; delete the folder, "
            "or choose another"
        )
    return job


def _replace(path: Path, content: bytes) -> None:
    """Writes beside the place, to disk, and renames."""
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
