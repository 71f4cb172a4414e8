"""A model's directory with fewer tokens: smaller embedding, head and tokenizer.

The rows of the tokens that stay are those of the model before, bit for bit, and so are
its other tensors: a text whose tokens all stay has the same logits at these tokens.
"""

import dataclasses
import functools
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from jaxprune.lm.checkpoints import new_weights
from jaxprune.lm.checkpoints.checkpoint_dir import (
    CONFIG,
    CheckpointDir,
    open_directory,
)
from jaxprune.lm.checkpoints.directory_writer import Finish
from jaxprune.lm.models import hf
from jaxprune.lm.models.decoder.config import DecoderConfig
from jaxprune.lm.models.hf.parameters import leaf_shapes
from jaxprune.lm.vocabulary.new_vocabulary import (
    check_size,
    choose_vocabulary,
    count_tokens,
)


class TrimmedVocabulary(NamedTuple):
    """A directory with fewer tokens.

    Attributes:
      paths: files of the directory.
      kept: ids before of the tokens that stayed; the place of each is its id now,
        int64 (size,).
      covered: share of the texts' tokens that stayed, in [0, 1].
      left_out: names of files that say the vocabulary once more and were left out.
    """

    paths: list[Path]
    kept: Int[np.ndarray, " size"]
    covered: float
    left_out: tuple[str, ...]


def trim_vocabulary(
    source: str | os.PathLike[str],
    directory: str | os.PathLike[str],
    texts: Iterable[str],
    size: int,
    *,
    expected: Float[np.ndarray, " rows"] | None = None,
    ignore_config: Sequence[str] = (),
    provenance: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    finish: Finish | None = None,
) -> TrimmedVocabulary:
    """Writes a model with the tokens that texts need most.

    Added tokens, bytes, characters that cannot be written by bytes, and tokens that
    config.json, generation_config.json or tokenizer_config.json name stay in any case.
    A text whose tokens all stay is split into the same tokens. Others are split into
    shorter ones, which no training has prepared the model for: try it with `jaxprune
    eval`.

    Args:
      source: directory of the model.
      directory: path of the new one.
      texts: texts of the kind that the model is used on.
      size: number of tokens to keep, a multiple of 64.
      expected: how often the model expects each token along them, of
        `expected_counts`; texts of the same kind then lose fewer tokens.
      ignore_config: attributes of config.json that are not looked at; see `hf.load`.
      provenance: facts of how it was made, JSON-able, for jaxprune.json.
      overwrite: whether an earlier result may be replaced.
      finish: function that is called at the end; see `rewrite.write_directory`.

    Returns:
      Files, tokens that stayed, and the share of the texts that they cover.

    Raises:
      ValueError: the tokenizer is not understood, the size does not fit, or `directory`
        is taken; nothing was written.
      OSError: the directory could not be written.
    """
    loaded = hf.load(source, lazy=True, ignore_config=ignore_config)
    opened, config = open_directory(source), loaded.config
    check_size(size)
    tokenizer = hf.load_tokenizer(source)  # refuses files that are not what they say
    counts = np.zeros(config.vocab_size, np.int64)
    for text in texts:
        counts += count_tokens(tokenizer.encode(text), config.vocab_size)
    vocabulary = choose_vocabulary(opened, tokenizer, counts, size, expected)
    small = dataclasses.replace(config, vocab_size=size)
    settings = dict(vocabulary.settings)
    new_config = hf.smaller_config(
        settings.pop(CONFIG) or opened.config, small, ignore_config=ignore_config
    )
    ways = "counts" if expected is None else "counts and expected counts"
    facts = {"method": f"vocabulary by {ways}", "vocabulary": vocabulary.facts}
    paths = new_weights.write_new_weights(
        opened,
        directory,
        new_config,
        _tensors(opened, loaded, small, vocabulary.kept),
        provenance=facts | dict(provenance or {}),
        settings=settings,
        overwrite=overwrite,
        finish=finish,
    )
    return TrimmedVocabulary(
        paths, vocabulary.kept, vocabulary.covered, vocabulary.left_out
    )


def _tensors(
    opened: CheckpointDir,
    loaded: hf.Loaded,
    small: DecoderConfig,
    kept: Int[np.ndarray, " size"],
) -> dict[str, new_weights.NewTensor]:
    """All tensors, those with a row for each token without some of the rows."""
    before = leaf_shapes(hf.abstract(loaded.config))
    axes: dict[str, int] = {}  # tensor to its axis of tokens
    for leaf, axis in hf.changed_axes(loaded.config, small).items():
        origin = loaded.names[leaf]
        for name in (*origin.names, *origin.copies):
            axes[name] = len(before[leaf]) - 1 - axis if origin.transposed else axis

    def read(name: str) -> np.ndarray:
        tensor = opened.read(name)
        return np.take(tensor, kept, axes[name]) if name in axes else tensor

    tensors = {}
    for name, info in opened.tensors.items():
        shape = tuple(
            len(kept) if axes.get(name) == i else n for i, n in enumerate(info.shape)
        )
        tensors[name] = new_weights.NewTensor(
            info.file, info.dtype, shape, functools.partial(read, name)
        )
    return tensors
