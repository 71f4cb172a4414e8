"""Text after a prompt with pictures, by the sampler of the language models.

The sampler knows tokens alone, so the rows that pictures make of themselves become
further tokens behind the vocabulary, which no logit names.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from experiments.phi3_vision.model import Phi3Vision
from jaxprune.lm.models.generate import generate


class _Answering(nnx.Module):
    """The decoder, whose tokens past its vocabulary are `rows`."""

    def __init__(self, model: Phi3Vision, rows: Float[Array, "rows width"]):
        self.decoder, self.rows = model.decoder, nnx.Param(rows)
        self.words = model.config.decoder.vocab_size
        self.config = dataclasses.replace(
            model.config.decoder, vocab_size=self.words + len(rows)
        )

    def init_cache(self, batch: int, size: int | None = None) -> Any:
        return self.decoder.init_cache(batch, size)

    def embed(self, tokens: Int[Array, "batch time"]) -> Float[Array, "batch time w"]:
        words = self.decoder.embed(jnp.minimum(tokens, self.words - 1))
        rows = self.rows[...].astype(words.dtype)[jnp.maximum(tokens - self.words, 0)]
        return jnp.where(tokens[..., None] >= self.words, rows, words)

    def next_logits(self, x: Array, cache: Any = None) -> tuple[Array, Any]:
        return self.decoder.next_logits(x, cache)


def answer(
    model: Phi3Vision,
    tokens: Int[Array, "batch time"],
    pixels: Float[Array, "crops height width 3"],
    sources: Int[Array, "batch time"],
    *,
    steps: int,
    key: PRNGKeyArray,
    **options: Any,
) -> Int[Array, "batch time+steps"]:
    """Continues prompts with pictures.

    Args:
      model: model that answers.
      tokens: tokens of the prompts, of `preprocess.Prompt` or `batch_prompts`.
      pixels: views and crops of all pictures; they are encoded once.
      sources: row of the pictures in each token's place, below 0 for a word.
      steps: number of tokens to draw.
      key: rng key of the draws.
      options: temperature, top_k and sliding, as for `generate`.

    Returns:
      The prompts and their continuations, int32 (batch, time + steps).

    Raises:
      ValueError: a source is past the rows of the pictures, or as for `generate`.
    """
    rows = nnx.jit(Phi3Vision.image_tokens)(model, pixels)
    words = model.config.decoder.vocab_size
    prompt = jnp.where(sources >= 0, words + sources, tokens)
    answering = _Answering(model, rows)
    drawn = generate(answering, prompt, steps=steps, key=key, **options)
    return jnp.concatenate([jnp.asarray(tokens), drawn[:, tokens.shape[1] :]], axis=1)
