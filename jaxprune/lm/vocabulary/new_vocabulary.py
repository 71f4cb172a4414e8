"""The smaller vocabulary of a directory: which tokens stay, and the files that say so.

Nothing of the weights is read: a job chooses the tokens first, splits its texts by the
new tokenizer, and takes the rows of the tokens that stay when it has the parameters.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from jaxprune.lm.checkpoints.checkpoint_dir import CheckpointDir
from jaxprune.lm.models import hf
from jaxprune.lm.vocabulary import token_choice, tokenizer_files

MULTIPLE = 64
"""What kernels like the number of tokens to be a multiple of."""


class NewVocabulary(NamedTuple):
    """The tokens that stay of a directory's.

    Attributes:
      kept: ids before of the tokens that stay; the place of each is its id now, int64
        (size,).
      rows: number of ids before.
      covered: share of the counted tokens that stay, in [0, 1].
      settings: name of a JSON file to its new content, or to None where it is left out
        since it would contradict the others. config.json still has its sizes.
      tokenizer: tokenizer of the tokens that stay.
    """

    kept: Int[np.ndarray, " size"]
    rows: int
    covered: float
    settings: dict[str, Mapping[str, Any] | None]
    tokenizer: hf.Tokenizer

    @property
    def left_out(self) -> tuple[str, ...]:
        """Names of files that say the vocabulary once more."""
        return tuple(n for n, content in self.settings.items() if content is None)

    @property
    def facts(self) -> dict[str, Any]:
        """What jaxprune.json says of it."""
        return {
            "before": self.rows,
            "after": len(self.kept),
            "covered": self.covered,
            "left_out": list(self.left_out),
        }


def choose_vocabulary(
    opened: CheckpointDir,
    tokenizer: hf.Tokenizer,
    counts: Int[np.ndarray, " rows"],
    size: int,
    expected: Float[np.ndarray, " rows"] | None = None,
) -> NewVocabulary:
    """Chooses the tokens that stay, and renumbers the files that name them.

    Added tokens, bytes, BOS, EOS and what config.json, generation_config.json or
    tokenizer_config.json name stay in any case, and single characters as
    `token_choice.choose_tokens` says.

    Args:
      opened: directory of the model.
      tokenizer: tokenizer of the directory.
      counts: number of times that each id is in the texts, (rows of the embedding,).
      size: number of tokens to keep, a multiple of 64.
      expected: how often the model expects each id along them, of
        `expected_counts`; it then weighs as much as the counts.

    Returns:
      The vocabulary; nothing is written.

    Raises:
      ValueError: the tokenizer is not understood, so few tokens cannot stay, or what is
        expected is of other tokens.
    """
    check_size(size)
    content = {"added_tokens": [], **_read_json(opened, tokenizer_files.TOKENIZER)}
    # Gemma 3 has a token for pictures, of which models of text have no row.
    content["added_tokens"] = [
        token for token in content["added_tokens"] if token["id"] < len(counts)
    ]
    token_choice.check_ids(token_choice.token_ids(content), len(counts))
    settings = {
        name: _with_rows(_read_json(opened, name), len(counts))
        for name in tokenizer_files.SETTINGS
        if (opened.path / name).is_file()
    }
    named = set().union(*map(tokenizer_files.named_ids, [content, *settings.values()]))
    named |= {*tokenizer.eos}  # which may be named by their text
    if tokenizer.bos is not None:
        named.add(tokenizer.bos)
    beyond = sorted(i for i in named if i >= len(counts))
    if beyond:
        raise ValueError(
            "config.json and its like must name tokens that the model has, but "
            f"{beyond} are not under {len(counts)}; repair the ids, or leave them out"
        )
    weights = counts
    if expected is not None:
        if not (expected.shape == counts.shape and expected.min() >= 0):
            raise ValueError(
                "expected must have a number of at least 0 for each of the "
                f"{counts.size} ids, got shape {expected.shape}; take those of "
                "expected_counts, of this very model"
            )
        weights = _frequencies(counts) + _frequencies(expected)
    kept = token_choice.choose_tokens(content, weights, size, named)
    new_ids = {int(number): i for i, number in enumerate(kept)}
    reindexed = tokenizer_files.reindexed_tokenizer(content, new_ids)
    files: dict[str, Mapping[str, Any] | None] = {tokenizer_files.TOKENIZER: reindexed}
    for name, setting in settings.items():
        files[name] = tokenizer_files.reindexed_settings(setting, new_ids.__getitem__)
    twins = (
        name
        for name in opened.others
        if name in tokenizer_files.LEFT_OUT or name.startswith("tokenizer.model.v")
    )
    return NewVocabulary(
        kept,
        len(counts),
        float(counts[kept].sum() / max(counts.sum(), 1)),
        files | dict.fromkeys(twins),
        _renumbered_tokenizer(tokenizer, reindexed, new_ids),
    )


def _frequencies(counts: np.ndarray) -> Float[np.ndarray, " rows"]:
    """Each count over the sum of all, float64; 0 where there are none."""
    return counts / max(float(counts.sum()), 1.0)


def _with_rows(setting: dict[str, Any], rows: int) -> dict[str, Any]:
    """A file of settings without added tokens that no row stands for."""
    added = setting.get("added_tokens_decoder")
    if not added:
        return setting
    stay = {number: token for number, token in added.items() if int(number) < rows}
    return {**setting, "added_tokens_decoder": stay}


def count_tokens(
    tokens: Sequence[int] | np.ndarray, rows: int
) -> Int[np.ndarray, " rows"]:
    """How often each id is among some tokens, int64 (rows,)."""
    return np.bincount(np.asarray(tokens, np.int64), minlength=rows)


def check_size(size: int) -> None:
    """Refuses a number of tokens that is no positive multiple of 64."""
    if not (size > 0 and size % MULTIPLE == 0):
        raise ValueError(
            f"the number of tokens must be a positive multiple of {MULTIPLE}, got "
            f"{size}"
        )


def _renumbered_tokenizer(
    tokenizer: hf.Tokenizer, content: Mapping[str, Any], new_ids: Mapping[int, int]
) -> hf.Tokenizer:
    """The tokenizer of a new tokenizer.json, whose ids the package must read alike."""
    import tokenizers

    tokens = tokenizers.Tokenizer.from_str(json.dumps(content))
    # It counts added tokens on from the last of the vocabulary.
    same = tokens.get_vocab() == token_choice.token_ids(content)
    if not same:
        raise ValueError(
            "tokenizer.json must number its added tokens behind its vocabulary "
            "without a gap, but here some would get other ids; save it anew with "
            "transformers"
        )
    # As `hf.load_tokenizer` leaves them.
    tokens.no_truncation()
    tokens.no_padding()
    return dataclasses.replace(
        tokenizer,
        tokens=tokens,
        bos=None if tokenizer.bos is None else new_ids[tokenizer.bos],
        eos=tuple(new_ids[number] for number in tokenizer.eos),
    )


def _read_json(opened: CheckpointDir, name: str) -> dict[str, Any]:
    return json.loads((opened.path / name).read_text(encoding="utf-8"))
