"""Tokens per second of models that are timed in turn, in one process.

Prefill is a pass over a prompt that fills the cache; decoding draws token after token
with it. What else runs on a machine changes from minute to minute, so the models take
turns, round by round, and the median of the rounds counts. Compilation does not.
"""

import functools
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxprune.lm.models.decoder.model import Decoder


def measure(
    models: Mapping[str, Decoder],
    *,
    prompt: int,
    steps: int,
    batch: int = 1,
    rounds: int = 5,
    tick: Callable[[], Any] = lambda: None,
) -> dict[str, dict[str, float]]:
    """The speed of each model.

    Args:
      models: by name; all of their parameters are in memory.
      prompt: tokens of the prompt.
      steps: tokens that are decoded after it.
      batch: sequences at once.
      rounds: how often each is timed.
      tick: called after each timing of a model.

    Returns:
      By name "prefill" and "decode", tokens of all sequences per second.

    Raises:
      ValueError: a number is under 1, or a model's context is too short.

    Example:
      >>> from jaxprune.lm.models.decoder.config import DecoderConfig
      >>> config = DecoderConfig(
      ...     vocab_size=65, context=8, layers=1, width=4, heads=1, kv_heads=1,
      ...     head_dim=4, mlp_width=4,
      ... )
      >>> found = measure(
      ...     {"tiny": Decoder(config, rngs=nnx.Rngs(0))}, prompt=5, steps=3, rounds=1
      ... )
      >>> sorted(found["tiny"])
      ['decode', 'prefill']
    """
    if min(prompt, steps, batch, rounds) < 1:
        raise ValueError(
            "prompt, steps, batch and rounds must be at least 1, got "
            f"{prompt}, {steps}, {batch} and {rounds}"
        )
    for name, model in models.items():
        if prompt + steps > (context := model.config.context):
            raise ValueError(
                f"a prompt of {prompt} and {steps} steps must fit the context of "
                f"'{name}', got {context}; take fewer"
            )
    split = {name: nnx.split(model, nnx.Param) for name, model in models.items()}
    vocab = min(model.config.vocab_size for model in models.values())
    tokens = np.random.default_rng(0).integers(0, vocab, (batch, prompt), np.int32)
    for graphdef, params in split.values():
        _seconds(graphdef, params, tokens, steps)  # compiled, and everything in memory
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in split}
    for number in range(rounds):
        turn = list(split) if number % 2 == 0 else list(split)[::-1]
        for name in turn:
            seconds[name].append(_seconds(*split[name], tokens, steps))
            tick()
    return {
        name: {
            "prefill": batch * prompt / statistics.median(a for a, _ in own),
            "decode": batch * steps / statistics.median(b for _, b in own),
        }
        for name, own in seconds.items()
    }


def _seconds(
    graphdef: Any, params: Any, tokens: np.ndarray, steps: int
) -> tuple[float, float]:
    """Seconds of a prefill and of the steps after it."""
    start = time.perf_counter()
    token, cache = jax.block_until_ready(
        _prefill(graphdef, params, tokens, tokens.shape[1] + steps)
    )
    middle = time.perf_counter()
    jax.block_until_ready(_decode(graphdef, params, token, cache, steps))
    return middle - start, time.perf_counter() - middle


@functools.partial(jax.jit, static_argnums=(0, 3))
def _prefill(graphdef: Any, params: Any, tokens: jax.Array, size: int) -> Any:
    """The likeliest next token (batch,) and the cache."""
    model = nnx.merge(graphdef, params)
    empty = model.init_cache(tokens.shape[0], size)
    logits, cache = model.next_logits(model.embed(tokens), empty)
    return jnp.argmax(logits, axis=-1), cache


@functools.partial(jax.jit, static_argnums=(0, 4))
def _decode(
    graphdef: Any, params: Any, token: jax.Array, cache: Any, steps: int
) -> Any:
    """The likeliest tokens (steps, batch), one after the other."""
    model = nnx.merge(graphdef, params)

    def step(carry: Any, _: None) -> Any:
        token, cache = carry
        logits, cache = model.next_logits(model.embed(token[:, None]), cache)
        token = jnp.argmax(logits, axis=-1)
        return (token, cache), token

    return jax.lax.scan(step, (token, cache), length=steps)[1]
