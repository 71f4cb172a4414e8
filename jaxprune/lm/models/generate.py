"""Sampling from a language model: one pass over the prompt, then token by token.

Keys and values are cached, and the loop is one compiled `lax.scan`. Positions end at
the context, so a longer text needs `sliding=True`: past the context each token is drawn
from a full pass over the last `context` tokens, as nanoGPT does. Where long texts have
rotary angles of their own (`DecoderConfig.switches`), the cache is made anew when the
text becomes long, since every key in it changes.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

_GROUP = 512  # neighbours in the vocabulary, about the root of a large one


class LanguageModel(Protocol):
    """What `generate` calls of a model: `Decoder` has it, and so may another.

    Attributes:
      config: says `vocab_size`, `context`, and `switches`: the lengths past which other
        positions hold, for which the cache is made anew; () for none.
    """

    config: Any

    def init_cache(self, batch: int, size: int | None = None) -> Any:
        """An empty cache for `size` tokens."""

    def embed(self, tokens: Int[Array, "batch time"]) -> Float[Array, "batch time w"]:
        """What the layers get for these tokens."""

    def next_logits(
        self, x: Float[Array, "batch time w"], cache: Any = None
    ) -> tuple[Float[Array, "batch vocab"], Any]:
        """Logits after the last of embedded tokens, and the longer cache."""


def generate(
    model: LanguageModel,
    prompt: Int[Array, "batch time"],
    *,
    steps: int,
    key: PRNGKeyArray,
    temperature: float = 1.0,
    top_k: int | None = None,
    sliding: bool = False,
) -> Int[Array, "batch time+steps"]:
    """Continues each prompt by `steps` tokens.

    Each token is drawn from softmax(logits / temperature), among the `top_k` likeliest
    tokens if that is given. One program is compiled for each model shape, prompt shape,
    `steps` and `top_k`; another temperature or other parameters reuse it.

    Args:
      model: model that writes: a `Decoder`, or another `LanguageModel`.
      prompt: tokens, integers (batch, time) in [0, vocab_size), at least one a row.
      steps: number of tokens to draw, 0 or more.
      key: rng key of the draws; not read at temperature 0.
      temperature: divisor of the logits: 0 takes the likeliest token (the first of
        equals), 1 follows the model, more is more random.
      top_k: number of the likeliest tokens that may be drawn (of equals the first);
        None allows all.
      sliding: whether a text longer than the context is continued from its last
        `context` tokens, instead of refused.

    Returns:
      The prompt and its continuation, int32 (batch, time + steps).

    Raises:
      TypeError: the prompt is not made of integers.
      ValueError: the prompt is not (batch, time >= 1), holds a token outside the
        vocabulary, is too long with its continuation, or another argument is
        outside its range.

    Example:
      >>> from jaxprune.lm.models.decoder.model import Decoder, DecoderConfig
      >>> config = DecoderConfig(vocab_size=65, context=32, layers=1, width=16, heads=4,
      ...                        kv_heads=2, head_dim=8, mlp_width=32)
      >>> model = Decoder(config, rngs=nnx.Rngs(0))
      >>> prompt = jnp.zeros((2, 3), jnp.int32)
      >>> generate(model, prompt, steps=5, key=jax.random.key(0)).shape
      (2, 8)
    """
    config = model.config
    _check_prompt(prompt, config.vocab_size)
    context = config.context
    time = prompt.shape[1]
    if not steps >= 0:
        raise ValueError(f"generate needs steps >= 0, got {steps}")
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(
            f"generate needs a finite temperature >= 0, got {temperature}; 0 takes the "
            "likeliest token"
        )
    if top_k is not None and not 1 <= top_k <= config.vocab_size:
        raise ValueError(
            f"generate needs top_k in [1, {config.vocab_size}], got {top_k}; None "
            "allows every token"
        )
    if not time + steps <= context and not sliding:
        raise ValueError(
            f"generate needs prompt + steps <= context, got {time} + {steps} > "
            f"{context}; sliding=True goes on from the last {context} tokens"
        )
    prompt = jnp.asarray(prompt, jnp.int32)
    if steps == 0:
        return prompt
    window = prompt[:, -context:]  # (batch, at most context)
    cached = min(steps, context - window.shape[1] + 1)  # tokens that fit the context
    graphdef, params = nnx.split(model, nnx.Param)
    drawn = _draw(
        graphdef,
        params,
        window,
        key,
        jnp.float32(temperature),
        plan=(_stretches(window.shape[1], cached, config.switches), steps - cached),
        # By so little, float32 logits would be infinite.
        top_k=1 if temperature < 1e-30 else top_k,
    )
    return jnp.concatenate([prompt, drawn], axis=1)


def _stretches(time: int, steps: int, switches: Sequence[int]) -> tuple[int, ...]:
    """How many tokens are drawn with each cache: one cache up to each switch."""
    last = time + steps - 1  # the longest sequence that the model sees
    # A switch outside of what is drawn changes nothing.
    ends = [switch for switch in switches if time <= switch < last]
    starts = [time - 1, *ends]
    return tuple(b - a for a, b in zip(starts, [*ends, last], strict=True))


@functools.partial(jax.jit, static_argnames=("graphdef", "plan", "top_k"))
def _draw(
    graphdef: nnx.GraphDef[Any],
    params: nnx.State,
    window: Int[Array, "batch time"],
    key: PRNGKeyArray,
    temperature: Float[Array, ""],
    *,
    plan: tuple[tuple[int, ...], int],
    top_k: int | None,
) -> Int[Array, "batch steps"]:
    """Draws plan[0][i] tokens with the i-th cache, then plan[1] by a sliding window."""
    model: LanguageModel = nnx.merge(graphdef, params)
    x = model.embed(window)  # (batch, time, width), and longer with each stretch
    draw = functools.partial(_sample, temperature=temperature, top_k=top_k)
    stretches, slides = plan
    keys = jax.random.split(key, sum(stretches) + slides)  # one a token
    time, done = window.shape[1], 0
    for steps in stretches:
        drawn = _extend(model, x, keys[done : done + steps], draw)  # (batch, steps)
        window = jnp.concatenate([window, drawn], axis=1)
        x = jnp.concatenate([x, model.embed(drawn)], axis=1)
        done += steps

    def slide(window: Array, key: PRNGKeyArray) -> tuple[Array, Array]:
        token = draw(model.next_logits(model.embed(window))[0], key)  # (batch,)
        return jnp.concatenate([window[:, 1:], token[:, None]], axis=1), token

    drawn = window[:, time:]  # (batch, sum(stretches))
    if slides == 0:
        return drawn
    window = window[:, -model.config.context :]
    _, slid = jax.lax.scan(slide, window, keys[done:])  # (slides, batch)
    return jnp.concatenate([drawn, slid.T], axis=1)


def _extend(
    model: LanguageModel,
    x: Float[Array, "batch time width"],
    keys: PRNGKeyArray,
    draw: Callable[[Array, PRNGKeyArray], Array],
) -> Int[Array, "batch steps"]:
    """Draws a token for each key behind the embedded text, with one cache."""

    def step(
        carry: tuple[Any, Array], key: PRNGKeyArray
    ) -> tuple[tuple[Any, Array], Array]:
        cache, token = carry
        logits, cache = model.next_logits(model.embed(token[:, None]), cache)
        token = draw(logits, key)
        return (cache, token), token

    batch, time, _ = x.shape
    # The last token drawn is never looked at, so the cache need not hold it.
    cache = model.init_cache(batch, time + keys.shape[0] - 1)
    logits, cache = model.next_logits(x, cache)
    first = draw(logits, keys[0])  # (batch,)
    _, later = jax.lax.scan(step, (cache, first), keys[1:])  # (steps - 1, batch)
    return jnp.concatenate([first[None], later]).T


def _sample(
    logits: Float[Array, "batch vocab"],
    key: PRNGKeyArray,
    *,
    temperature: Float[Array, ""],
    top_k: int | None,
) -> Int[Array, "batch"]:
    if top_k == 1:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if top_k is None:
        return _categorical(key, logits / temperature)
    largest, tokens = jax.lax.top_k(logits, top_k)  # both (batch, top_k)
    chosen = _categorical(key, largest / temperature)  # (batch,)
    return jnp.take_along_axis(tokens, chosen[:, None], axis=-1)[:, 0]


def _categorical(
    key: PRNGKeyArray, logits: Float[Array, "batch vocab"]
) -> Int[Array, "batch"]:
    """Draws from softmax(logits): first a group of neighbours, then one of it.

    `jax.random.categorical` draws a number for each token of the vocabulary, which on a
    CPU takes longer than the head's product; this draws two for each row.
    """
    logits = logits.astype(jnp.float32)
    if jax.typeof(logits).sharding.spec[-1:] not in ((), (None,)):
        # An Explicit mesh splits the vocabulary: sums along it would gather it.
        return jax.random.categorical(key, logits).astype(jnp.int32)
    weights = jnp.exp(logits - logits.max(-1, keepdims=True))  # (batch, vocab)
    rest = -weights.shape[-1] % _GROUP
    groups = jnp.pad(weights, ((0, 0), (0, rest))).reshape(len(weights), -1, _GROUP)
    uniform = jax.random.uniform(key, (2, len(weights), 1))
    group = _first_above(groups.sum(-1), uniform[0])  # (batch,)
    inside = jnp.take_along_axis(groups, group[:, None, None], axis=1)[:, 0]
    return group * _GROUP + _first_above(inside, uniform[1])


def _first_above(
    weights: Float[Array, "batch n"], uniform: Float[Array, "batch 1"]
) -> Int[Array, "batch"]:
    """The first whose cumulative weight is above that share of all weights."""
    sums = jnp.cumsum(weights, axis=-1)
    # Where rounding moves a sum, still none without a weight is drawn.
    sums = jnp.where(weights > 0, sums, 0)
    above = sums > uniform * sums.max(-1, keepdims=True)
    return jnp.argmax(above, axis=-1).astype(jnp.int32)


def _check_prompt(prompt: Array, vocab_size: int) -> None:
    if not jnp.issubdtype(prompt.dtype, jnp.integer):
        raise TypeError(f"generate needs an integer prompt, got {prompt.dtype}")
    if not (prompt.ndim == 2 and prompt.shape[1] > 0):
        raise ValueError(
            "generate needs a prompt of shape (batch, time) with time >= 1, got "
            f"{prompt.shape}; start from one token, a newline say"
        )
    if isinstance(prompt, jax.core.Tracer) or prompt.size == 0:
        return
    tokens = np.asarray(prompt)
    for token in (int(tokens.min()), int(tokens.max())):
        if not 0 <= token < vocab_size:
            raise ValueError(
                f"generate needs prompt tokens in [0, {vocab_size}), got {token}; "
                "encode the prompt with the vocabulary that the model was trained on"
            )
