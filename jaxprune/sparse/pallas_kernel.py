"""The product with a packed matrix as a Pallas kernel, for GPUs.

It reads the arrays of a `PackedMatrix` as they are. A program has a block of rows and
goes from word to word: how many bits are set before a weight's says where its value
lies. It has been run in interpret mode and lowered for CUDA by Triton, which newer
releases of JAX deprecate in Pallas. It has never been timed, so nothing takes it by
itself.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from jaxprune.arrays.rules import Rule, check
from jaxprune.sparse import encodings
from jaxprune.sparse.encodings import WORD
from jaxprune.sparse.packed_matrix import PackedMatrix

ROWS = 32
"""Rows of a program."""
_RULES = (
    Rule(
        lambda v: v.packed.words is not None and len(v.packed.shape) == 2,
        "the Pallas kernel takes one matrix (out, in) with bits, got several, or one "
        "stored whole: {packed.shape}",
        "multiply it densely",
    ),
    Rule(
        lambda v: (
            v.packed.scales is None
            or v.packed.scales.shape[1] == 1
            or v.packed.group % WORD == 0
        ),
        "the Pallas kernel needs groups of whole words of 32 inputs, got "
        "{packed.group}",
        "pack with group=128",
    ),
)


def pallas_matmul(
    x: jax.Array, packed: PackedMatrix, *, interpret: bool = False
) -> jax.Array:
    """The product of vectors with a packed matrix, by a Pallas kernel.

    Args:
      x: floating (samples, in).
      packed: matrix (out, in) with bits.
      interpret: whether it runs in JAX's own operations, on any platform.

    Returns:
      float32 (samples, out): x @ W^T.

    Raises:
      ValueError: the matrix is stored whole, or its groups are no whole words.

    Example:
      >>> import numpy as np
      >>> from jaxprune.sparse.packed_matrix import pack_matrix
      >>> from jaxprune.sparse.pallas_kernel import pallas_matmul
      >>> matrix = np.zeros((2, 64), np.float32)
      >>> matrix[1, 40] = 3
      >>> x = jnp.full((1, 64), 2.0)
      >>> pallas_matmul(x, pack_matrix(matrix), interpret=True).tolist()
      [[0.0, 6.0]]
    """
    check(_RULES, packed=packed)
    outputs, inputs = packed.shape
    all_words: Any = packed.words
    all_starts: Any = packed.starts
    samples, words = len(x), all_words.shape[1]
    blocks = pl.cdiv(outputs, ROWS)
    # Rows behind the last have no bits, inputs behind the last meet none.
    extra = blocks * ROWS - outputs
    bits = jnp.pad(all_words, ((0, extra), (0, 0)))  # (blocks x ROWS, words)
    starts = jnp.pad(all_starts[:-1], (0, extra))
    x = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, words * WORD - inputs)))
    arrays = [bits, starts, packed.values, x]
    if packed.scales is not None:
        arrays.append(jnp.pad(packed.scales, ((0, extra), (0, 0))))
    kernel = functools.partial(
        _multiply_rows, encoding=packed.encoding, group=max(1, packed.group // WORD)
    )
    whole = [pl.BlockSpec(a.shape, lambda i, j, n=a.ndim: (0,) * n) for a in arrays]
    y = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((samples, blocks * ROWS), jnp.float32),
        grid=(samples, blocks),
        in_specs=whole,
        out_specs=pl.BlockSpec((1, ROWS), lambda i, j: (i, j)),
        interpret=interpret,
        # Else newer releases take another compiler, which copies whole blocks.
        compiler_params=triton.CompilerParams(num_warps=4),
    )(*arrays)
    return y[:, :outputs]


def _multiply_rows(
    words: Any, starts: Any, values: Any, x: Any, *refs: Any, encoding: str, group: int
) -> None:
    """One vector times a block of rows."""
    *scales, y = refs
    sample, block = pl.program_id(0), pl.program_id(1)
    rows = block * ROWS + jnp.arange(ROWS)  # (ROWS,)
    places = jnp.arange(WORD, dtype=jnp.uint32)  # (32,)
    before = (jnp.uint32(1) << places) - 1  # the bits before each

    def step(number: Any, carry: Any) -> Any:
        positions, sums = carry  # (ROWS,) both
        word = triton.load(words.at[rows, number])  # (ROWS,)
        is_kept = (word[:, None] >> places[None]) & 1 == 1  # (ROWS, 32)
        ranks = jax.lax.population_count(word[:, None] & before[None])
        index = positions[:, None] + ranks.astype(jnp.int32)
        weights = _load(values, index, is_kept, encoding)  # (ROWS, 32)
        inputs = triton.load(x.at[sample, number * WORD + jnp.arange(WORD)])
        terms = jnp.sum(weights * inputs[None], axis=1)
        if scales:
            # The last group may be shorter, and one group is the whole row.
            last = scales[0].shape[1] - 1
            place = jnp.minimum(number // group, last)
            terms *= triton.load(scales[0].at[rows, place])
        kept = jax.lax.population_count(word).astype(jnp.int32)
        return positions + kept, sums + terms

    first = triton.load(starts.at[rows]), jnp.zeros(ROWS, jnp.float32)
    _, sums = jax.lax.fori_loop(0, words.shape[1], step, first)
    y[0, :] = sums


def _load(values: Any, index: jax.Array, is_kept: jax.Array, encoding: str) -> Any:
    """Values at some positions as float32, zeros where no weight is kept."""
    halves = 2 if encoding == "int4" else 1
    stored = triton.load(values.at[index // halves], mask=is_kept, other=0)
    if encoding != "int4":
        return stored.astype(jnp.float32)
    nibbles = stored.astype(jnp.int32) >> (4 * (index & 1)) & 15
    return encodings.signed(nibbles)
