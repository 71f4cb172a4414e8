"""A job's model and tokenizer, and what its texts begin with."""

import dataclasses
import functools
import itertools
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from jaxprune.arrays import processes, tree
from jaxprune.arrays.rules import Rule, check
from jaxprune.lm.checkpoints.checkpoint_dir import CheckpointDir
from jaxprune.lm.checkpoints.finite import check_names
from jaxprune.lm.jobs.console import Console
from jaxprune.lm.jobs.settings import Devices, Loading
from jaxprune.lm.models import hf
from jaxprune.lm.models.hf import Tokenizer
from jaxprune.lm.models.loaded_model import LoadedModel, device_mesh, open_model
from jaxprune.lm.texts import text_files


def open_for_job(path: Path, loading: Loading, devices: Devices) -> LoadedModel:
    """The model of a directory as a job's settings read it, still in its files."""
    return open_model(
        path,
        dtype=loading.dtype,
        mesh=device_mesh(devices.mesh),
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


_IN_VOCABULARY = Rule(
    lambda v: v.token is None or 0 <= v.token < v.vocab_size,
    "sequences would begin with {why}, but the model's vocabulary has tokens from 0 to "
    "{last}",
    "repair bos_token in tokenizer_config.json or bos_token_id in config.json, or give "
    "--no-bos",
)


def text_beginning(
    tokenizer: Tokenizer | None, loading: Loading, vocab_size: int
) -> tuple[Tokenizer | None, Beginning]:
    """Whether sequences begin with BOS, as the options and the directory say.

    Args:
      tokenizer: tokenizer of the model; None for mere token ids, which are used as
        they are.
      loading: settings that may say so.
      vocab_size: number of tokens that the model knows.

    Returns:
      The tokenizer, which begins texts likewise, and what they begin with.

    Raises:
      ValueError: the options contradict each other, or there is no such token.
    """
    if loading.bos and loading.no_bos:
        raise ValueError("--bos and --no-bos exclude each other; leave one out")
    if loading.bos and tokenizer is not None and (tokenizer.bos is None):
        raise ValueError(
            "--bos needs a token that begins a text, but the model's directory names "
            "none; leave --bos out"
        )
    if tokenizer is None:  # rows of ids have been made for this model
        return None, Beginning(None, "token ids are used as they are")
    # The directory names the token, but nothing holds it to the model's vocabulary.
    begins = _beginning(tokenizer, loading)
    check(
        [_IN_VOCABULARY],
        **begins._asdict(),
        vocab_size=vocab_size,
        last=vocab_size - 1,
    )
    return dataclasses.replace(tokenizer, begins=begins.token is not None), begins


def _beginning(tokenizer: Tokenizer, loading: Loading) -> Beginning:
    # What was asked for goes before what the directory says.
    if loading.no_bos:
        return Beginning(None, "no BOS, as asked for")
    if loading.bos:
        return Beginning(tokenizer.bos, f"BOS ({tokenizer.bos}), as asked for")
    source = "as the directory says"
    if tokenizer.overruled:  # its two files contradict each other
        asked = "false" if tokenizer.begins else "true"
        source = (
            f"as tokenizer.json says, not as add_bos_token={asked} of "
            "tokenizer_config.json"
        )
    if tokenizer.begins:
        return Beginning(tokenizer.bos, f"BOS ({tokenizer.bos}), {source}")
    return Beginning(None, f"no BOS, {source}")


def needed_tokenizer(model: Path, files: tuple[Path, ...]) -> Tokenizer | None:
    """The model's tokenizer, or None where all files hold token ids."""
    return None if all(map(text_files.is_ids, files)) else hf.load_tokenizer(model)


def model_context(source: CheckpointDir, ignore_config: tuple[str, ...]) -> int | None:
    """The model's context in tokens; None where its config.json is not understood."""
    try:
        return hf.decoder_config(source.config, ignore_config=ignore_config).context
    except ValueError:
        return None  # what is wrong is said where the model is read
