"""Sampling from a `GPT`: one pass over the prompt, then a token at a time.

Keys and values are cached, and the loop is one compiled `lax.scan`. Learned positions
end at the context, so a longer text needs `sliding=True`: past the context each token
is drawn from a full pass over the last `context` tokens, as nanoGPT does.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from .gpt import GPT, Cache


def generate(
    model: GPT,
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
        model: the model; called without dropout.
        prompt: integers (batch, time) in [0, vocab_size), at least one a row.
        steps: number of tokens to draw, 0 or more.
        key: decides the draws; not read at temperature 0.
        temperature: 0 takes the likeliest token (the first of equals), 1 follows the
            model, more is more random.
        top_k: how many of the likeliest tokens may be drawn (of equals the first);
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
        >>> from jaxprune.models.gpt import preset
        >>> model = GPT(preset("cpu", vocab_size=65), rngs=nnx.Rngs(0))
        >>> prompt = jnp.zeros((2, 3), jnp.int32)
        >>> generate(model, prompt, steps=5, key=jax.random.key(0)).shape
        (2, 8)
    """
    _check_prompt(prompt, model.config.vocab_size)
    _check_options(steps, temperature, top_k, model.config.vocab_size)
    context, length = model.config.context, prompt.shape[1] + steps
    if length > context and not sliding:
        raise ValueError(
            f"generate needs prompt + steps <= context, got {prompt.shape[1]} + {steps}"
            f" > {context}; sliding=True goes on from the last {context} tokens."
        )
    prompt = jnp.asarray(prompt, jnp.int32)
    if steps == 0:
        return prompt
    window = prompt[:, -context:]
    cached = min(steps, context - window.shape[1] + 1)
    graphdef, params = nnx.split(model, nnx.Param)
    drawn = _draw(
        graphdef,
        params,
        window,
        key,
        jnp.float32(temperature),
        plan=(cached, steps - cached),
        top_k=1 if temperature == 0 else top_k,
    )
    return jnp.concatenate([prompt, drawn], axis=1)


@functools.partial(jax.jit, static_argnames=("graphdef", "plan", "top_k"))
def _draw(
    graphdef: nnx.GraphDef[GPT],
    params: nnx.State,
    window: Int[Array, "batch time"],
    key: PRNGKeyArray,
    temperature: Float[Array, ""],
    *,
    plan: tuple[int, int],
    top_k: int | None,
) -> Int[Array, "batch steps"]:
    """Draws plan[0] tokens with the cache, then plan[1] each from a full window."""
    model = nnx.merge(graphdef, params)
    draw = functools.partial(_sample, temperature=temperature, top_k=top_k)
    keys = jax.random.split(key, sum(plan))
    batch, time = window.shape

    def extend(
        carry: tuple[Cache, Array], key: PRNGKeyArray
    ) -> tuple[tuple[Cache, Array], Array]:
        cache, token = carry
        logits, cache = model(token[:, None], cache=cache)
        token = draw(logits[:, -1], key)
        return (cache, token), token

    def slide(window: Array, key: PRNGKeyArray) -> tuple[Array, Array]:
        token = draw(model(window)[:, -1], key)
        return jnp.concatenate([window[:, 1:], token[:, None]], axis=1), token

    logits, cache = model(window, cache=model.init_cache(batch, time + plan[0] - 1))
    first = draw(logits[:, -1], keys[0])
    _, rest = jax.lax.scan(extend, (cache, first), keys[1 : plan[0]])
    drawn = jnp.concatenate([first[None], rest]).T  # (batch, plan[0])
    if plan[1] == 0:
        return drawn
    window = jnp.concatenate([window, drawn], axis=1)[:, -model.config.context :]
    _, rest = jax.lax.scan(slide, window, keys[plan[0] :])
    return jnp.concatenate([drawn, rest.T], axis=1)


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
        return jax.random.categorical(key, logits / temperature).astype(jnp.int32)
    best, tokens = jax.lax.top_k(logits, top_k)
    chosen = jax.random.categorical(key, best / temperature)
    return jnp.take_along_axis(tokens, chosen[:, None], axis=-1)[:, 0]


def _check_prompt(prompt: Array, vocab_size: int) -> None:
    if not jnp.issubdtype(prompt.dtype, jnp.integer):
        raise TypeError(f"generate needs an integer prompt, got {prompt.dtype}.")
    if prompt.ndim != 2 or prompt.shape[1] == 0:
        raise ValueError(
            f"generate needs a prompt of shape (batch, time) with time >= 1, got "
            f"{prompt.shape}; start from one token, a newline say."
        )
    if isinstance(prompt, jax.core.Tracer) or prompt.size == 0:
        return
    values = np.asarray(prompt)
    for value in (int(values.min()), int(values.max())):
        if not 0 <= value < vocab_size:
            raise ValueError(
                f"generate needs prompt tokens in [0, {vocab_size}), got {value}; "
                "encode the prompt with the vocabulary that the model was trained on."
            )


def _check_options(
    steps: int, temperature: float, top_k: int | None, vocab_size: int
) -> None:
    if steps < 0:
        raise ValueError(f"generate needs steps >= 0, got {steps}.")
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(
            f"generate needs a finite temperature >= 0, got {temperature}; "
            "0 takes the likeliest token."
        )
    if top_k is not None and not 1 <= top_k <= vocab_size:
        raise ValueError(
            f"generate needs top_k in [1, {vocab_size}], got {top_k}; "
            "None allows every token."
        )
