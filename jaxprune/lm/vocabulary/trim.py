"""A model's directory with fewer tokens: smaller embedding, head and tokenizer.

The rows of the tokens that stay are those of the model before, bit for bit, and so are
its other tensors: a text whose tokens all stay has the same logits at these tokens.
"""

import dataclasses
import functools
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from jaxprune.arrays.rules import Rule, check
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
from jaxprune.lm.vocabulary import token_choice, tokenizer_files

MULTIPLE = 64
"""What kernels like the number of tokens to be a multiple of."""


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
    ignore_config: Sequence[str] = (),
    provenance: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    finish: Finish | None = None,
) -> TrimmedVocabulary:
    """Writes a model with the tokens that texts need most.

    Added tokens, bytes, single characters and tokens that config.json,
    generation_config.json or tokenizer_config.json name stay in any case. A text whose
    tokens all stay is split into the same tokens. Others are split into shorter ones,
    which no training has prepared the model for: try it with `jaxprune eval`.

    Args:
      source: directory of the model.
      directory: path of the new one.
      texts: texts of the kind that the model is used on.
      size: number of tokens to keep, a multiple of 64.
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
    check(
        _FITS, size=size, multiple=MULTIPLE, decoder=isinstance(config, DecoderConfig)
    )
    tokenizer = hf.load_tokenizer(source)  # refuses files that are not what they say
    content = {"added_tokens": [], **_read_json(opened, tokenizer_files.TOKENIZER)}
    token_choice.check_ids(token_choice.token_ids(content), config.vocab_size)
    settings = {
        name: _read_json(opened, name)
        for name in tokenizer_files.SETTINGS
        if (opened.path / name).is_file()
    }
    needed = set().union(*map(tokenizer_files.named_ids, settings.values()))
    counts = _count_tokens(tokenizer, texts, config.vocab_size)
    kept = token_choice.choose_tokens(content, counts, size, needed)
    small = dataclasses.replace(config, vocab_size=size)
    settings[CONFIG] = hf.smaller_config(
        opened.config, small, ignore_config=ignore_config
    )
    files = _renumbered(content, settings, kept)
    left_out = tuple(n for n in tokenizer_files.LEFT_OUT if n in opened.others)
    covered = float(counts[kept].sum() / max(counts.sum(), 1))
    facts = {
        "method": "vocabulary by counts",
        "vocabulary": {
            "before": config.vocab_size,
            "after": size,
            "covered": covered,
            "left_out": list(left_out),
        },
    }
    paths = new_weights.write_new_weights(
        opened,
        directory,
        files.pop(CONFIG),
        _tensors(opened, loaded, small, kept),
        provenance=facts | dict(provenance or {}),
        settings=files | dict.fromkeys(left_out),
        overwrite=overwrite,
        finish=finish,
    )
    return TrimmedVocabulary(paths, kept, covered, left_out)


def _renumbered(
    content: Mapping[str, Any],
    settings: Mapping[str, Mapping[str, Any]],
    kept: Int[np.ndarray, " size"],
) -> dict[str, Mapping[str, Any]]:
    """tokenizer.json and the files of settings with the new ids, by name."""
    new_ids = {int(number): i for i, number in enumerate(kept)}
    tokenizer = tokenizer_files.reindexed_tokenizer(content, new_ids)
    _check_read_back(tokenizer)
    files: dict[str, Mapping[str, Any]] = {tokenizer_files.TOKENIZER: tokenizer}
    for name, setting in settings.items():
        files[name] = tokenizer_files.reindexed_settings(setting, new_ids.__getitem__)
    return files


def _check_read_back(content: Mapping[str, Any]) -> None:
    """Refuses a tokenizer.json whose ids the package would read otherwise."""
    import tokenizers

    # It counts added tokens on from the last of the vocabulary.
    read = tokenizers.Tokenizer.from_str(json.dumps(content)).get_vocab()
    check([_READ_BACK], same=read == token_choice.token_ids(content))


def _read_json(opened: CheckpointDir, name: str) -> dict[str, Any]:
    return json.loads((opened.path / name).read_text(encoding="utf-8"))


def _count_tokens(
    tokenizer: hf.Tokenizer, texts: Iterable[str], rows: int
) -> Int[np.ndarray, " rows"]:
    """How often each token is in some texts."""
    counts = np.zeros(rows, np.int64)
    for text in texts:
        counts += np.bincount(tokenizer.encode(text), minlength=rows)
    return counts


def _tensors(
    opened: CheckpointDir,
    loaded: hf.Loaded,
    small: DecoderConfig,
    kept: Int[np.ndarray, " size"],
) -> dict[str, new_weights.NewTensor]:
    """All tensors, those with a row for each token without some of the rows."""
    before = leaf_shapes(hf.abstract(loaded.config))
    after = leaf_shapes(hf.abstract(small))
    axes: dict[str, int] = {}  # tensor to its axis of tokens
    for leaf, shape in before.items():
        changed = [i for i, n in enumerate(shape) if n != after[leaf][i]]
        origin = loaded.names[leaf]
        for name in (*origin.names, *origin.copies) if changed else ():
            rank = len(shape)
            axes[name] = rank - 1 - changed[0] if origin.transposed else changed[0]

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


_FITS = (
    Rule(
        lambda v: v.decoder,
        "tokens are left out of language models that read text alone, but this one "
        "reads pictures",
        "keep its vocabulary whole",
    ),
    Rule(
        lambda v: v.size > 0 and v.size % v.multiple == 0,
        "the number of tokens must be a positive multiple of {multiple}, got {size}",
    ),
)
_READ_BACK = Rule(
    lambda v: v.same,
    "tokenizer.json must number its added tokens behind its vocabulary without a gap, "
    "but here some would get other ids",
    "save it anew with transformers",
)
