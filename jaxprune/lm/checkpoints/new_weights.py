"""A checkpoint directory written again with tensors of other shapes.

For models that became smaller. Tokenizer, licence and the like are copied byte for
byte; config.json, the weights and their index are new. The result appears whole or not
at all.
"""

import functools
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
from jaxprune.lm.checkpoints.directory_writer import (
    Finish,
    Written,
    copy_file,
    write_files,
)
from jaxprune.lm.checkpoints.finite import check_tensor


class NewTensor(NamedTuple):
    """A tensor that is written.

    Attributes:
      file: name of its safetensors file.
      dtype: NumPy's dtype, one that safetensors knows.
      shape: shape of the tensor.
      read: function that gives it, when its turn comes.
    """

    file: str
    dtype: np.dtype
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


def write_new_weights(
    source: CheckpointDir,
    directory: str | os.PathLike[str],
    config: Mapping[str, Any],
    tensors: Mapping[str, NewTensor],
    *,
    provenance: Mapping[str, Any],
    settings: Mapping[str, Mapping[str, Any] | None] | None = None,
    overwrite: bool = False,
    finish: Finish | None = None,
) -> list[Path]:
    """Writes a directory with another config.json and other tensors.

    Args:
      source: directory that the model came from.
      directory: path of the new one, apart from the source.
      config: content of the new config.json, JSON-able.
      tensors: name to tensor; one of them is in memory at a time.
      provenance: facts of how it was made, JSON-able, for jaxprune.json.
      settings: name of another JSON file to its new content, or to None where it is
        left out; those that are not named are copied.
      overwrite: whether an earlier result may be replaced. It is, once the new one is
        complete.
      finish: function that is called at the end; see `rewrite.write_directory`.

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
      >>> _ = new_weights.write_new_weights(
      ...     source, directory / "b", {"width": 2}, {"w": new}, provenance={}
      ... )
      >>> checkpoint_dir.open_directory(directory / "b").tensors["w"].shape
      (2,)
    """
    files = {CONFIG: _text(dict(config))}
    for file in dict.fromkeys(tensor.file for tensor in tensors.values()):
        in_file = {name: t for name, t in tensors.items() if t.file == file}
        # Loaders of torch look for "pt".
        metadata = source.metadata.get(file, {"format": "pt"})
        files[file] = functools.partial(_write_weights, in_file, metadata)
    if source.indexed:
        files[INDEX] = _text(_index(tensors))
    settings = settings or {}
    for name in source.others:
        if name in settings:
            if (content := settings[name]) is not None:
                files[name] = _text(content)
        elif name not in (rewrite.NAME, CONFIG, INDEX):
            files[name] = functools.partial(copy_file, source.path / name)

    def record(_: Any, digests: Mapping[str, str]) -> Mapping[str, Any]:
        # No zeros are counted: that a tensor is smaller is not seen in them.
        facts = {**provenance, "tensors": {}, "files": digests}
        return facts | {"format": rewrite.FORMAT, "version": rewrite.VERSION}

    return write_files(
        atomic.apart(directory, source.path),
        files,
        (rewrite.NAME, record),
        replaceable=rewrite.why_not_ours if overwrite else None,
        finish=finish,
    )


def _text(content: Mapping[str, Any]) -> Callable[[Path], Written]:
    """What writes JSON as Hugging Face does."""

    def write(path: Path) -> Written:
        with Sink(path) as sink:
            sink.put((json.dumps(content, indent=2, allow_nan=False) + "\n").encode())
        return Written(sink.digest)

    return write


def _index(tensors: Mapping[str, NewTensor]) -> dict[str, Any]:
    size = sum(math.prod(t.shape) * t.dtype.itemsize for t in tensors.values())
    weight_map = {name: tensor.file for name, tensor in sorted(tensors.items())}
    # As Hugging Face writes it.
    return {"metadata": {"total_size": size}, "weight_map": weight_map}


def _write_weights(
    tensors: Mapping[str, NewTensor], metadata: Mapping[str, str], path: Path
) -> Written:
    """Writes one file of weights, one tensor at a time in memory."""

    def read(name: str) -> np.ndarray:
        tensor = tensors[name]
        array = np.array(tensor.read(), tensor.dtype, order="C").reshape(tensor.shape)
        check_tensor(name, array)
        return array

    entries = {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()}
    safetensors_file.write(path, entries, read, metadata)
    return Written(atomic.digest(path))
