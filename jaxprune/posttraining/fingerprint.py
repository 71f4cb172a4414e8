"""Digests that tell one job from another: its weights, its batches and its program."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.arrays import placement
from jaxprune.arrays.lazy import Leaves, array
from jaxprune.posttraining.pipeline.segmented_program import SegmentedProgram


class Fingerprint(NamedTuple):
    """What one read of a leaf tells.

    Attributes:
      finite: whether all values are finite.
      mark: a sum of the leaf's bits that depends on their places, 32 bits.
    """

    finite: bool
    mark: int


def of_leaves(names: Mapping[str, int], leaves: Leaves) -> dict[str, Fingerprint]:
    """The fingerprints of leaves, by name; each lazy one is read once and not kept."""
    prints = {}
    for name, i in names.items():
        leaf = array(leaves.all[i])
        if jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        finite, mark = placement.automatic(_fingerprint, leaf)
        prints[name] = Fingerprint(bool(finite), int(mark))
    return prints


def of_arrays(tree: Any) -> str:
    """SHA-256 of the arrays in a tree, in order."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        if jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()


def of_program(program: SegmentedProgram) -> str:
    """SHA-256 of what segments compute, the same in every process."""
    parts = [segment.subgraph for segment in program.segments]
    keys = "\n".join(repr(part.key) for part in parts)
    # A function among a primitive's parameters is written with its address.
    digest = hashlib.sha256(re.sub(r" at 0x[0-9a-f]+", "", keys).encode())
    inputs = {n for part in parts for n in part.inputs}
    for number in sorted(inputs & program.trace.program.constants):
        digest.update(np.ascontiguousarray(program.table(number)).tobytes())
    return digest.hexdigest()


def of_job(
    program: SegmentedProgram,
    counted: Sequence[jax.Array | None],
    known: Mapping[str, Fingerprint],
) -> dict[str, Any]:
    """What tells a job over a program from another, JSON-able.

    Args:
      program: the program, with the parameters before anything changes.
      counted: booleans for each batch, which samples count, or None for all.
      known: fingerprints of leaves that were read already, by name.

    Returns:
      Digests of positions and program, and a mark for each leaf that is read.
    """
    others = {name: i for name, i in program.used.items() if name not in known}
    prints = {**known, **of_leaves(others, program.leaves)}
    return {
        "counted": of_arrays(counted),
        "program": of_program(program),
        "parameters": {name: leaf.mark for name, leaf in prints.items()},
    }


@jax.jit
def _fingerprint(leaf: jax.Array) -> tuple[jax.Array, jax.Array]:
    finite = jnp.all(jnp.isfinite(leaf))
    if jnp.iscomplexobj(leaf):
        leaf = jnp.stack([leaf.real, leaf.imag])
    if leaf.dtype.itemsize < 4:  # float32 holds all of these types exactly
        leaf = jnp.asarray(leaf, np.float32)
    # The leaf's shape, and an axis of two words where a number has eight bytes.
    words = jax.lax.bitcast_convert_type(leaf, np.uint32)
    place = jnp.zeros_like(words)  # of each word, in row-major order
    for axis, size in enumerate(words.shape):
        index = jax.lax.broadcasted_iota(np.uint32, words.shape, axis)
        place = place * np.uint32(size) + index
    # Mixed before they are summed up: equal changes of many words would cancel.
    mark = jnp.sum(_mixed(words ^ _mixed(place)), dtype=np.uint32)
    return finite, mark


def _mixed(words: jax.Array) -> jax.Array:
    """MurmurHash3's last steps, one to one: all bits of a word depend on all of it."""
    words = (words ^ (words >> 16)) * np.uint32(0x85EBCA6B)
    words = (words ^ (words >> 13)) * np.uint32(0xC2B2AE35)
    return words ^ (words >> 16)
