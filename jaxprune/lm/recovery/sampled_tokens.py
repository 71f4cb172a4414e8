"""Fewer logits, for a training that leaves embedding and head as they are.

A loss needs the logits of the tokens that texts and predictions name. Of all others it
needs the sum of their exponentials alone, which a few of them estimate without bias:
each stands for as many as there are for each that was drawn (sampled softmax).

Reference: Jean et al., "On Using Very Large Target Vocabulary for Neural Machine
Translation", 2015, arXiv 1412.2007.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from jaxprune.posttraining import fingerprint

OTHERS = 4096
"""Number of tokens that are drawn of those that nothing names."""


class TokenSample(NamedTuple):
    """Some tokens of a vocabulary.

    Attributes:
      ids: the tokens, ascending, int32 (tokens,).
      log_counts: logarithm of the number of tokens that each stands for, float32
        (tokens,): 0 of a token that stands for itself alone.
    """

    ids: Int[np.ndarray, " tokens"]
    log_counts: Float[np.ndarray, " tokens"]

    @property
    def name(self) -> str:
        """Name that tells it from others."""
        return f"tokens {fingerprint.of_arrays(list(self))}"

    def places(self, ids: Int[np.ndarray, "..."]) -> Int[np.ndarray, "..."]:
        """Where tokens of the sample stand in it, int32 of the shape of `ids`."""
        return np.searchsorted(self.ids, ids).astype(np.int32)


def named_tokens(
    vocab_size: int, ids: Iterable[Int[np.ndarray, "..."]]
) -> Bool[np.ndarray, " vocab"]:
    """Which tokens of a vocabulary are among arrays of token ids."""
    named = np.zeros(vocab_size, bool)
    for part in ids:
        named[part] = True
    return named


def draw_tokens(
    named: Bool[np.ndarray, " vocab"], *, others: int = OTHERS, seed: int = 0
) -> TokenSample | None:
    """The tokens that are named, and some of the others, which stand for all of them.

    Args:
      named: which tokens the loss names, (vocab,).
      others: number of the others.
      seed: rng seed of the draw.

    Returns:
      The sample; None where it would be more than half of the vocabulary.

    Example:
      >>> sample = draw_tokens(np.arange(64) < 4, others=6)
      >>> len(sample.ids), sample.ids[:4].tolist(), float(sample.log_counts[0])
      (10, [0, 1, 2, 3], 0.0)
      >>> round(float(np.exp(sample.log_counts).sum()))
      64
    """
    unnamed = np.flatnonzero(~named)
    if 2 * (len(named) - len(unnamed) + others) > len(named):
        return None
    drawn = np.random.default_rng(seed).choice(unnamed, others, replace=False)
    counts = np.where(named, 1.0, len(unnamed) / max(others, 1))  # (vocab,)
    ids = np.sort(np.concatenate([np.flatnonzero(named), drawn]))
    return TokenSample(ids.astype(np.int32), np.log(counts[ids]).astype(np.float32))
