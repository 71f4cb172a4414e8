"""Calibration sequences that a model writes itself, where no text is at hand.

Each begins with BOS, where the model wants that, and a token drawn uniformly from the
vocabulary, special tokens left out say; the model continues it. So the sequences begin
anywhere, and go on as the texts did that the model was trained on.

Reference:
  Williams, Chrysostomou, Aletras, "Self-calibration for Language Model Quantization and
  Pruning", 2024, arXiv 2410.17170. Ours begins with a uniformly drawn token, and its
  temperature does not change along a sequence.
"""

import math
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Int

from jaxprune.lm.models.generate import LanguageModel, generate
from jaxprune.posttraining import fingerprint
from jaxprune.posttraining.progress import ProgressLog

_MOST = 16  # sequences at once


def self_calibration(
    model: LanguageModel,
    *,
    sequences: int,
    length: int,
    seed: int = 0,
    temperature: float = 1.0,
    bos: int | None = None,
    never_first: Collection[int] = (),
    batch: int = 8,
    directory: Path | None = None,
    progress: Callable[[int], Any] = lambda sequences: None,
) -> Int[np.ndarray, "sequences length"]:
    """Lets a model write sequences to calibrate on.

    Args:
      model: language model, a `Decoder` say.
      sequences: number of sequences.
      length: number of tokens of each, BOS included; at most the model's context.
      seed: rng seed of the first tokens and the draws.
      temperature: divisor of the logits; 1 follows the model, 0 takes the likeliest
        token each time.
      bos: token that each sequence begins with; None for none.
      never_first: tokens that are not drawn as the first one: BOS, EOS, padding, and
        those of languages that do not matter, since a sequence goes on in its own.
      batch: number of sequences that are written at once; another number gives other
        sequences.
      directory: directory of one model in which each batch is kept, so that a run that
        was killed goes on.
      progress: function that is called after each batch with the number of its
        sequences.

    Returns:
      Tokens, int32 (sequences, length).

    Raises:
      ValueError: a number is out of range, no first token is left, or the directory is
        another job's.

    Example:
      >>> from flax import nnx
      >>> from jaxprune.lm.models.decoder.model import Decoder, DecoderConfig
      >>> config = DecoderConfig(vocab_size=65, context=32, layers=1, width=16, heads=4,
      ...                        kv_heads=2, head_dim=8, mlp_width=32)
      >>> model = Decoder(config, rngs=nnx.Rngs(0))
      >>> self_calibration(model, sequences=3, length=8, never_first={0}).shape
      (3, 8)
    """
    shortest = 1 + (bos is not None)
    if not (min(sequences, batch) >= 1 and shortest <= length <= model.config.context):
        raise ValueError(
            "self_calibration needs sequences and a batch of at least 1, and a length "
            f"of {shortest} to {model.config.context} tokens, got "
            f"sequences={sequences}, batch={batch} and length={length}"
        )
    vocab_size = model.config.vocab_size
    prompts = first_tokens(sequences, vocab_size, never_first, seed)[:, None]
    if bos is not None:
        prompts = np.insert(prompts, 0, bos, axis=1)  # (sequences, 2)
    log = None
    if directory is not None:
        job = {
            "sequences": sequences,
            "length": length,
            "seed": seed,
            "temperature": temperature,
            "bos": None if bos is None else int(bos),
            # A digest, since it may be most of a vocabulary.
            "never_first": fingerprint.of_arrays([np.unique([*map(int, never_first)])]),
            "batch": batch,
        }
        log = ProgressLog(directory, job)
    batches = []
    for i, start in enumerate(range(0, sequences, batch)):
        prompt = prompts[start : start + batch]
        entry = f"batch_{i:05d}"
        resumed = log.read(entry) if log else None
        if resumed is not None:
            tokens = resumed[0]["tokens"]
        else:
            # The last batch is filled up, or it would be another program.
            full = np.resize(prompt, (batch, prompt.shape[1]))
            # Of the batch, so that a resumed run draws the same.
            key = jax.random.fold_in(jax.random.key(seed), i)
            steps = length - prompt.shape[1]
            written = generate(
                model, jnp.asarray(full), steps=steps, key=key, temperature=temperature
            )
            tokens = np.asarray(written[: len(prompt)], np.int32)  # (batch, length)
            if log:
                log.write(entry, {"tokens": tokens}, {"sequences": len(tokens)})
        batches.append(tokens)
        progress(len(prompt))
    return np.concatenate(batches)


def sequences_at_once(
    model: LanguageModel, *, sequences: int, length: int, least: int
) -> int:
    """How many sequences are best written at once.

    Each token that is drawn reads all parameters, whether for one sequence or for many,
    so more are faster until their keys and values count.

    Args:
      model: language model, with its parameters in memory.
      sequences: number of sequences in all.
      length: number of tokens of a sequence.
      least: number that there is memory for in any case.

    Returns:
      Up to 16, of keys and values of at most a quarter of the parameters' bytes, or
      `least` where that is more; fewer where the batches then are even.
    """
    cache = jax.eval_shape(lambda: model.init_cache(1, length))
    parameters = jax.tree.leaves(nnx.state(model, nnx.Param))
    size = sum(leaf.nbytes for leaf in parameters)
    each = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
    most = max(least, min(_MOST, size // (4 * max(each, 1))))
    return math.ceil(sequences / math.ceil(sequences / most))


def first_tokens(
    count: int, vocab_size: int, never_first: Collection[int], seed: int
) -> Int[np.ndarray, " count"]:
    """Tokens drawn uniformly from a vocabulary, some left out.

    Args:
      count: number of tokens.
      vocab_size: number that tokens are below of.
      never_first: tokens that are not drawn.
      seed: rng seed of the draw.

    Returns:
      int32 (count,).

    Raises:
      ValueError: no token is left.
    """
    allowed = np.setdiff1d(np.arange(vocab_size, dtype=np.int32), list(never_first))
    if not allowed.size:
        raise ValueError(
            f"sequences must begin with some token, but all {vocab_size} of the "
            "vocabulary are never first; leave some, of texts with other tokens say"
        )
    return np.random.default_rng(seed).choice(allowed, count)
