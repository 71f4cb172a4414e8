"""How often a language model itself expects each token.

No text has all tokens of its kind, and the order of a tokenizer is that of the texts
that it was made from. What the model predicts along a text says which others suit it.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxprune.lm.models.decoder.model import LOGITS, Decoder


def expected_counts(
    model: Decoder,
    sequences: Int[np.ndarray, "sequences length"],
    *,
    batch: int = 4,
    progress: Callable[[int], Any] = lambda sequences: None,
) -> Float[np.ndarray, " vocab"]:
    """The sum of all next-token distributions along some sequences.

    Args:
      model: model with all of its tokens.
      sequences: tokens, int32 (sequences, length).
      batch: number of sequences that the model sees at once.
      progress: function that is called with the number of sequences that are done
        since the last call.

    Returns:
      How often each token is expected, float64 (vocab,); together as many as there are
      tokens.
    """
    graphdef, params = nnx.split(model)
    vocab = model.config.vocab_size

    @jax.jit
    def states_of(
        params: Any, tokens: Int[Array, "batch length"]
    ) -> Float[Array, "batch length width"]:
        decoder = nnx.merge(graphdef, params)
        return decoder.states(decoder.embed(tokens))[0]

    @jax.jit
    def expected(
        params: Any, states: Float[Array, "batch time width"]
    ) -> Float[Array, " vocab"]:
        logits = nnx.merge(graphdef, params).logits(states)
        return jax.nn.softmax(logits.astype(jnp.float32)).sum((0, 1))

    total = np.zeros(vocab)
    for first in range(0, len(sequences), batch):
        tokens = sequences[first : first + batch]
        states = states_of(params, tokens)
        at_once = max(1, LOGITS // (vocab * len(tokens)))  # places of each sequence
        for start in range(0, tokens.shape[1], at_once):
            total += np.asarray(expected(params, states[:, start : start + at_once]))
        progress(len(tokens))
    return total
