"""A step's model and tokenizer, and what its texts begin with."""

import dataclasses
import functools
import itertools
from collections.abc import Set
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from jaxprune.arrays import processes, tree
from jaxprune.lm.checkpoints.checkpoint_dir import CheckpointDir
from jaxprune.lm.checkpoints.finite import check_names
from jaxprune.lm.corpora import text_files
from jaxprune.lm.models import hf
from jaxprune.lm.models.hf import Tokenizer
from jaxprune.lm.models.loaded_model import LoadedModel, device_mesh, open_model
from jaxprune.lm.steps.console import Console
from jaxprune.lm.steps.settings import CONTEXT, AnyCalibration, Loading, YesNo


def open_for_job(path: Path, loading: Loading) -> LoadedModel:
    """The model of a directory as a step's options read it, still in its files."""
    return open_model(
        path,
        dtype=loading.dtype,
        mesh=device_mesh(loading.mesh),
        ignore_config=loading.ignore_config,
    )


def read_dense(model: LoadedModel) -> LoadedModel:
    """Reads a model's parameters, which must be finite.

    Args:
      model: model whose parameters are still in its files.

    Returns:
      The model with all parameters in memory.

    Raises:
      ValueError: a tensor holds NaN or infinity; the sentence names all such.
    """
    read = model.read()
    # Where they are, also in parts on several devices: the files are not read again.
    leaves = tree.named_leaves(read.params)
    finite = processes.fetch(
        {
            name: _is_finite(leaf, len(model.names[name].names))
            for name, leaf in leaves.items()
        }
    )
    check_names(
        itertools.chain.from_iterable(
            itertools.compress(model.names[name].names, ~flags)
            for name, flags in finite.items()
        )
    )
    return read


@functools.partial(jax.jit, static_argnums=1)
def _is_finite(leaf: Array, tensors: int) -> Bool[Array, " tensors"]:
    """Whether each of the tensors of a leaf is finite."""
    # Experts are tensors of their own, one behind the other along the first axis.
    axes = tuple(range(1, leaf.ndim)) if tensors > 1 else None
    return jnp.atleast_1d(jnp.isfinite(leaf).all(axis=axes))


def as_stored(model: LoadedModel, leaves: Set[str]) -> LoadedModel:
    """The model as it will be written: these leaves as their tensors hold them.

    Args:
      model: model with its parameters in memory.
      leaves: names of the leaves that are written anew.

    Returns:
      The model, in the dtypes of `model`.
    """

    def rounded(name: str, leaf: jax.Array) -> jax.Array:
        stored = model.names[name].dtype
        if name not in leaves or stored == leaf.dtype:
            return leaf
        # There and back: measured with the bits that the file has.
        return leaf.astype(stored).astype(leaf.dtype)

    named = tree.named_leaves(model.params)
    rounded_leaves = [rounded(name, leaf) for name, leaf in named.items()]
    structure = jax.tree.structure(model.params)
    return model._replace(params=jax.tree.unflatten(structure, rounded_leaves))


def note_ignored(model: LoadedModel, console: Console) -> None:
    """Says which attributes of config.json were not looked at."""
    if model.ignored:
        console.note(f"of config.json not looked at: {', '.join(model.ignored)}")


class Beginning(NamedTuple):
    """What the sequences of a text begin with.

    Attributes:
      token: id of BOS, or None.
      why: reason in words.
    """

    token: int | None
    why: str


def text_beginning(
    tokenizer: Tokenizer | None, bos: YesNo | None, vocab_size: int
) -> tuple[Tokenizer | None, Beginning]:
    """Whether sequences begin with BOS, as the option and the directory say.

    Args:
      tokenizer: tokenizer of the model; None for mere token ids, which are used as
        they are.
      bos: "yes" or "no"; None as the directory says.
      vocab_size: number of tokens that the model knows.

    Returns:
      The tokenizer, which begins texts likewise, and what they begin with.

    Raises:
      ValueError: there is no such token.
    """
    if bos == "yes" and tokenizer is not None and tokenizer.bos is None:
        raise ValueError(
            "--bos yes needs a token that begins a text, but the model's directory "
            "names none; leave --bos out"
        )
    if tokenizer is None:  # rows of ids have been made for this model
        return None, Beginning(None, "token ids are used as they are")
    begun = tokenizer.begins if bos is None else bos == "yes"
    token = tokenizer.bos if begun else None
    source = "as the directory says" if bos is None else "as asked for"
    if bos is None and tokenizer.overruled:  # its two files contradict each other
        asked = "false" if tokenizer.begins else "true"
        source = (
            f"as tokenizer.json says, not as add_bos_token={asked} of "
            "tokenizer_config.json"
        )
    why = f"no BOS, {source}" if token is None else f"BOS ({token}), {source}"
    # The directory names the token, but nothing holds it to the model's vocabulary.
    if token is not None and not 0 <= token < vocab_size:
        raise ValueError(
            f"sequences would begin with {why}, but the model's vocabulary has tokens "
            f"from 0 to {vocab_size - 1}; repair bos_token in tokenizer_config.json or "
            "bos_token_id in config.json, or give --bos no"
        )
    begins = Beginning(token, why)
    return dataclasses.replace(tokenizer, begins=token is not None), begins


def needed_tokenizer(model: Path, files: tuple[Path, ...]) -> Tokenizer | None:
    """The model's tokenizer, or None where all files hold token ids."""
    return None if all(map(text_files.is_ids, files)) else hf.load_tokenizer(model)


def fitted(
    texts: AnyCalibration, source: CheckpointDir, ignore_config: tuple[str, ...]
) -> AnyCalibration:
    """The options of texts, with a length that the model's context has room for.

    Only the default is shortened; what was asked for is refused later.

    Args:
      texts: options of the texts.
      source: directory of the model.
      ignore_config: attributes of config.json that are not looked at.

    Returns:
      The options.
    """
    try:
        context = hf.decoder_config(source.config, ignore_config=ignore_config).context
    except ValueError:
        return texts  # what is wrong is said where the model is read
    if texts.length == type(texts).length > context >= 8:
        return dataclasses.replace(texts, length=context)
    return texts


def window_length(context: int) -> int:
    """Tokens of a window that a model of this context is measured on."""
    return min(CONTEXT, context)
