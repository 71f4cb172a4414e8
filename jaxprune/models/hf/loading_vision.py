"""Folders of Phi-3-vision into a `Phi3Vision` and back, leaf by leaf.

As `jaxprune.models.hf` for language models: what is not understood is refused by name,
and a leaf that nobody changed goes back with the bits of the file.
"""

import dataclasses
import os
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from jaxprune.formats.checkpoint_dir import (
    CheckpointDir,
    Damaged,
    Unknown,
    open_directory,
)
from jaxprune.formats.safetensors_file import read_json
from jaxprune.models.hf import leaves
from jaxprune.models.hf.leaves import Dtype, Shardings
from jaxprune.models.hf.leaves import to_tensors as to_tensors
from jaxprune.models.hf.tensor_names import Source, match
from jaxprune.models.hf.tokenizer import tokenizer as tokenizer
from jaxprune.models.hf.vision_family import COPIES, Names, vision_config
from jaxprune.models.phi3_vision.model import Phi3Vision, Phi3VisionConfig

_PROCESSOR = "preprocessor_config.json"


class Loaded(NamedTuple):
    """A model that was read from a directory.

    Attributes:
        model: the model.
        config: its shape.
        names: leaf name to where it came from, for `to_tensors`.
    """

    model: Phi3Vision
    config: Phi3VisionConfig
    names: dict[str, Source]


def load(
    path: str | os.PathLike[str],
    *,
    dtype: Dtype | None = None,
    compute_dtype: Dtype | None = None,
    shardings: Shardings | None = None,
    mesh: jax.sharding.Mesh | None = None,
    stored: bool = False,
) -> Loaded:
    """Reads a folder of `model_type` "phi3_v": config.json and safetensors.

    Args:
        path: a local folder; nothing is downloaded.
        dtype: as for `hf.load`, like all that follow.
        compute_dtype: of the products, in the tower too.
        shardings: gives the sharding of a leaf by its name and shape.
        mesh: instead of `shardings`.
        stored: whether leaves stay in the files.

    Returns:
        The model, its shape, and where each leaf came from.

    Raises:
        FileNotFoundError: there is no such folder.
        directory.Unknown: the folder is no Phi-3-vision that is understood here; the
            sentence names the attributes or tensors.
        directory.Damaged: a file is cut short, or tensors are missing, doubled or of
            another shape.
        ValueError: a dtype is not supported, or both `shardings` and `mesh` are given.
    """
    leaves.check(dtype, compute_dtype, shardings, mesh)
    directory = open_directory(path)
    try:
        config = vision_config(directory.config)
    except ValueError as error:
        raise Unknown(f"'{directory.path / 'config.json'}': {error}") from None
    config = dataclasses.replace(config, crops=_crops(directory, config.crops))
    shapes = leaves.shapes(abstract(config))
    copies = dict(COPIES)
    if config.decoder.tie_weights:
        copies["lm_head.weight"] = "decoder/embedding/embedding"
    names = match(directory, Names(), shapes, copies)
    config = config.computed(
        compute_dtype or dtype or leaves.most_stored(directory, names)
    )
    place = leaves.placed(shardings, mesh)
    found = leaves.stored_leaves(directory, names, shapes, dtype, place)
    return Loaded(leaves.filled(abstract(config), found, stored=stored), config, names)


def abstract(config: Phi3VisionConfig) -> Phi3Vision:
    """The model with `jax.ShapeDtypeStruct`s for parameters."""
    return nnx.eval_shape(lambda: Phi3Vision(config, rngs=nnx.Rngs(0)))


def _crops(directory: CheckpointDir, default: int) -> int:
    """What the processor's settings say, where the folder has them."""
    path = directory.path / _PROCESSOR
    if not path.is_file():
        return default
    crops = read_json(path).get("num_crops", default)
    if isinstance(crops, bool) or not isinstance(crops, int) or crops < 1:
        raise Damaged(f"'{path}' must have a positive num_crops, got {crops!r}.")
    return crops


def tensors(
    model: Phi3Vision, config: Mapping[str, Any]
) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of a new directory, for a model that came from none.

    Args:
        model: the model.
        config: the config.json that it was made from.

    Yields:
        Name and array of every tensor, in the parameters' dtypes.

    Raises:
        ValueError: the configuration is not understood, or is another model's.
    """
    shape = vision_config(config).computed(model.config.dtype)
    if dataclasses.replace(shape, crops=model.config.crops) != model.config:
        raise ValueError(
            "tensors needs the config.json that the model was made from, got one of "
            "another shape; make the model with vision_family.vision_config(config)."
        )
    names = leaves.sources(Names(), model)
    return to_tensors(names, nnx.state(model, nnx.Param))
