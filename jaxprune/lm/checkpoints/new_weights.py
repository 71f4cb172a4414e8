"""A checkpoint directory written again with tensors of other shapes.

For models that became smaller. Tokenizer, licence and the like are copied byte for
byte; config.json, the weights and their index are new. The result appears whole or not
at all.
"""

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxprune.files import atomic, safetensors_file
from jaxprune.files.sink import Sink
from jaxprune.lm.checkpoints import rewrite
from jaxprune.lm.checkpoints.checkpoint_dir import CONFIG, INDEX, CheckpointDir


class NewTensor(NamedTuple):
    """A tensor that is written.

    Attributes:
      file: the name of its safetensors file.
      dtype: NumPy's dtype, one that safetensors knows.
      shape: its shape.
      read: gives it, when its turn comes.
    """

    file: str
    dtype: np.dtype
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


def write(
    source: CheckpointDir,
    directory: str | os.PathLike[str],
    config: Mapping[str, Any],
    tensors: Mapping[str, NewTensor],
    *,
    provenance: Mapping[str, Any],
    overwrite: bool = False,
    finish: rewrite.Finish | None = None,
) -> list[Path]:
    """Writes a directory with another config.json and other tensors.

    Args:
      source: the directory that the model came from.
      directory: the new one, apart from the source.
      config: the new config.json, JSON-able.
      tensors: name to tensor; one of them is in memory at a time.
      provenance: JSON-able; how it was made. It is written to jaxprune.json.
      overwrite: whether an earlier result may be replaced. It is, once the new one is
        whole.
      finish: as for `rewrite.write`.

    Returns:
      The paths of the files.

    Raises:
      ValueError: `directory` is taken, or not apart from the source; a tensor holds NaN
        or infinity, or has another shape than was said.
      OSError: the directory could not be written.

    Example:
      >>> import pathlib, tempfile
      >>> import numpy as np
      >>> from safetensors.numpy import save_file
      >>> from jaxprune.lm.checkpoints import checkpoint_dir, new_weights
      >>> directory = pathlib.Path(tempfile.mkdtemp())
      >>> (directory / "a").mkdir()
      >>> _ = (directory / "a" / "config.json").write_text('{"width": 4}')
      >>> save_file({"w": np.ones(4, "f4")}, directory / "a" / "model.safetensors")
      >>> source = checkpoint_dir.open_directory(directory / "a")
      >>> half = np.ones(2, "f4")
      >>> new = new_weights.NewTensor("model.safetensors", half.dtype, (2,), half.copy)
      >>> _ = new_weights.write(
      ...     source, directory / "b", {"width": 2}, {"w": new}, provenance={}
      ... )
      >>> checkpoint_dir.open_directory(directory / "b").tensors["w"].shape
      (2,)
    """
    place = atomic.apart(directory, source.path)
    replaceable = rewrite.why_not_ours if overwrite else None
    others = [n for n in source.others if n not in (rewrite.NAME, CONFIG, INDEX)]
    with atomic.staged(place, replaceable=replaceable) as partial:
        digests = {CONFIG: _text(partial / CONFIG, dict(config))}
        for file in dict.fromkeys(tensor.file for tensor in tensors.values()):
            own = {name: t for name, t in tensors.items() if t.file == file}
            metadata = source.metadata.get(file, {"format": "pt"})
            digests[file] = _weights(partial / file, own, metadata)
        if source.indexed:
            digests[INDEX] = _text(partial / INDEX, _index(tensors))
        for name in others:
            digests[name] = rewrite.copy(source.path / name, partial / name)
        record = {**provenance, "tensors": {}, "files": digests}
        record |= {"format": rewrite.FORMAT, "version": rewrite.VERSION}
        more, files = finish(partial, record) if finish else ({}, {})
        atomic.replace_files(partial, files)
        atomic.replace_json(partial / rewrite.NAME, record | dict(more))
    return [place / name for name in (*digests, *files, rewrite.NAME)]


def _text(path: Path, content: Mapping[str, Any]) -> str:
    """Writes JSON as Hugging Face does; its SHA-256."""
    with Sink(path) as sink:
        sink.put((json.dumps(content, indent=2, allow_nan=False) + "\n").encode())
    return sink.digest


def _index(tensors: Mapping[str, NewTensor]) -> dict[str, Any]:
    size = sum(math.prod(t.shape) * t.dtype.itemsize for t in tensors.values())
    where = {name: tensor.file for name, tensor in sorted(tensors.items())}
    return {"metadata": {"total_size": size}, "weight_map": where}


def _weights(
    path: Path, tensors: Mapping[str, NewTensor], metadata: Mapping[str, str]
) -> str:
    """Writes one file of weights; its SHA-256."""
    entries = {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()}
    safetensors_file.write(path, entries, lambda n: _read(n, tensors[n]), metadata)
    return atomic.digest(path)


def _read(name: str, tensor: NewTensor) -> np.ndarray:
    array = np.asarray(tensor.read())
    if array.shape != tuple(tensor.shape):
        raise ValueError(
            f"a tensor must have the shape that was announced, but '{name}' is "
            f"{array.shape} and not {tuple(tensor.shape)}"
        )
    array = np.array(array, tensor.dtype, order="C")
    if not np.isfinite(array).all():
        raise ValueError(
            f"tensors must be finite, but '{name}' holds NaN or infinity as "
            f"{tensor.dtype}; look at how it was made"
        )
    return array
