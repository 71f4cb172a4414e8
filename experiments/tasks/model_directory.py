"""A Hugging Face directory to fine-tune: read to its places, written back pruned."""

import functools
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, Sharding

import jaxprune as jp
from experiments.harness import device_mesh
from jaxprune.files import atomic
from jaxprune.lm.checkpoints import rewrite
from jaxprune.lm.checkpoints.checkpoint_dir import open_directory
from jaxprune.lm.models import hf
from jaxprune.typing import Params


class ModelDirectory(NamedTuple):
    """What is known of a directory before its weights are read.

    Attributes:
      config: the model's shape.
      tokenizer: tokenizer of its texts.
      read: makes the float32 parameters, each leaf straight where it will live.
      write: (leaves by name, place, JSON-able provenance) writes a directory like this
        one with these leaves in place of its own; the others keep their bytes.
    """

    config: Any
    tokenizer: hf.Tokenizer
    read: Callable[[], Params]
    write: Callable[[Mapping[str, jax.Array], Path, Mapping[str, Any]], None]


def opened(
    path: Path, mesh: Mesh | None, load: Callable[..., Any] = hf.load
) -> ModelDirectory:
    """Reads a directory's configuration and words, none of its weights.

    Args:
      path: directory with config.json, safetensors and a tokenizer.
      mesh: devices that the parameters will be split over; None for one device.
      load: reader of the directory: `hf.load` for a language model.

    Returns:
      What is known of it.

    Raises:
      ValueError: it is no model of this kind that is understood, it is damaged, or
        there are several processes.
      OSError: something is missing.
    """
    if jax.process_count() > 1:
        raise ValueError("a directory is fine-tuned by one process; start one alone")
    # Names and shapes; no weight is read before a seed begins.
    loaded = load(path, dtype="float32", lazy=True)
    words = hf.load_tokenizer(path)

    def write(
        leaves: Mapping[str, jax.Array], out: Path, provenance: Mapping[str, Any]
    ) -> None:
        places = {leaf: loaded.names[leaf] for leaf in leaves}
        replaced = {
            name: functools.partial(_as_stored, leaves[leaf], place)
            for leaf, place in places.items()
            # A tied tensor may be stored twice; both copies get the new weights.
            for name in (place.name, *place.copies)
        }
        source = open_directory(path)
        rewrite.write_directory(
            source, out, replaced, provenance=provenance, overwrite=True
        )

    read = functools.partial(_read, path, mesh, load)
    return ModelDirectory(loaded.config, words, read, write)


def fingerprint(path: Path) -> str:
    """SHA-256 of config.json, the tokenizer and the weights, as 64 hex digits."""
    directory = open_directory(path)
    files = {"config.json", "tokenizer.json"}
    files |= {Path(name).name for name in directory.metadata}
    paths = [directory.path / name for name in sorted(files)]
    sums = [f"{file.name} {atomic.digest(file)}" for file in paths if file.exists()]
    return hashlib.sha256("\n".join(sums).encode()).hexdigest()


def _read(path: Path, mesh: Mesh | None, load: Callable[..., Any]) -> Params:
    model = load(path, dtype="float32", shardings=_places(path, mesh, load)).model
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def _places(
    path: Path, mesh: Mesh | None, load: Callable[..., Any]
) -> Callable[[str, tuple[int, ...]], Sharding] | None:
    """The sharding of each leaf, by its name."""
    if mesh is None:
        return None
    model = load(path, lazy=True).model  # shapes alone
    shapes = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    places = jp.tree.named_leaves(device_mesh.shardings(shapes, mesh))
    return lambda name, shape: places[name]


def _as_stored(leaf: jax.Array, source: hf.Source) -> np.ndarray:
    array = np.asarray(leaf)
    return array.T if source.transposed else array
