"""Hugging Face directories into models and back, parameter by parameter.

Nothing is loaded that is not understood: attributes of config.json that could change
what the model computes, and tensors that are unknown, missing, doubled or of another
shape are refused by name, all at once.
`jaxprune.lm.models.hf.families` says how each `model_type` is read, and
`jaxprune.lm.models.hf.parameters` how leaves and tensors belong together.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxprune.arrays import tree
from jaxprune.arrays.rules import reworded
from jaxprune.lm.checkpoints.checkpoint_dir import (
    CheckpointDir,
    Damaged,
    Unknown,
    open_directory,
)
from jaxprune.lm.models.decoder.config import DecoderConfig
from jaxprune.lm.models.decoder.layers import scaled
from jaxprune.lm.models.decoder.model import Decoder
from jaxprune.lm.models.hf import families, parameters
from jaxprune.lm.models.hf.parameters import Dtype, Shardings, to_tensors
from jaxprune.lm.models.hf.tensor_names import Source, match_tensors, tensor_source


class Loaded(NamedTuple):
    """A model that was read from a directory.

    Attributes:
      model: the model.
      config: its shape.
      names: leaf name to the tensor that it came from, for `to_tensors`.
      ignored: attributes of config.json that were not looked at: those of
        `ignore_config`, and unknown ones that say nothing of what a model computes.
    """

    model: Decoder
    config: DecoderConfig
    names: dict[str, Source]
    ignored: tuple[str, ...] = ()


def load(
    directory: str | os.PathLike[str] | CheckpointDir,
    *,
    dtype: Dtype | None = None,
    compute_dtype: Dtype | None = None,
    shardings: Shardings | None = None,
    mesh: jax.sharding.Mesh | None = None,
    lazy: bool = False,
    ignore_config: Sequence[str] = (),
) -> Loaded:
    """Reads a model's directory: config.json and safetensors.

    Args:
      directory: path of a local directory, or an opened one; nothing is downloaded.
      dtype: dtype of the parameters; None keeps each as it is stored, bit for bit.
      compute_dtype: dtype of the products; None is `dtype`, or bfloat16 where most
        weights are stored in it, else float32.
      shardings: function of a leaf's name and shape to its sharding.
      mesh: mesh that takes the place of `shardings`: each leaf is split over all
        devices of this mesh along its longest axis that they divide, and copied to each
        where there is none. Without either all is on the default device.
      lazy: whether leaves stay in the files; a `jp.LazyArray` stands for each, until
        it is read. See `jp.prune_trained`, and `embedded`.
      ignore_config: attributes of config.json to read as if they were not there; an
        unknown one that could change what the model computes is refused otherwise.
        "rope_scaling.finetuned" is one inside an object.

    Returns:
      The model, its shape, which tensor each leaf came from, what was ignored.

    Raises:
      FileNotFoundError: there is no such directory.
      Unknown: the directory is no model that is understood here; the sentence names the
        attributes or tensors.
      Damaged: a file is cut short, or tensors are missing, doubled or of another shape.
      ValueError: a dtype is not supported, or both `shardings` and `mesh` are given.

    Example:
      >>> import json, pathlib, tempfile
      >>> from safetensors.numpy import save_file
      >>> config = {"model_type": "gpt2", "vocab_size": 5, "n_positions": 4,
      ...           "n_embd": 2, "n_layer": 1, "n_head": 1}
      >>> model = Decoder(families.decoder_config(config), rngs=nnx.Rngs(0))
      >>> directory = pathlib.Path(tempfile.mkdtemp())
      >>> _ = (directory / "config.json").write_text(json.dumps(config))
      >>> save_file(dict(tensors(model, config)), directory / "model.safetensors")
      >>> load(directory).config.mlp_width
      8
    """
    parameters.check_options(dtype, compute_dtype, shardings, mesh)
    opened = (
        directory if isinstance(directory, CheckpointDir) else open_directory(directory)
    )
    try:
        family = families.find_family(opened.config)
        config, ignored = family.read(
            families.without_ignored(opened.config, ignore_config)
        )
    except ValueError as error:
        raise reworded(error, Unknown, f"'{opened.path / 'config.json'}': ") from None
    _check_layers(opened, config)
    shapes = parameters.leaf_shapes(abstract(config))
    names = match_tensors(opened, family, shapes)
    # Products of bfloat16 weights are in bfloat16 unless the caller asks for more.
    compute = compute_dtype or dtype or parameters.common_dtype(opened, names)
    config = config.with_dtype(compute)
    default_sharding = (
        parameters.on_one_device if mesh is None else parameters.split_over(mesh)
    )
    sharding_of = shardings or default_sharding
    leaves = [
        parameters.stored_leaf(
            opened, names[name], shape, dtype, sharding_of(name, shape)
        )
        for name, shape in shapes.items()
    ]
    model = parameters.with_leaves(abstract(config), leaves, lazy=lazy)
    return Loaded(model, config, names, (*ignore_config, *ignored))


def _check_layers(opened: CheckpointDir, config: DecoderConfig) -> None:
    """Refuses more layers than there are tensors, before any module is built."""
    if config.layers > len(opened.tensors):
        raise Damaged(
            f"'{opened.path}' must hold the tensors of the {config.layers} layers "
            f"that its config.json describes, but has {len(opened.tensors)} tensors; "
            "bring back the file that is not the model's"
        )


def abstract(config: DecoderConfig) -> Any:
    """The model of a shape, with `jax.ShapeDtypeStruct`s for parameters."""
    return nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))


def embedded(
    directory: str | os.PathLike[str],
    names: Mapping[str, Source],
    config: DecoderConfig,
    tokens: Int[np.ndarray, "batch time"],
    dtype: Dtype | None = None,
) -> Float[Array, "batch time width"]:
    """What `Decoder.embed` gives, of the rows of the file that the tokens need.

    With `load(..., lazy=True)` and `Decoder.states` the table of embeddings, most of a
    small model, is never in memory.

    Args:
      directory: the directory that the model was loaded from.
      names: tensors that its leaves came from.
      config: shape of the model.
      tokens: integers (batch, time) in [0, vocab_size).
      dtype: dtype of the parameters; see `load`.

    Returns:
      The residual stream before the first layer.
    """
    table = names["embedding/embedding"]
    # (batch, time, width)
    rows = open_directory(directory).read(table.name)[np.asarray(tokens)]
    read_as = parameters.read_dtype(table, dtype)
    x = jnp.asarray(rows, read_as).astype(config.dtype)  # (batch, time, width)
    return scaled(x, config.embedding_factor)


def tensors(
    model: Decoder, config: Mapping[str, Any]
) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of a new directory, for a model that came from none.

    Args:
      model: model, of parameters in memory.
      config: content of the config.json that it was made from.

    Yields:
      Name and array of every tensor, in the parameters' dtypes.

    Raises:
      ValueError: the configuration is not understood, or is another model's.
    """
    family = families.find_family(config)
    if family.read(config)[0].with_dtype(model.config.dtype) != model.config:
        raise ValueError(
            "tensors needs the config.json that the model was made from, got one of "
            "another shape; make the model of decoder_config of it"
        )
    params = nnx.state(model, nnx.Param)
    names = {
        name: tensor_source(family, name, leaf.shape, np.dtype(leaf.dtype))
        for name, leaf in tree.named_leaves(params).items()
    }
    return to_tensors(names, params)
