"""Rotary positions: pairs of features turned by angles that grow with the position.

Feature i of the first half of a head and feature i of the second are a pair ("rotate
half", as in most Hugging Face checkpoints), or neighbours are (Cohere's); features past
those that turn stay as they are.
A `Rope` holds numbers only, the angle a position for each pair; the schemes that
stretch a context are functions that make one. Angles, cosines and sines are float32.

References:
  Su, Lu, Pan, Murtadha, Wen, Liu: RoFormer: Enhanced Transformer with Rotary Position
  Embedding, 2021, arXiv 2104.09864, eq. 34. Chen, Wong, Chen, Tian: Extending Context
  Window of Large Language Models via Position Interpolation, 2023, arXiv 2306.15595
  (linear). Peng, Quesnelle, Fan, Shippole: YaRN, 2023, arXiv 2309.00071. Ding et al.:
  LongRoPE, 2024, arXiv 2402.13753. The Llama 3 scheme: Grattafiori et al., 2024,
  arXiv 2407.21783.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """Angles of one rotary scheme.

    Attributes:
      frequencies: radians a position, one for each pair of features.
      long_frequencies: frequencies that take their place in sequences of more than
        `switch` tokens, for all of their positions; () if nothing does.
      switch: the length up to which `frequencies` hold; None if always.
      scale: factor on cosines and sines.
      interleaved: whether neighbours are a pair, not features of two halves.
    """

    frequencies: tuple[float, ...] = dataclasses.field(repr=False)
    long_frequencies: tuple[float, ...] = dataclasses.field(default=(), repr=False)
    switch: int | None = None
    scale: float = 1.0
    interleaved: bool = False


def linear(theta: float, dim: int, factor: float = 1.0) -> Rope:
    """theta^(-2 i / dim) / factor for pair i: positions squeezed by `factor`.

    Args:
      theta: base, above 1.
      dim: number of features of a head that turn, even.
      factor: factor by which positions are divided; 1 is the plain scheme.

    Returns:
      The scheme.

    Example:
      >>> linear(100.0, 4).frequencies
      (1.0, 0.1)
    """
    pairs = np.arange(0, dim, 2, dtype=np.float64) / dim  # (pairs,)
    return Rope(frequencies=tuple((theta**-pairs / factor).tolist()))


def llama3(
    theta: float, dim: int, *, factor: float, low: float, high: float, original: int
) -> Rope:
    """Slow pairs squeezed by `factor`, fast ones left, those between interpolated.

    A pair that turns more than `high` times within `original` positions is left, one
    that turns less than `low` times is squeezed; between the two the share left is
    (turns - low) / (high - low).

    Args:
      theta: base, above 1.
      dim: number of features of a head that turn, even.
      factor: factor by which the positions of slow pairs are divided.
      low: turns under which a pair is slow.
      high: turns over which a pair is fast.
      original: context of pretraining, in tokens.

    Returns:
      The scheme.

    Example:
      >>> llama3(1e4, 2, factor=8, low=1, high=4, original=8192).frequencies
      (1.0,)
    """
    plain = np.array(linear(theta, dim).frequencies)
    turns = original * plain / (2 * math.pi)  # within the context of pretraining
    # (pairs,): the share of a pair's frequency that is not squeezed.
    plain_share = np.clip((turns - low) / (high - low), 0, 1)
    mixed = plain_share * plain + (1 - plain_share) * plain / factor
    return Rope(frequencies=tuple(mixed.tolist()))


def yarn(
    theta: float,
    dim: int,
    *,
    factor: float,
    original: float,
    fast: float,
    slow: float,
    scale: float,
    truncate: bool = True,
) -> Rope:
    """Slow pairs squeezed by `factor`, fast ones left, those between by their number.

    Pair i = dim log(original / (2 pi r)) / (2 log theta) turns r times within
    `original` positions. Up to the pair that turns `fast` times all are left, from the
    one that turns `slow` times on all are squeezed; between the two the share left
    falls in a straight line with i.

    Args:
      theta: base, above 1.
      dim: number of features of a head that turn, even.
      factor: factor by which the positions of slow pairs are divided.
      original: context of pretraining, in tokens.
      fast: turns over which a pair is fast; the paper's beta.
      slow: turns under which a pair is slow; the paper's alpha.
      scale: factor on cosines and sines, `yarn_scale` in the paper.
      truncate: whether the two pairs are rounded outwards to whole numbers.

    Returns:
      The scheme.

    Example:
      >>> rope = yarn(1e4, 4, factor=4, original=64, fast=32, slow=1, scale=1.0)
      >>> rope.frequencies
      (1.0, 0.0025)
    """
    plain = np.array(linear(theta, dim).frequencies)
    ends = [  # the pair that turns so often, a number between two pairs as a rule
        dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))
        for turns in (fast, slow)
    ]
    if truncate:
        ends = [math.floor(ends[0]), math.ceil(ends[1])]
    low, high = max(ends[0], 0), min(ends[1], dim - 1)
    high += 0.001 * (low == high)  # as transformers keeps from dividing by zero
    # (pairs,): the share of a pair's frequency that is squeezed.
    squeezed_share = np.clip((np.arange(dim // 2) - low) / (high - low), 0, 1)
    mixed = (1 - squeezed_share) * plain + squeezed_share * plain / factor
    return Rope(frequencies=tuple(mixed.tolist()), scale=scale)


def yarn_scale(factor: float, weight: float = 1.0) -> float:
    """0.1 weight log(factor) + 1, what YaRN multiplies cosines and sines by."""
    return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0


def longrope(
    theta: float,
    dim: int,
    *,
    short: Sequence[float],
    long: Sequence[float],
    original: int,
    scale: float,
) -> Rope:
    """Each pair squeezed by a factor of its own, by others in long sequences.

    Args:
      theta: base, above 1.
      dim: number of features of a head that turn, even.
      short: factors, one for each pair, for sequences of up to `original` tokens.
      long: factors for longer sequences.
      original: context of pretraining, in tokens.
      scale: factor on cosines and sines, whatever the length.

    Returns:
      The scheme.

    Raises:
      ValueError: a list has not one factor for each pair.

    Example:
      >>> rope = longrope(1e4, 2, short=[1], long=[2], original=64, scale=1.2)
      >>> rope.frequencies, rope.long_frequencies
      ((1.0,), (0.5,))
    """
    plain = linear(theta, dim).frequencies
    for name, factors in (("short_factor", short), ("long_factor", long)):
        if len(factors) != len(plain):
            raise ValueError(
                f"longrope needs {name} to have {len(plain)} numbers, one for each "
                f"pair of the {dim} features that turn, got {len(factors)}"
            )
    up_to, past = (  # the switch
        tuple(f / factor for f, factor in zip(plain, factors, strict=True))
        for factors in (short, long)
    )
    return Rope(frequencies=up_to, long_frequencies=past, switch=original, scale=scale)


def cos_and_sin(
    rope: Rope, positions: Int[Array, "time"], length: int | Int[Array, ""]
) -> tuple[Float[Array, "time pairs"], Float[Array, "time pairs"]]:
    """Cosines and sines of the angles at these positions.

    Args:
      rope: rotary scheme.
      positions: positions of the tokens, integers (time,).
      length: number of tokens of the whole sequence, which decides between the short
        and the long frequencies.

    Returns:
      Two float32 arrays (time, pairs), both times `rope.scale`.
    """
    frequencies = jnp.array(rope.frequencies, jnp.float32)
    if rope.switch is not None:
        long = jnp.array(rope.long_frequencies, jnp.float32)
        frequencies = jnp.where(length > rope.switch, long, frequencies)
    # (time, 1) * (1, pairs)
    angles = positions.astype(jnp.float32)[:, None] * frequencies[None]
    return rope.scale * jnp.cos(angles), rope.scale * jnp.sin(angles)  # (time, pairs)


def rotate(
    x: Float[Array, "batch time heads dim"],
    cos_sin: tuple[Float[Array, "time pairs"], Float[Array, "time pairs"]],
    *,
    interleaved: bool = False,
) -> Float[Array, "batch time heads dim"]:
    """Turns each pair (a, b) to (a cos - b sin, b cos + a sin), in float32."""
    cos, sin = (table[None, :, None, :] for table in cos_sin)  # (1, time, 1, pairs)
    pairs = cos.shape[-1]
    if interleaved:
        a, b = (x[..., start : 2 * pairs : 2] for start in (0, 1))  # neighbours
    else:
        a, b = (x[..., start : start + pairs] for start in (0, pairs))  # halves
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)  # (batch, time, heads, pairs)
    turned_pairs = [(a * cos - b * sin), (b * cos + a * sin)]
    pieces = [piece.astype(x.dtype) for piece in turned_pairs]
    if interleaved:
        shape = (*x.shape[:-1], 2 * pairs)
        pieces = [jnp.stack(pieces, axis=-1).reshape(shape)]
    if 2 * pairs < x.shape[-1]:  # the features that do not turn
        pieces.append(x[..., 2 * pairs :])
    return jnp.concatenate(pieces, axis=-1)
