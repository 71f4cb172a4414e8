"""Fewer logits, for a training that leaves embedding and head as they are.

A loss needs the logits of the tokens that texts and predictions name. Of all others it
needs the sum of their exponentials alone, which a few of them estimate without bias:
each stands for as many as there are for each that was drawn (sampled softmax). Each
step names the tokens of its own sequences, and draws others of its own.

Reference: Jean et al., "On Using Very Large Target Vocabulary for Neural Machine
Translation", 2015, arXiv 1412.2007.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

OTHERS = 4096
"""Least number of tokens that are drawn of those that nothing names."""


class TokenSample(NamedTuple):
    """Some tokens of a vocabulary.

    Attributes:
      ids: the tokens, ascending, int32 (tokens,).
      log_counts: logarithm of the number of tokens that each stands for, float32
        (tokens,): 0 of a token that stands for itself alone.
    """

    ids: Int[np.ndarray | jax.Array, " tokens"]
    log_counts: Float[np.ndarray | jax.Array, " tokens"]


@dataclasses.dataclass(frozen=True)
class TokenSampler:
    """Draws the tokens of each step.

    Attributes:
      vocab_size: number of tokens of the vocabulary.
      size: number of tokens of a sample, the same in each step, so that one program
        serves all.
      sequences: tokens of all that is trained on, int32 (sequences, length).
      likeliest: function of the number of a sequence to tokens that it names besides.
      seed: rng seed of the draws.
    """

    vocab_size: int
    size: int
    sequences: Int[np.ndarray, "sequences length"]
    likeliest: Callable[[int], Int[np.ndarray, "..."]] | None = None
    seed: int = 0

    @property
    def name(self) -> str:
        """Name that tells it from others of the same sequences."""
        return f"{self.size} of {self.vocab_size} tokens, seed {self.seed}"

    def draw(self, rows: Int[np.ndarray, " rows"]) -> TokenSample:
        """The sample for the sequences of these numbers, the same each time."""
        named = np.zeros(self.vocab_size, bool)
        for row in rows:
            named |= _named(self.vocab_size, self.sequences, self.likeliest, row)
        return draw_tokens(named, self.size, (self.seed, *map(int, rows)))


def sampler_of(
    vocab_size: int,
    sequences: Int[np.ndarray, "sequences length"],
    likeliest: Callable[[int], Int[np.ndarray, "..."]] | None = None,
    *,
    batch: int,
    seed: int = 0,
) -> TokenSampler | None:
    """A sampler that has room for all that any step names, and for some others.

    Args:
      vocab_size: number of tokens of the vocabulary.
      sequences: tokens of all that is trained on, int32 (sequences, length).
      likeliest: function of the number of a sequence to tokens that it names besides,
        as predictions of it do.
      batch: number of sequences of a step.
      seed: rng seed of the draws.

    Returns:
      The sampler; None where a sample would be more than half of the vocabulary.

    Example:
      >>> sampler = sampler_of(20_000, np.arange(12).reshape(3, 4), batch=2)
      >>> sampler.size - OTHERS, len(sampler.draw(np.array([0, 2])).ids)
      (8, 4104)
    """
    rows = range(len(sequences))
    named = (_named(vocab_size, sequences, likeliest, row) for row in rows)
    counts = sorted(int(tokens.sum()) for tokens in named)
    size = sum(counts[-batch:]) + OTHERS
    if 2 * size > vocab_size:
        return None
    return TokenSampler(vocab_size, size, sequences, likeliest, seed)


def _named(
    vocab_size: int,
    sequences: Int[np.ndarray, "sequences length"],
    likeliest: Callable[[int], Int[np.ndarray, "..."]] | None,
    row: int,
) -> Bool[np.ndarray, " vocab"]:
    """Which tokens a sequence names."""
    named = np.zeros(vocab_size, bool)
    named[sequences[row]] = True
    if likeliest is not None:
        named[likeliest(row)] = True
    return named


def draw_tokens(
    named: Bool[np.ndarray, " vocab"], size: int, seed: int | Sequence[int] = 0
) -> TokenSample:
    """The tokens that are named, and some of the others, which stand for all of them.

    Args:
      named: which tokens the loss names, (vocab,).
      size: number of tokens of the sample, at most the vocabulary.
      seed: rng seed of the draw.

    Returns:
      The sample.

    Example:
      >>> sample = draw_tokens(np.arange(64) < 4, 10)
      >>> len(sample.ids), sample.ids[:4].tolist(), float(sample.log_counts[0])
      (10, [0, 1, 2, 3], 0.0)
      >>> round(float(np.exp(sample.log_counts).sum()))
      64
    """
    unnamed = np.flatnonzero(~named)
    others = size - (len(named) - len(unnamed))
    drawn = np.random.default_rng(seed).choice(unnamed, others, replace=False)
    counts = np.where(named, 1.0, len(unnamed) / max(others, 1))  # (vocab,)
    ids = np.sort(np.concatenate([np.flatnonzero(named), drawn]))
    return TokenSample(ids.astype(np.int32), np.log(counts[ids]).astype(np.float32))
