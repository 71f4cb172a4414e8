"""The tensors of a smaller model's directory, by the names of the one before."""

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxprune.arrays import lazy, tree
from jaxprune.lm.checkpoints import new_weights
from jaxprune.lm.checkpoints.checkpoint_dir import CheckpointDir
from jaxprune.lm.models.hf.tensor_names import Source


def new_tensors(
    opened: CheckpointDir,
    params: Any,
    names: Mapping[str, Source],
    kept: Sequence[int],
) -> dict[str, new_weights.NewTensor]:
    """The tensors of the smaller directory, by name, in the files of before.

    Args:
      opened: directory of the model before.
      params: smaller parameters.
      names: tensor that each leaf came from.
      kept: numbers of the layers that stayed.

    Returns:
      Tensors by name; an array is read when its tensor is written.
    """
    tensors = {}
    for leaf, array in tree.named_leaves(params).items():
        origin = names[name_before(leaf, kept)]  # by the layer's old number
        # One leaf of all experts, stored as one tensor an expert: fewer tensors now.
        if origin.experts:
            origin = origin._replace(experts=array.shape[0])
        for i, name in enumerate((*origin.names, *origin.copies)):
            tensor = _renumbered(name, leaf, kept)
            stored_shape = array.shape[1:] if origin.experts else array.shape
            stored_shape = stored_shape[::-1] if origin.transposed else stored_shape
            tensors[tensor] = new_weights.NewTensor(
                opened.tensors[name].file,
                origin.dtype,
                stored_shape,
                functools.partial(_stored_tensor, array, origin, i),
            )
    return tensors


def _stored_tensor(array: Any, origin: Source, number: int) -> np.ndarray:
    return origin.stored(lazy.array(array), number)


def name_before(leaf: str, kept: Sequence[int]) -> str:
    """The name that a leaf had when there were all layers."""
    return re.sub(r"(?<=^layers/)\d+", lambda m: str(kept[int(m[0])]), leaf)


def _renumbered(name: str, leaf: str, kept: Sequence[int]) -> str:
    """The name of a tensor of a layer, with the layer's new number."""
    if (match := re.match(r"layers/(\d+)/", leaf)) is None:
        return name
    layer = int(match[1])
    return re.sub(rf"\b(layers|h)\.{kept[layer]}\.", rf"\g<1>.{layer}.", name, count=1)
