"""Keys and values that attention keeps, and what models ask of their tokens."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array


class Cache(NamedTuple):
    """Keys and values of the tokens that came before; made by `init_cache`.

    Attributes:
      keys: keys of each layer, (batch, size, kv_heads, head_dim), compute dtype, with
        their rotary positions.
      values: the same for the values, which have no positions.
      length: int32 scalar, number of the `size` positions that are filled.
    """

    keys: tuple[Array, ...]
    values: tuple[Array, ...]
    length: Array


def empty_cache(
    config: Any, batch: int, size: int | None, heads: Sequence[int], head_dim: int
) -> Cache:
    """A cache of zeros with length 0.

    Args:
      config: shape of the model: its context and dtype are read.
      batch: number of sequences.
      size: number of tokens that it can hold, at most (and by default) the context.
      heads: number of key and value heads of each layer.
      head_dim: number of features of a head.

    Returns:
      The cache.

    Raises:
      ValueError: the size is more than the context.
    """
    size = config.context if size is None else size
    if size > config.context:
        raise ValueError(
            f"a cache needs size <= context, got {size} > {config.context}"
        )
    # (batch, size, heads, head_dim): layers of one size share their zeros.
    zeros = {n: jnp.zeros((batch, size, n, head_dim), config.dtype) for n in {*heads}}
    layers = tuple(zeros[n] for n in heads)
    return Cache(layers, layers, jnp.int32(0))


def check_tokens(tokens: Array, model: str) -> None:
    """Refuses tokens that are no integers (batch, time)."""
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise TypeError(f"{model} needs integer tokens, got {tokens.dtype}")
    if tokens.ndim != 2:
        raise ValueError(
            f"{model} needs tokens of shape (batch, time), got {tokens.shape}; "
            "tokens[None] makes one sequence a batch"
        )


def check_length(time: int, size: int, model: str) -> None:
    """Refuses more tokens than the context, or the cache, has positions for."""
    if time > size:
        raise ValueError(
            f"{model} needs at most {size} tokens here (its context, or the size of "
            f"the cache), got {time}; give the last {size}, or a larger context"
        )
