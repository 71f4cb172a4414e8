"""Tokens per second of models that are timed in turn, in one process.

Prefill is a pass over a prompt that fills the cache; decoding draws token after token
with it. What else runs on a machine changes from minute to minute, so the models take
turns, round by round, and the median of the rounds counts. Compilation does not.

Two models differ only where they differ by more than one model does from itself, so a
model that others are compared with is timed under two names.
"""

import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxprune.lm.models.decoder.model import Decoder

PHASES = ("prefill", "decode")

# With fewer rounds a spread says nothing.
_LEAST_ROUNDS = 3


def measure_speed(
    models: Mapping[str, Decoder],
    *,
    prompt: int,
    steps: int,
    batch: int = 1,
    rounds: int = 5,
    progress: Callable[[int], Any] = lambda timings: None,
) -> dict[str, dict[str, Any]]:
    """The speed of each model.

    Args:
      models: models by name; all of their parameters are in memory.
      prompt: number of tokens of the prompt.
      steps: number of tokens that are decoded after it.
      batch: number of sequences at once.
      rounds: number of times that each model is timed.
      progress: function that is called with 1 after each timing of a model.

    Returns:
      By name "prefill" and "decode", tokens of all sequences per second, and "rounds",
      which has those of each round likewise.

    Raises:
      ValueError: a number is under 1, or a model's context is too short.

    Example:
      >>> from jaxprune.lm.models.decoder.config import DecoderConfig
      >>> config = DecoderConfig(
      ...     vocab_size=65, context=8, layers=1, width=4, heads=1, kv_heads=1,
      ...     head_dim=4, mlp_width=4,
      ... )
      >>> speeds = measure_speed(
      ...     {"tiny": Decoder(config, rngs=nnx.Rngs(0))}, prompt=5, steps=3, rounds=1
      ... )
      >>> sorted(speeds["tiny"])
      ['decode', 'prefill', 'rounds']
    """
    shortest = min(models, key=lambda name: models[name].config.context)
    context = models[shortest].config.context
    if min(prompt, steps, batch, rounds) < 1:
        raise ValueError(
            "prompt, steps, batch and rounds must be at least 1, got "
            f"{prompt}, {steps}, {batch} and {rounds}"
        )
    if prompt + steps > context:
        raise ValueError(
            f"a prompt of {prompt} and {steps} steps must fit the context of "
            f"'{shortest}', got {context}; take fewer"
        )
    split = {name: nnx.split(model, nnx.Param) for name, model in models.items()}
    # One prompt for all.
    vocab = min(model.config.vocab_size for model in models.values())
    tokens = np.random.default_rng(0).integers(0, vocab, (batch, prompt), np.int32)
    for graphdef, params in split.values():
        _seconds(graphdef, params, tokens, steps)  # compiled, and everything in memory
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in split}
    for number in range(rounds):
        # A drift of the machine hits both.
        turn = list(split) if number % 2 == 0 else list(split)[::-1]
        for name in turn:
            seconds[name].append(_seconds(*split[name], tokens, steps))
            progress(1)
    sizes = {"prefill": batch * prompt, "decode": batch * steps}  # tokens
    return {
        name: _rates(dict(zip(PHASES, zip(*timings, strict=True), strict=True)), sizes)
        for name, timings in seconds.items()
    }


def _rates(
    seconds: Mapping[str, Sequence[float]], sizes: Mapping[str, int]
) -> dict[str, Any]:
    """Tokens a second of each phase: of the median, and of each round."""
    medians = {
        phase: sizes[phase] / statistics.median(seconds[phase]) for phase in PHASES
    }
    rounds = {
        phase: [sizes[phase] / time for time in seconds[phase]] for phase in PHASES
    }
    return {**medians, "rounds": rounds}


def compare_speed(
    before: Mapping[str, Any], again: Mapping[str, Any], after: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """How many times as fast one model is as another, and whether that says anything.

    Args:
      before: speed of a model, of `measure_speed`.
      again: speed of the same model under another name, in the same rounds.
      after: speed of the other model, in the same rounds.

    Returns:
      For each phase "ratio", after over before; "low" and "high", the least and the
      greatest ratio of a round; "noise", the greatest factor between the two timings of
      the one model in a round; and "distinguishable": whether there are three rounds or
      more and the ratio is not within that factor.

    Example:
      >>> rounds = {"prefill": [9.0, 10.0, 11.0], "decode": [1.0, 1.0, 1.0]}
      >>> model = {"prefill": 10.0, "decode": 1.0, "rounds": rounds}
      >>> fast = {**model, "decode": 2.0, "rounds": {**rounds, "decode": [2.0] * 3}}
      >>> ratios = compare_speed(model, model, fast)
      >>> ratios["decode"]["ratio"], ratios["decode"]["distinguishable"]
      (2.0, True)
      >>> ratios["prefill"]["distinguishable"]
      False
    """
    ratios = {}
    for phase in PHASES:
        dense = before["rounds"][phase]  # (rounds,)
        by_round = [x / y for x, y in zip(after["rounds"][phase], dense, strict=True)]
        twins = [x / y for x, y in zip(again["rounds"][phase], dense, strict=True)]
        noise = max(max(twin, 1 / twin) for twin in twins)
        ratio = after[phase] / before[phase]
        ratios[phase] = {
            "ratio": ratio,
            "low": min(by_round),
            "high": max(by_round),
            "noise": noise,
            "distinguishable": len(dense) >= _LEAST_ROUNDS
            and not 1 / noise <= ratio <= noise,
        }
    return ratios


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
    return middle - start, time.perf_counter() - middle  # prefill, decode


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
