"""What a trainer made of a directory's weights, as that directory again.

The way back of `load_in_tunix` and `export_maxtext`: each tensor is found in the
trainer's parameters and turned as it is stored. Zeros stay zeros, and jaxprune.json
counts them.
"""

import functools
import math
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import jax
import numpy as np
from flax import nnx

from jaxprune import leaves
from jaxprune.arrays import tree
from jaxprune.arrays.messages import listed
from jaxprune.arrays.rules import Rule, check
from jaxprune.lm.checkpoints import rewrite
from jaxprune.lm.checkpoints.checkpoint_dir import CheckpointDir, open_directory
from jaxprune.lm.export.maxtext_tensors import maxtext_origin
from jaxprune.lm.export.trainer_shape import check_trainer_shape
from jaxprune.lm.export.tunix_tensors import tunix_origin
from jaxprune.lm.models import hf
from jaxprune.lm.models.decoder.config import DecoderConfig

OriginOf: TypeAlias = Callable[
    [str, CheckpointDir, DecoderConfig], tuple[str, Callable[[Any], np.ndarray]]
]
"""A tensor's name, its directory and its model's shape to the trainer's parameter, and
what takes the tensor out of it."""


def save_from_tunix(
    model: Any,
    source: str | os.PathLike[str],
    directory: str | os.PathLike[str],
    *,
    overwrite: bool = False,
) -> list[Path]:
    """Writes a model that Tunix trained as the Hugging Face directory it came from.

    Args:
      model: Tunix's model, or its parameters; of `load_in_tunix`.
      source: directory that it was read from.
      directory: path of the new one, apart from the source.
      overwrite: whether an earlier result may be replaced.

    Returns:
      The paths of the files.

    Raises:
      ValueError: the parameters are not those of the source's model; `directory` is
        taken; nothing was written.
      OSError: the directory could not be written.
    """
    return _save("Tunix", tunix_origin, model, source, directory, overwrite)


def save_from_maxtext(
    params: Any,
    source: str | os.PathLike[str],
    directory: str | os.PathLike[str],
    *,
    ignore_config: Sequence[str] = (),
    overwrite: bool = False,
) -> list[Path]:
    """Writes a model that MaxText trained as the Hugging Face directory it came from.

    Args:
      params: MaxText's model, its parameters, or what Orbax restores of them, with
        scanned layers; of a checkpoint of `export_maxtext`.
      source: directory that was exported.
      directory: path of the new one, apart from the source.
      ignore_config: attributes of config.json to read as if they were not there.
      overwrite: whether an earlier result may be replaced.

    Returns:
      The paths of the files.

    Raises:
      ValueError: the parameters are not those of the source's model; `directory` is
        taken; nothing was written.
      OSError: the directory could not be written.
    """
    return _save(
        *("MaxText", maxtext_origin, params, source),
        *(directory, overwrite, ignore_config),
    )


def _save(
    trainer: str,
    origin_of: OriginOf,
    params: Any,
    source: str | os.PathLike[str],
    directory: str | os.PathLike[str],
    overwrite: bool,
    ignore_config: Sequence[str] = (),
) -> list[Path]:
    opened = open_directory(source)
    # Names and shapes; no weight is read.
    loaded = hf.load(opened, lazy=True, ignore_config=ignore_config)
    check_trainer_shape(opened.config["model_type"], loaded.config, trainer)
    by_tensor = {
        origin.name: origin_of(origin.name, opened, loaded.config)
        for origin in loaded.names.values()
    }
    trained = _named_params(params)
    expected = {path for path, _ in by_tensor.values()}
    check(
        _SAME_LEAVES,
        trainer=trainer,
        path=opened.path,
        missing=listed(sorted(expected - trained.keys())),
        foreign=listed(sorted(trained.keys() - expected)),
    )
    sizes: Counter[str] = Counter()  # a stack, or an einsum, has several tensors
    for name, (path, _) in by_tensor.items():
        sizes[path] += math.prod(opened.tensors[name].shape)
    resized = [path for path in sizes if math.prod(trained[path].shape) != sizes[path]]
    check(_SAME_SIZES, trainer=trainer, path=opened.path, resized=listed(resized))
    # Tensor to a function that gives it, so that one at a time is on the host.
    replaced: dict[str, Callable[[], np.ndarray]] = {}
    for origin in loaded.names.values():
        path, take = by_tensor[origin.name]
        for name in (origin.name, *origin.copies):  # a tied head may be stored too
            replaced[name] = functools.partial(_taken_from, trained[path], take)
    facts = _earlier_facts(opened)
    return rewrite.write_directory(
        opened,
        directory,
        replaced,
        uncounted=replaced.keys() - _pruned_tensors(opened, facts),
        provenance={
            **{name: facts[name] for name in _KEPT_FACTS if name in facts},
            "trained_by": trainer,
        },
        overwrite=overwrite,
    )


def _named_params(params: Any) -> dict[str, Any]:
    """A model's or a tree's parameters by name, without the collection they lie in."""
    # A model's caches and counts of random numbers are no weights.
    if isinstance(params, nnx.Module):
        params = nnx.state(params, nnx.Param)
    # Orbax gives the item and in it Flax's collection, of the same name.
    while not isinstance(params, nnx.State) and "params" in params:
        params = params["params"]
    return tree.named_leaves(params)


def _taken_from(leaf: Any, take: Callable[[Any], np.ndarray]) -> np.ndarray:
    return take(jax.device_get(leaf))


def _earlier_facts(opened: CheckpointDir) -> dict[str, Any]:
    """What jaxprune.json says of the directory; nothing where another program wrote."""
    if not (opened.path / rewrite.NAME).is_file():
        return {}
    return rewrite.read_provenance(opened.path)


def _pruned_tensors(opened: CheckpointDir, facts: Mapping[str, Any]) -> set[str]:
    """The tensors whose zeros count: those that were pruned, else all that may be."""
    if counted := facts.get("tensors"):
        return {*counted}
    return {
        name
        for name, info in opened.tensors.items()
        if leaves.why_unprunable(name.replace(".", "/"), info) is None
    }


# How the zeros came about is still so after training.
_KEPT_FACTS = ("method", "pattern", "sparsity")
_SAME_LEAVES = Rule(
    lambda v: not (v.missing or v.foreign),
    "{trainer}'s parameters must be those of the model of '{path}'{lacking}{unknown}",
    "merge adapters first, and give the directory that the trainer was given",
    details=lambda v: {
        "lacking": f", but lack {v.missing}" if v.missing else "",
        "unknown": f", but also hold {v.foreign}" if v.foreign else "",
    },
)
_SAME_SIZES = Rule(
    lambda v: not v.resized,
    "{trainer}'s parameters must be of the sizes of the model of '{path}', but "
    "{resized} are not",
    "give the directory that the trainer was given",
)
