"""Hugging Face directories into a `Decoder` and back, leaf by leaf.

Nothing is loaded that is not understood: unknown attributes of config.json and tensors
that are unknown, missing, doubled or of another shape are refused by name, all at once.
How leaves and tensors go together is said in `jaxprune.models.hf.leaves`.
"""

import dataclasses
import os
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxprune.formats.checkpoint_dir import Unknown, open_directory
from jaxprune.models.decoder.config import DecoderConfig
from jaxprune.models.decoder.model import Decoder
from jaxprune.models.hf import leaves
from jaxprune.models.hf.families import decoder_config
from jaxprune.models.hf.leaves import Dtype as Dtype
from jaxprune.models.hf.leaves import Shardings as Shardings
from jaxprune.models.hf.leaves import to_tensors as to_tensors
from jaxprune.models.hf.tensor_names import Source as Source
from jaxprune.models.hf.tensor_names import match
from jaxprune.models.hf.tokenizer import Tokenizer as Tokenizer
from jaxprune.models.hf.tokenizer import tokenizer as tokenizer


class Loaded(NamedTuple):
    """A model that was read from a directory.

    Attributes:
        model: the model.
        config: its shape.
        names: leaf name to where it came from, for `to_tensors`.
    """

    model: Decoder
    config: DecoderConfig
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
    """Reads a model's folder: config.json and safetensors.

    Args:
        path: a local folder; nothing is downloaded.
        dtype: of the parameters; None keeps each as it is stored, bit for bit.
        compute_dtype: of the products; None is `dtype`, or bfloat16 where most weights
            are stored in it, else float32.
        shardings: gives the sharding of a leaf by its name and shape.
        mesh: instead of `shardings`: each leaf is split over all devices of this mesh
            along its longest axis that they divide, and copied to each where there is
            none. Without either all is on the default device.
        stored: whether leaves stay in the files; a `jp.LazyArray` stands for each,
            until it is read. See `jp.prune_trained`, and `embedded`.

    Returns:
        The model, its shape, and where each leaf came from.

    Raises:
        FileNotFoundError: there is no such folder.
        directory.Unknown: the folder is no model that is understood here; the sentence
            names the attributes or tensors.
        directory.Damaged: a file is cut short, or tensors are missing, doubled or of
            another shape.
        ValueError: a dtype is not supported, or both `shardings` and `mesh` are given.

    Example:
        >>> import json, pathlib, tempfile
        >>> from safetensors.numpy import save_file
        >>> config = {"model_type": "gpt2", "vocab_size": 5, "n_positions": 4,
        ...           "n_embd": 2, "n_layer": 1, "n_head": 1}
        >>> model = Decoder(decoder_config(config)[0], rngs=nnx.Rngs(0))
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> _ = (folder / "config.json").write_text(json.dumps(config))
        >>> save_file(dict(tensors(model, config)), folder / "model.safetensors")
        >>> load(folder).config.mlp_width
        8
    """
    leaves.check(dtype, compute_dtype, shardings, mesh)
    directory = open_directory(path)
    try:
        config, family = decoder_config(directory.config)
    except ValueError as error:
        raise Unknown(f"'{directory.path / 'config.json'}': {error}") from None
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    shapes = leaves.shapes(model)
    copies = {"lm_head.weight": "embedding/embedding"} if config.tie_weights else {}
    names = match(directory, family, shapes, copies)
    compute = compute_dtype or dtype or leaves.most_stored(directory, names)
    config = dataclasses.replace(config, dtype=compute)
    place = leaves.placed(shardings, mesh)
    found = leaves.stored_leaves(directory, names, shapes, dtype, place)
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    return Loaded(leaves.filled(model, found, stored=stored), config, names)


def embedded(
    path: str | os.PathLike[str],
    names: Mapping[str, Source],
    config: DecoderConfig,
    tokens: Int[np.ndarray, "batch time"],
    dtype: Dtype | None = None,
) -> Float[Array, "batch time width"]:
    """What `Decoder.embed` gives, of the rows of the file that the tokens need.

    With `load(..., stored=True)` and `Decoder.states` the table of embeddings, most of
    a small model, is never in memory.

    Args:
        path: the folder that the model was loaded from.
        names: where its leaves came from.
        config: its shape.
        tokens: integers (batch, time) in [0, vocab_size).
        dtype: of the parameters, as for `load`.

    Returns:
        The residual stream before the first layer.
    """
    source = names["embedding/embedding"]
    rows = open_directory(path).read(source.name)[np.asarray(tokens)]
    x = jnp.asarray(rows, leaves.kind_of(source, dtype)).astype(config.dtype)
    scale = config.embedding_scale
    return x if scale == 1 else x * jnp.array(scale, x.dtype)


def tensors(
    model: Decoder, config: Mapping[str, Any]
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
    shape, family = decoder_config(config)
    if dataclasses.replace(shape, dtype=model.config.dtype) != model.config:
        raise ValueError(
            "tensors needs the config.json that the model was made from, got one of "
            "another shape; make the model with families.decoder_config(config)."
        )
    names = leaves.sources(family, model)
    return to_tensors(names, nnx.state(model, nnx.Param))
