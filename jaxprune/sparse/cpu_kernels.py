"""The kernels of the distribution `jaxprune-kernels`, where it is installed.

They read the arrays of a `PackedMatrix` as they are. Without the distribution, or on
another platform than CPU, packed matrices run in JAX's own operations.
"""

import functools
import importlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.sparse.encodings import SPARE, WORD

MOST_VECTORS = 8
"""A kernel multiplies so many vectors at once; of more, a tile is expanded first."""
_CODES = {"float32": 0, "bfloat16": 1, "int8": 2, "int4": 3}


class Path(NamedTuple):
    """What multiplies packed matrices on this machine's CPU.

    Attributes:
      instructions: "avx512", "avx2", "neon" or "plain" of the kernels; "" where they do
        not run and JAX's own operations do.
      reason: why the kernels do not run; "" where they do.
    """

    instructions: str
    reason: str

    def __str__(self) -> str:
        """A line for a report."""
        if self.reason:
            return f"JAX's own operations: {self.reason}"
        return f"the kernels of jaxprune-kernels ({self.instructions})"


@functools.cache
def path() -> Path:
    """What multiplies packed matrices on this machine's CPU, and why.

    Returns:
      The instructions of the kernels, or the reason why they do not run.

    Example:
      >>> from jaxprune.sparse import cpu_kernels
      >>> bool(cpu_kernels.path().instructions) != bool(cpu_kernels.path().reason)
      True
    """
    try:
        kernels = importlib.import_module("jaxprune_kernels")
    except ImportError as error:
        absent = getattr(error, "name", None) == "jaxprune_kernels"
        return Path("", "jaxprune-kernels is not installed" if absent else str(error))
    loaded = kernels.load()
    if loaded.reason:
        return Path("", loaded.reason)
    for name, target in loaded.targets.items():
        jax.ffi.register_ffi_target(name, target, platform="cpu")
    return Path(loaded.instructions, "")


def runs(packed: Any) -> bool:
    """Whether the kernels can multiply a matrix that is stored like this one."""
    # Scales change where a word of the mask does, or nowhere in a row.
    one_group = packed.scales is None or packed.scales.shape[1] <= 1
    fits = one_group or packed.group % WORD == 0
    return fits and packed.encoding in _CODES and not path().reason


def multiply(x: jax.Array, packed: Any, first: int, count: int) -> jax.Array:
    """The product of a few vectors with some rows, by a kernel.

    Args:
      x: float32 (samples, in), at most `MOST_VECTORS` samples.
      packed: `PackedMatrix`.
      first: number of the first row.
      count: number of rows.

    Returns:
      float32 (samples, count).
    """
    wide = jnp.pad(x, ((0, 0), (0, -x.shape[1] % WORD)))  # (samples, words x 32)
    result = jax.ShapeDtypeStruct((len(x), count), jnp.float32)
    return _call("jaxprune_packed_multiply", result, packed, first, wide)


def expand(packed: Any, first: int, count: int) -> jax.Array:
    """Some rows of a packed matrix, dense, by a kernel.

    Args:
      packed: `PackedMatrix`.
      first: number of the first row.
      count: number of rows.

    Returns:
      float32 (count, in).
    """
    width = -(-packed.shape[-1] // WORD) * WORD
    result = jax.ShapeDtypeStruct((count, width), jnp.float32)
    rows = _call("jaxprune_packed_expand", result, packed, first)
    return rows[:, : packed.shape[-1]]


def _call(name: str, result: Any, packed: Any, first: int, *vectors: Any) -> jax.Array:
    # Absent arrays are empty ones: a handler has a fixed number of operands.
    words = jnp.zeros(0, jnp.uint32) if packed.words is None else packed.words
    starts = jnp.zeros(0, jnp.int32) if packed.starts is None else packed.starts
    scales = jnp.zeros(0, jnp.float32) if packed.scales is None else packed.scales
    call = jax.ffi.ffi_call(name, result, vmap_method="sequential")
    return call(
        words,
        packed.values,
        starts,
        scales,
        *vectors,
        encoding=np.int64(_CODES[packed.encoding]),
        first=np.int64(first),
        group=np.int64(packed.group),
        spare=np.int64(SPARE),
    )
